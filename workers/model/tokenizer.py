"""Loading a model's tokenizer; the packages that some formats of tokenizers need.

>>> load_tokenizer(Path("models/llama"), "model.name: 'models/llama'")    # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workers.folders import open_tokenizer
from workers.optional import install_command, not_installed
from workers.types import ModelError

EXTRA = "tokenizers"
"""The extra of this package that installs what reads every format."""

SENTENCEPIECE, TIKTOKEN, PROTOBUF = "sentencepiece", "tiktoken", "google.protobuf"

_NEED_NONE = ("tokenizer.json", "vocab.json", "vocab.txt")

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
_NAMES = {PROTOBUF: "protobuf"}
"""Packages that are installed under another name than they are imported by."""


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder. ``name``: the field and the model, for messages.

    Raises :class:`ModelError`, which names the package to install where one is missing.
    """
    source, packages = needed_packages(folder)
    if missing := _missing(packages):  # transformers would warn of it and fail for another reason
        raise ModelError(f"{name}: {_needs(missing, source)}")
    try:
        return open_tokenizer(folder, trust_remote_code)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        if not isinstance(error.__cause__, ImportError):
            raise ModelError(f"{name}: the tokenizer cannot be loaded ({said})") from error
        missing = _missing(p for p in (SENTENCEPIECE, TIKTOKEN, PROTOBUF) if p in said.casefold())
        if not missing:
            raise ModelError(
                f"{name}: the tokenizer needs a package that is not installed: {said}"
            ) from error
        raise ModelError(f"{name}: {_needs(missing, 'this kind of tokenizer')}") from error


def _missing(packages: Iterable[str]) -> list[str]:
    return [_NAMES.get(package, package) for package in not_installed(packages)]


def _needs(missing: Sequence[str], source: str) -> str:
    return (
        f"the tokenizer needs {' and '.join(missing)} ({source}), which {'is' if len(missing) == 1 else 'are'} "
        f"not installed; install with: {install_command(EXTRA)}"
    )


def needed_packages(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The file that holds the tokenizer in a format of its own, and the packages that read it; none
    for files that need none."""
    if any((folder / file).is_file() for file in _NEED_NONE):
        return "", ()
    for path in sorted(folder.glob("*.tiktoken")):
        return path.name, (TIKTOKEN,)
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            is_tiktoken = _TIKTOKEN_LINE.match(file.readline(1000)) is not None
        return path.name, (TIKTOKEN,) if is_tiktoken else (SENTENCEPIECE, PROTOBUF)
    return "", ()
