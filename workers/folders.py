"""The only place that opens folders of models, tokenizers and configs, whichever option names them.

>>> tokenizer = open_tokenizer(folder)
>>> network = open_model("encoder", folder)          # weights of safetensors files
>>> network = build_model("encoder", open_config(folder))    # random weights

A folder is data. Code of its own (``auto_map``) runs only where ``own_code`` says that spec and
command line both allow it, which they can for the edited model alone. The library is always told
so: left unsaid, it asks on the terminal, and takes a ``y`` that comes through a pipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workers.failures import is_transient

if TYPE_CHECKING:
    import torch

Kind = Literal["causal", "encoder"]
"""``causal``: a language model with its head. ``encoder``: a model without one."""


OWN_CODE = (
    "it needs code of its own (auto_map), which runs only for the edited model, and only if the spec "
    "(model.trust_remote_code: true) and the command line (--trust-remote-code) both allow it"
)


def open_config(folder: Path, own_code: bool = False) -> Any:
    """The config of a model's folder. Raises ``OSError`` or ``ValueError``."""
    from transformers import AutoConfig

    config = _reading(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=own_code))
    check_attention(config)
    return config


def open_tokenizer(folder: Path, own_code: bool = False) -> Any:
    """The tokenizer of a folder. Raises ``OSError`` or ``ValueError``."""
    from transformers import AutoTokenizer

    return _reading(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code))


def open_model(kind: Kind, folder: Path, own_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The model of a folder with its weights, which are safetensors: a pickled file is never read.
    ``dtype``: None is the one the weights are stored in. Raises ``OSError`` or ``ValueError``."""
    open_config(folder, own_code)  # refuses what the library would follow
    options = {} if dtype is None else {"dtype": dtype}
    return _reading(
        lambda: _class(kind).from_pretrained(
            folder, use_safetensors=True, trust_remote_code=own_code, **options
        )
    )


def build_model(kind: Kind, config: Any, own_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """A model of a config with new weights, drawn from torch's global generator. Raises ``OSError``
    or ``ValueError``."""
    check_attention(config)
    options = {} if dtype is None else {"dtype": dtype}
    return _reading(lambda: _class(kind).from_config(config, trust_remote_code=own_code, **options))


def loads(kind: Kind, config: Any) -> bool:
    """Return whether the library has a model of this kind for a config."""
    return type(config) in _class(kind)._model_mapping and not config.is_encoder_decoder


def _class(kind: Kind) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return {"causal": AutoModelForCausalLM, "encoder": AutoModel}[kind]


def check_attention(config: Any) -> None:
    """Raise ``ValueError`` if a config asks for an implementation of attention, or of experts, that
    the library would fetch from the hub, where it is a program: ``org/repo``, or a name for which it
    takes such a program when the package is not installed."""
    valid = _implementations()
    for name, value in _asked(config):
        if value is not None and value not in valid:
            raise ValueError(
                f"config.json: {name}: {value!r} is not valid, because it may be a program that is fetched "
                f"from the hub; choose {', '.join(valid)}, or remove it"
            )


def _asked(config: Any) -> Iterator[tuple[str, object]]:
    """The implementations that a config and the configs inside it ask for, by key."""
    for name in ("attn_implementation", "experts_implementation"):
        asked = getattr(config, f"_{name}", None)
        for value in asked.values() if isinstance(asked, dict) else (asked,):
            yield name, value
    for key in getattr(config, "sub_configs", None) or ():
        if (inner := getattr(config, key, None)) is not None:
            yield from _asked(inner)


def _implementations() -> tuple[str, ...]:
    """The implementations of attention and experts that are installed here."""
    valid = ["eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"]
    return (*valid, "flash_attention_2") if find_spec("flash_attn") else tuple(valid)


def _reading(load: Callable[[], Any]) -> Any:
    """Call ``load``. Whatever a library raises over a folder's files becomes a ``ValueError``, but for
    what may pass."""
    try:
        return load()
    except ValueError as error:
        if "trust_remote_code" in str(error):  # the library's own argument, which no user gives
            raise ValueError(OWN_CODE) from error
        raise
    except Exception as error:
        if is_transient(error):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error
