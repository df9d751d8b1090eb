"""Reading of the public EasyEdit hyperparameter files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from workers.inputs import MAX_BYTES, parse_yaml
from workers.types import JSON, SpecError

IGNORED = ""
"""In ``easyedit_keys``: the key has no effect here (a file path, a log setting) and is dropped."""


COMMON_KEYS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "alg_name",
            "model_name",
            "device",
            "model_parallel",
            "stats_dir",
            "results_dir",
            "batch_size",  # set by the sweep's grid
            "max_length",  # nothing is truncated here
            "use_chat_template",  # set by the sweep's model section
            "fp16",
            "tokenizer_class",
            "tokenizer_name",
            "layer_module_tmp",  # module paths follow from the model type
            "mlp_module_tmp",
            "attn_module_tmp",
            "ln_f_module",
            "lm_head_module",
            "save_path",
            "load_path",
        ),
        IGNORED,
    )
)

TRAINER_KEYS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            *(
                "archive",
                "model_class",
                "alg",
                "opt",
                "seed",
                "half",
                "max_epochs",
                "model_save_pt",
                "save",
                "silent",
            ),
            *(
                "verbose",
                "debug",
                "eval_only",
                "final_eval",
                "log_interval",
                "eval_log_interval",
                "val_interval",
            ),
            *("val_batch_size", "val_steps", "early_stop_patience", "early_stop_key"),
        ),
        IGNORED,
    )
)
"""Keys of trained methods' files for logging, saving, stopping and validation of the public
trainer."""

_MODULE = re.compile(r"^.*?[.\[](?P<layer>\{\}|\d+)\]?\.(?P<path>.+?)(\.weight)?$")


def split_module(name: str, source: str) -> tuple[int | None, str]:
    """``model.layers[4].mlp.down_proj.weight`` -> (4, "mlp.down_proj"); a template's ``{}`` gives
    None.

    Converts EasyEdit's module names into a layer index and a path inside a decoder layer. Raises
    :class:`SpecError`.
    """
    match = _MODULE.match(name)
    if match is None:
        raise SpecError(
            f"{source}: {name!r} is not a module inside a decoder layer such as "
            f"'model.layers[4].mlp.down_proj.weight'"
        )
    layer = match["layer"]
    return (None if layer == "{}" else int(layer)), match["path"]


def take_inner_param(out: dict[str, JSON], source: str) -> None:
    """Split ``inner_params`` (renamed to ``module`` by ``easyedit_keys``) of a method that edits
    one map into ``layer`` and ``module``, in place."""
    if "module" in out:
        names = out["module"]
        if not isinstance(names, list) or len(names) != 1:
            raise SpecError(f"{source}: inner_params: expected a list with one module name, found {names!r}")
        out["layer"], out["module"] = split_module(str(names[0]), source)


def read_hparams(path: Path) -> dict[str, JSON]:
    """The mapping of an EasyEdit YAML. Raises :class:`SpecError`."""
    source = f"hparams_file: {path}"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpecError(f"{source}: larger than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{source}: cannot be read: {error}") from None
    loaded = parse_yaml(text, source)
    if not isinstance(loaded, dict):
        raise SpecError(f"{source}: expected a mapping, found {type(loaded).__name__}")
    return loaded
