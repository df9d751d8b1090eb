"""Reading of the public EasyEdit hyperparameter files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from workers.inputs import found, kind_of, parse_yaml, read_text
from workers.types import JSON, SpecError

IGNORED = ""
"""In ``easyedit_keys``: no number depends on the key (a path, a log setting, what nobody reads); it
is left aside and named among those that are."""

SWEEP_KEYS = ("batch_size", "use_chat_template", "fp16", "half", "model_parallel")
"""Keys for what a sweep says outside ``hparams``: the planner compares both."""


@dataclass(frozen=True)
class FileRemarks:
    """The keys of an EasyEdit file that do not become hyperparameters."""

    sweep: Mapping[str, JSON] = field(default_factory=dict)
    """Those that have to agree with the sweep, and ``v_loss_layer``, with its model."""
    lost: Mapping[str, tuple[JSON, str]] = field(default_factory=dict)
    """Those that change numbers there and not here, each with its value and the reason."""
    neutral: tuple[str, ...] = ()
    """Those that no number depends on."""

    def within(self, name: str) -> FileRemarks:
        """The same of a file that another one names; ``name`` says where it lies."""
        return FileRemarks(
            self.sweep, {f"{name}: {key}": value for key, value in self.lost.items()}, self.neutral
        )

    def __or__(self, other: FileRemarks) -> FileRemarks:
        return FileRemarks(
            {**self.sweep, **other.sweep},
            {**self.lost, **other.lost},
            tuple(dict.fromkeys(self.neutral + other.neutral)),
        )


COMMON_KEYS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "alg_name",  # compared with the method
            "alg",  # the same in files for EasyEdit's trainer
            *SWEEP_KEYS,
            "model_name",
            "device",
            "stats_dir",
            "results_dir",
            "max_length",  # EasyEdit's text methods never read it, and nothing is truncated here
            "tokenizer_class",
            "tokenizer_name",
            "layer_module_tmp",  # module paths follow from the model type
            "mlp_module_tmp",
            "attn_module_tmp",
            "ln_f_module",
            "lm_head_module",
            "save_path",
        ),
        IGNORED,
    )
)

COMMON_LOST: Mapping[str, str] = MappingProxyType(
    {"load_path": "edits of an earlier run are not loaded: every group starts from the pristine model"}
)
"""Keys of any method's file that change numbers there and are not followed here, and why."""

TRAINER_LOST: Mapping[str, str] = MappingProxyType(
    {
        "archive": "no trained network is loaded: it is trained here, from the sweep's training data",
        "seed": "training draws from its own recipe",
        "max_epochs": "the length of the training is max_iters",
        "early_stop_patience": "training is never stopped early",
    }
)
"""Such keys of trained methods' files."""

TRAINER_OFF: Mapping[str, tuple[JSON, ...]] = MappingProxyType({"opt": ("Adam",)})
"""Keys of trained methods' files that are accepted with these values only."""

TRAINER_KEYS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            *(
                "model_class",
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
            *("val_batch_size", "val_steps", "early_stop_key"),
        ),
        IGNORED,
    )
)
"""Keys of trained methods' files for logging, saving, stopping and validation of the public
trainer."""

IMAGE_KEYS = ("coco_image", "rephrase_image")
"""Keys of files that edit models of images and text: where their pictures are."""

_MODULE = re.compile(r"^.*?[.\[](?P<layer>\{\}|\d+)\]?\.(?P<path>.+?)(\.weight)?$")


def split_module(name: JSON, source: str) -> tuple[int | None, str]:
    """``model.layers[4].mlp.down_proj.weight`` -> (4, "mlp.down_proj"); a template's ``{}`` gives
    None.

    Converts EasyEdit's module names into a layer index and a path inside a decoder layer. Raises
    :class:`SpecError`.
    """
    match = _MODULE.match(name) if isinstance(name, str) else None
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
        out["layer"], out["module"] = split_module(names[0], source)


def take_count(out: dict[str, JSON], key: str, default: int, source: str) -> int:
    """Remove a number of steps or requests from ``out`` and return it. Raises :class:`SpecError`."""
    value = out.pop(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"{source}: {key}: expected a whole number of at least 1, found {found(value)}")
    return value


_NAME = re.compile(r"[A-Za-z_]\w{0,60}")
"""What the name of a hyperparameter looks like. Other files are not shown: any may be named by
mistake."""


def read_hparams(path: Path) -> dict[str, JSON]:
    """The mapping of an EasyEdit YAML. Raises :class:`SpecError`, for a file of a model that reads
    images, too."""
    source = f"hparams_file: {path}"
    loaded = parse_yaml(read_text(path, source), source)
    if not isinstance(loaded, dict):
        raise SpecError(f"{source}: expected a mapping, found {kind_of(loaded)}")
    if not all(isinstance(key, str) and _NAME.fullmatch(key) for key in loaded):
        raise SpecError(f"{source}: expected a mapping of hyperparameters; its keys are no names")
    pictures = [key for key in IMAGE_KEYS if key in loaded]
    if pictures:
        raise SpecError(
            f"{source}: {pictures[0]}: the file is for a model of images and text; only language models are "
            "edited here"
        )
    return loaded
