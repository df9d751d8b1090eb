"""The model that a spec names: configuration, fingerprint and shape, without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from workers.model.architectures import architecture
from workers.types import ModelError, SpecError, Written

EMBEDDED = "embedded"


class ModelConfig(Written):
    """The base model of a sweep: name, precision, device."""

    name: str = Field(
        EMBEDDED,
        min_length=1,
        max_length=1000,
        description="'embedded', a local folder, or a Hugging Face name",
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    compile: bool = Field(
        False,
        description="torch.compile the decoder layers inside an edit's steps: faster on a GPU after a "
        "minute of compiling, but "
        "rows of different actors agree up to rounding only",
    )


@dataclass(frozen=True)
class ModelFingerprint:
    """Content hashes that enter every cell id."""

    model: str
    tokenizer: str


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's linear maps, for the planner; never their values."""

    model_type: str
    layers: int
    hidden: int
    vocab: int
    parameters: int
    bytes_per_value: int
    linear: Mapping[str, tuple[int, int]]
    """(out, in) of each linear map of a decoder layer, by its path inside the layer."""
    context: int | None = None
    """Tokens the model reads at most; None: unknown."""

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.bytes_per_value

    def check_layer(self, layer: int, field: str) -> None:
        """Raise :class:`SpecError` if the model has no such decoder layer."""
        if not 0 <= layer < self.layers:
            raise SpecError(
                f"{field}: layer {layer} is out of range; the model has layers 0 to {self.layers - 1}"
            )

    def site(self, module: str | None) -> tuple[int, int]:
        """(out, in) of a layer's linear map; None means the MLP's output projection."""
        path = module or architecture(self.model_type).mlp_out
        try:
            return self.linear[path]
        except KeyError:
            raise SpecError(
                f"module: {path!r} is not a linear map of a {self.model_type} layer; choices: "
                f"{', '.join(self.linear)}"
            ) from None


def resolve(config: ModelConfig) -> Path:
    """The folder with the model's files. Hub names resolve through the local cache or a download.

    Raises :class:`ModelError` if nothing is found there.
    """
    if config.name == EMBEDDED:
        from workers.data.tinyworld import assets_dir

        return assets_dir()
    path = Path(os.path.expanduser(config.name))  # leaves "~name" unchanged if there is no such user
    if os.path.exists(path):  # False, without raising, for a name that cannot be a path
        if not (path / "config.json").is_file():
            raise ModelError(f"model.name: {config.name!r} is a folder without config.json")
        return path.resolve()
    if path.is_absolute() or config.name.startswith(".") or config.name.count("/") > 1:
        raise ModelError(f"model.name: {config.name!r} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                config.name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:
        raise ModelError(
            f"model.name: {config.name!r} is neither a folder nor a model that could be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"choices: '{EMBEDDED}', a local folder, or a hub name such as 'org/model'"
        ) from error


def require_model(name: str, field: str) -> None:
    """Raise :class:`ModelError` that names ``field``, if :func:`resolve` would find no model under
    this name. Of a model on the hub, only its config.json is fetched."""
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"{field}: {name!r} is a folder without config.json")
        return
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ModelError(f"{field}: {name!r} does not exist")
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json")
    except Exception as error:
        raise ModelError(
            f"{field}: {name!r} is neither a folder nor a model that could be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


def fingerprint_model(config: ModelConfig) -> ModelFingerprint:
    """Hash the files that determine results: config and weights together, the tokenizer
    separately."""
    folder = resolve(config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"model.name: {folder} holds no *.safetensors (pickled weights are never read)")
    tokenizer = sorted(
        p
        for p in folder.iterdir()
        if p.name.startswith(
            ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
        )
    )
    return ModelFingerprint(_hash_files([folder / "config.json", *weights]), _hash_files(tokenizer))


def has_chat_template(config: ModelConfig) -> bool:
    """Return whether the model's tokenizer has a chat template; read from its files, without
    loading it."""
    folder = resolve(config)
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: cannot be read: {error}") from None
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _hash_files(paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "blake2b").digest())
    return whole.hexdigest()[:32]


def context_length(hf: Any) -> int | None:
    """Context length of a model in tokens, from its ``transformers`` config; None if it does not
    say."""
    value = getattr(hf, "max_position_embeddings", None)
    return None if value is None else int(value)
