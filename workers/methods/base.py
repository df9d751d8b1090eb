"""What an editing method is. One method, one file: its config, its mathematics, its citation.

>>> editor = FT.prepare(base, FTConfig(layers=(3,)), inputs={})
>>> overlay = editor.new_overlay(lanes=2)
>>> outcomes = editor.edit(overlay, [LaneEdit((request_a,), draws_a), LaneEdit((request_b,), draws_b)])

A prepared method is immutable: whatever an edit changes lives in the overlay. All lanes edit in lockstep, each its own
requests; a lane's result does not depend on the lanes beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import torch
from pydantic import AfterValidator, ConfigDict
from torch import Tensor

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.pretrain import Trainer, TrainingSource
from workers.methods.easyedit import COMMON_KEYS, IGNORED
from workers.model.base import BaseModel
from workers.model.config import ModelConfig, ModelFingerprint, ModelShape
from workers.model.overlay import Overlay
from workers.rng import RandomStreams
from workers.types import JSON, EditRequest, Frozen, SpecError


def _distinct(layers: tuple[int, ...]) -> tuple[int, ...]:
    if layers and (min(layers) < 0 or len(set(layers)) < len(layers)):
        raise ValueError("layers must be distinct and not negative")
    return layers


Layers = Annotated[tuple[int, ...], AfterValidator(_distinct)]
"""Decoder layers, each once, in any order."""


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
        table = {**COMMON_KEYS, **cls.easyedit_keys}
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


@dataclass(frozen=True)
class LaneEdit:
    """What one lane edits in one call: its requests (``batch_size`` of them) and the random numbers it may use."""

    requests: tuple[EditRequest, ...]
    streams: RandomStreams
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
        """An untrained trainer, for methods that ask for :func:`workers.artifacts.pretrain.pretrained` with these ``hparams``.

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
