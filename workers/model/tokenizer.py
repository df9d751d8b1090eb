"""Loading a model's tokenizer; the packages that some formats of tokenizers need.

>>> load_tokenizer(Path("models/llama"), "model.name: 'models/llama'")    # doctest: +SKIP
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from workers.optional import install_command, not_installed
from workers.types import ModelError

EXTRA = "tokenizers"
"""The extra of this package that installs what reads every format."""

SENTENCEPIECE, TIKTOKEN, PROTOBUF = "sentencepiece", "tiktoken", "google.protobuf"

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
_NAMES = {PROTOBUF: "protobuf"}
"""Packages that are installed under another name than they are imported by."""


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder. ``name``: the field and the model, for messages.

    Raises :class:`ModelError`, which names the package to install where one is missing.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # for a damaged tokenizer.json it is of no class of its own
        raise ModelError(f"{name}: the tokenizer {_why(folder, error)}") from error


def _why(folder: Path, error: Exception) -> str:
    """What follows the word "tokenizer" in a message."""
    said = " ".join(str(error).split())[:300]
    source, packages = needed_packages(folder)
    if isinstance(error, ImportError):  # a class that reads another file by a package of its own
        packages += tuple(p for p in (SENTENCEPIECE, TIKTOKEN, PROTOBUF) if p in said.casefold())
        source = source or "this kind of tokenizer"
    missing = [_NAMES.get(package, package) for package in not_installed(dict.fromkeys(packages))]
    if missing:
        return (
            f"needs {' and '.join(missing)} ({source}), which {'is' if len(missing) == 1 else 'are'} not "
            f"installed; install with: {install_command(EXTRA)}"
        )
    if isinstance(error, ImportError):
        return f"needs a package that is not installed: {said}"
    return f"cannot be loaded ({said})"


def needed_packages(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The file that holds the tokenizer in a format of its own, and the packages that read it.
    Nothing for a ``tokenizer.json``, which needs none."""
    if (folder / "tokenizer.json").is_file():
        return "", ()
    for path in sorted(folder.glob("*.tiktoken")):
        return path.name, (TIKTOKEN,)
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            is_tiktoken = _TIKTOKEN_LINE.match(file.readline(1000)) is not None
        return path.name, (TIKTOKEN,) if is_tiktoken else (SENTENCEPIECE, PROTOBUF)
    return "", ()
