"""What an editing method is. One method, one file: its config, its mathematics, its citation.

>>> editor = FT.prepare(base, FTConfig(layers=(3,)), inputs={})
>>> overlay = editor.new_overlay(lanes=2)
>>> outcomes = editor.edit(overlay, [LaneEdit((request_a,), draws_a), LaneEdit((request_b,), draws_b)])

A prepared method is immutable: whatever an edit changes lives in the overlay. All lanes edit in lockstep, each its own
requests; a lane's result does not depend on the lanes beside it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import torch
from pydantic import AfterValidator, ConfigDict
from torch import Tensor

from workers.artifacts import ArtifactData, ArtifactSpec
from workers.job import Frozen
from workers.model.base import BaseModel
from workers.model.config import ModelConfig, ModelFingerprint, ModelShape
from workers.model.overlay import Overlay
from workers.pretrain import Trainer, TrainingSource
from workers.rng import Draws
from workers.types import JSON, EditRequest, SpecError


def _distinct(layers: tuple[int, ...]) -> tuple[int, ...]:
    if layers and (min(layers) < 0 or len(set(layers)) < len(layers)):
        raise ValueError("layers must be distinct and not negative")
    return layers


Layers = Annotated[tuple[int, ...], AfterValidator(_distinct)]
"""Decoder layers, each once, in any order."""

IGNORED = ""
"""In ``easyedit_keys``: the key carries no information for us (a file path, a log setting) and is dropped."""


class MethodConfig(Frozen):
    """Hyperparameters of one method. Frozen, unknown keys refused.

    ``easyedit_keys`` maps keys of an EasyEdit hyperparameter YAML to ours (or to :data:`IGNORED`); keys of the same name
    and meaning need no entry. A key in neither place is refused with a clear error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    alg_names: ClassVar[tuple[str, ...]] = ()
    """Values of EasyEdit's ``alg_name`` this method answers to."""

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        """Translate the mapping of an EasyEdit YAML into our hyperparameters. Raises :class:`SpecError`.

        Subclasses override to convert values; they call this for the keys.
        """
        alg = values.get("alg_name")
        if alg is not None and alg not in cls.alg_names:
            raise SpecError(f"{source}: alg_name: {alg!r} is another method; expected {' or '.join(cls.alg_names)}")
        table = {**_EASYEDIT_COMMON, **cls.easyedit_keys}
        out: dict[str, JSON] = {}
        for key, value in values.items():
            ours = table.get(key, key if key in cls.model_fields else None)
            if ours is None:
                known = sorted({*table, *cls.model_fields})
                raise SpecError(
                    f"{source}: {key}: has no meaning for this method (value {value!r}); known: {', '.join(known)}"
                )
            if ours != IGNORED:
                out[ours] = value
        return out


_EASYEDIT_COMMON: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "alg_name",
            "model_name",
            "device",
            "model_parallel",
            "stats_dir",
            "results_dir",
            "batch_size",  # the sweep's grid says how many requests are edited at once
            "max_length",  # nothing is truncated here
            "use_chat_template",  # the model section of a sweep says it
            "fp16",
            "tokenizer_class",
            "tokenizer_name",
            "layer_module_tmp",  # where a model's parts are is known from its type
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
            *("archive", "model_class", "alg", "opt", "seed", "half", "max_epochs", "model_save_pt", "save", "silent"),
            *("verbose", "debug", "eval_only", "final_eval", "log_interval", "eval_log_interval", "val_interval"),
            *("val_batch_size", "val_steps", "early_stop_patience", "early_stop_key"),
        ),
        IGNORED,
    )
)
"""Keys of trained methods' files that say how the public trainer logs, saves, stops and validates."""

_MODULE = re.compile(r"^.*?[.\[](?P<layer>\{\}|\d+)\]?\.(?P<path>.+?)(\.weight)?$")


def split_module(name: str, source: str) -> tuple[int | None, str]:
    """``model.layers[4].mlp.down_proj.weight`` -> (4, "mlp.down_proj"); a template's ``{}`` gives None.

    This is how EasyEdit's module names become a layer index and a path inside a decoder layer.
    """
    match = _MODULE.match(name)
    if match is None:
        raise SpecError(
            f"{source}: {name!r} is not a module inside a decoder layer such as 'model.layers[4].mlp.down_proj.weight'"
        )
    layer = match["layer"]
    return (None if layer == "{}" else int(layer)), match["path"]


def take_inner_param(out: dict[str, JSON], source: str) -> None:
    """``inner_params`` of methods that edit one map, which ``easyedit_keys`` call ``module``: made ``layer`` and ``module``."""
    if "module" in out:
        names = out["module"]
        if not isinstance(names, list) or len(names) != 1:
            raise SpecError(f"{source}: inner_params: expected a list with one module name, found {names!r}")
        out["layer"], out["module"] = split_module(str(names[0]), source)


@dataclass(frozen=True)
class LaneEdit:
    """What one lane edits in one call: its requests (``batch_size`` of them) and the random numbers it may use."""

    requests: tuple[EditRequest, ...]
    draws: Draws
    inputs: Mapping[str, ArtifactData] = field(default_factory=dict)
    """The artifacts of the lane's own cell, by the name the method gave them (they may differ by seed)."""


@dataclass(frozen=True)
class EditOutcome:
    """How one lane's edit went. A loss that is not finite fails the lane (and only it)."""

    iterations: int
    loss: float | None
    details: dict[str, JSON] = field(default_factory=dict)


C = TypeVar("C", bound=MethodConfig)


class Method(ABC, Generic[C]):
    """An editing method. Class attributes describe it; an instance is one prepared for a base model and a config."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int]
    """Raise when the numbers a given config produces change: it enters every cell id."""
    needs_pretraining: ClassVar[bool] = False
    batch_edits: ClassVar[bool] = False
    """Whether several requests can be edited in one call."""
    whole_group: ClassVar[bool] = False
    """Whether a call always edits all T requests of a group (then there is nothing between the first and the last)."""
    relative_cost: ClassVar[float] = 1.0
    """Rough seconds per edit relative to FT, for ordering shards before anything was measured."""
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> None:
        self.base = base
        self.config = config
        self.inputs = inputs

    @classmethod
    def prepare(cls, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> Self:
        """Make everything that edits share. ``inputs`` holds, by name, what :meth:`artifacts` asked for."""
        return cls(base, config, inputs)

    @abstractmethod
    def new_overlay(self, lanes: int) -> Overlay:
        """A pristine overlay. Dropping it is the rollback."""

    @abstractmethod
    def edit(self, overlay: Overlay, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        """Edit each lane's requests into its lane, in place; ``edits[i]`` belongs to lane i."""

    # --- what the planner asks, without weights ---

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        """Hyperparameters for the embedded model, chosen on its tuning split."""
        return {}

    @classmethod
    def embedded_for(cls, hparams: Mapping[str, JSON]) -> dict[str, JSON]:
        """The same, where it depends on what a sweep asks for (``hparams``, which override it)."""
        return cls.embedded()

    @classmethod
    def check(cls, config: Any, shape: ModelShape) -> None:
        """Raise :class:`SpecError` where the config does not fit the model (layer index, module name)."""

    @classmethod
    def check_edits(cls, config: Any, shape: ModelShape, edits: int) -> None:
        """Raise :class:`SpecError` where one lane cannot hold so many edits between two rollbacks."""

    @classmethod
    def artifacts(
        cls,
        config: Any,
        fingerprint: ModelFingerprint,
        model: ModelConfig,
        seed: int,
        training: TrainingSource | None = None,
    ) -> tuple[ArtifactSpec, ...]:
        """What must be built before an edit, each under its own name. ``training`` is where networks are to learn."""
        return ()

    @classmethod
    def trainer(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> Trainer:
        """An untrained trainer, for methods that ask for :func:`workers.pretrain.pretrained` with these ``hparams``.

        ``generator`` is for its initial weights.
        """
        raise NotImplementedError(f"{cls.name} trains nothing")

    @classmethod
    def uses_seed(cls, config: Any) -> bool:
        """False if two seeds differ in nothing but the order of the requests."""
        return False

    @classmethod
    def overlay_bytes(cls, config: Any, shape: ModelShape, edits: int) -> int:
        """Estimated bytes of one lane after ``edits`` edits, optimiser state included."""
        return 0

    @classmethod
    def shared_bytes(cls, config: Any, shape: ModelShape) -> int:
        """Estimated bytes that all lanes share beside the base: artifacts, and what :meth:`prepare` makes of them."""
        return 0


def as_float(loss: Tensor) -> float:
    """A scalar tensor as a Python float."""
    return float(loss.detach().to(torch.float64))
