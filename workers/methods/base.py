"""The interface of an editing method. One method, one file: its config, its mathematics, its
citation.

>>> editor = FT.prepare(base, FTConfig(layers=(3,)), inputs={})
>>> overlay = editor.new_overlay(lanes=2)
>>> outcomes = editor.edit(overlay, [LaneEdit((request_a,), draws_a), LaneEdit((request_b,), draws_b)])

A prepared method is immutable: whatever an edit changes lives in the overlay. All lanes edit in
lockstep, each its own requests; a lane's result does not depend on the lanes beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import torch
from pydantic import (
    AfterValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.pretrain import Trainer, TrainingSource
from workers.artifacts.stats import CorpusHashes
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


@dataclass(frozen=True)
class ArtifactContext:
    """Everything beside the hyperparameters that an artifact's recipe may depend on."""

    fingerprint: ModelFingerprint
    model: ModelConfig
    seed: int
    training: TrainingSource | None = None
    """The data that networks learn from, where a method has any."""
    corpora: CorpusHashes = field(default_factory=CorpusHashes)
    """Shared between contexts, so that a corpus is read once whatever the number of layers, seeds
    and methods."""

    @property
    def model_recipe(self) -> dict[str, JSON]:
        """The part of a recipe that names the base model."""
        return {
            "model": self.fingerprint.model,
            "tokenizer": self.fingerprint.tokenizer,
            "dtype": self.model.dtype,
        }


ADDED_LATER = "added later"
"""Marks a field that configs hashed before did not have: at its default it enters neither cell ids
nor random numbers."""


class Deviations(Frozen):
    """Single switches, each off by default, for what a method's public code does and its paper does
    not.

    They exist for parity tests. A user writes ``protocol: easyedit``, which turns on all of a
    method's.
    """


class MethodConfig(Frozen):
    """Hyperparameters of one method, and what follows from them without weights. Frozen, unknown
    keys refused.

    A config tells the planner what the method needs: arithmetic on the model's :class:`ModelShape`,
    no tensors.

    ``easyedit_keys`` maps keys of an EasyEdit hyperparameter YAML to ours (or to :data:`IGNORED`);
    keys of the same name and meaning need no entry. A key in neither place is refused with a clear
    error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    alg_names: ClassVar[tuple[str, ...]] = ()
    """Values of EasyEdit's ``alg_name`` this method answers to."""
    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType({})
    """Values that ``protocol: easyedit`` sets: for what EasyEdit's code does and its hyperparameter
    files do not say."""

    # --- deviations, and the written form ---

    @classmethod
    def switches(cls) -> tuple[str, ...]:
        """The names of the method's deviations; none if it has no field ``deviations``."""
        if "deviations" not in cls.model_fields:
            return ()
        group = cls.model_fields["deviations"].annotation
        return tuple(group.model_fields) if isinstance(group, type) and issubclass(group, Deviations) else ()

    @classmethod
    def nested(cls, values: Mapping[str, JSON]) -> dict[str, JSON]:
        """``values`` with single deviations moved into ``deviations``. Raises ValueError for one
        that stands in both places."""
        flat = [name for name in cls.switches() if name in values]
        group = values.get("deviations", {})
        if not flat or not isinstance(group, Mapping):
            return dict(values)
        for name in flat:
            if name in group:
                raise ValueError(f"{name}: given twice, alone and in deviations; remove one")
        rest = {key: value for key, value in values.items() if key not in flat}
        return {**rest, "deviations": {**group, **{name: values[name] for name in flat}}}

    @classmethod
    def merged(cls, low: Mapping[str, JSON], high: Mapping[str, JSON]) -> dict[str, JSON]:
        """Both, with the values of ``high`` where they differ; deviations are merged one by one."""
        low, high = cls.nested(low), cls.nested(high)
        out = {**low, **high}
        below, above = low.get("deviations"), high.get("deviations")
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            out["deviations"] = {**below, **above}
        return out

    @classmethod
    def like_easyedit(cls, values: Mapping[str, JSON]) -> dict[str, JSON]:
        """``values`` completed by :attr:`easyedit_values` where they say nothing."""
        return cls.merged(cls.easyedit_values, values)

    @model_validator(mode="before")
    @classmethod
    def _accept_flat(cls, values: Any) -> Any:
        """Version 0.1 had the deviations among the hyperparameters: its specs and manifests stay
        valid."""
        return cls.nested(values) if isinstance(values, Mapping) else values

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, JSON]:
        """Deviations stand among the hyperparameters: cell ids, manifests and random numbers derive
        from this form.

        Fields that were :data:`ADDED_LATER` are left out at their default, so that ids of earlier
        versions stay.
        """
        written: dict[str, JSON] = {}
        for name, value in _without_added(self, handler(self)).items():
            group = getattr(self, name, None)
            written.update(_without_added(group, value) if isinstance(group, Deviations) else {name: value})
        return written

    @classmethod
    def from_easyedit(cls, values: Mapping[str, JSON], source: str) -> dict[str, JSON]:
        """Translate the mapping of an EasyEdit YAML into our hyperparameters. Raises
        :class:`SpecError`.

        Subclasses override to convert values; they call this for the keys.
        """
        alg = values.get("alg_name")
        if alg is not None and alg not in cls.alg_names:
            raise SpecError(
                f"{source}: alg_name: {alg!r} is another method; expected {' or '.join(cls.alg_names)}"
            )
        table = {**COMMON_KEYS, **cls.easyedit_keys}
        out: dict[str, JSON] = {}
        for key, value in values.items():
            ours = table.get(key, key if key in (*cls.model_fields, *cls.switches()) else None)
            if ours is None:
                known = sorted({*table, *cls.model_fields})
                raise SpecError(
                    f"{source}: {key}: has no meaning for this method (value {value!r}); known: "
                    f"{', '.join(known)}"
                )
            if ours != IGNORED:
                out[ours] = value
        return out

    # --- the planner's questions ---

    def check(self, shape: ModelShape) -> None:
        """Raise :class:`SpecError` where the config does not fit the model (layer index, module
        name)."""

    def check_edits(self, shape: ModelShape, edits: int) -> None:
        """Raise :class:`SpecError` where one lane cannot hold so many edits between two
        rollbacks."""

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        """The artifacts to build before an edit, each under its own name."""
        return ()

    @property
    def uses_seed(self) -> bool:
        """False if two seeds differ in nothing but the order of the requests."""
        return False

    @property
    def reads_subject(self) -> bool:
        """True if the place of the subject's tokens in the prompt changes the edit."""
        return False

    @property
    def first_layer(self) -> int:
        """The lowest decoder layer with an edited map: an edit's steps run from there on. 0, the
        dearest, if there is none."""
        return 0

    @property
    def rows_per_edit(self) -> int:
        """Sequences of one request in an optimisation step: its prompt, one more for locality, and
        one per context template."""
        return 2

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        """Estimated bytes of one lane after ``edits`` edits, optimiser state included."""
        return 0

    def shared_bytes(self, shape: ModelShape) -> int:
        """Estimated bytes that all lanes share beside the base: artifacts, and what
        :meth:`Method.prepare` makes of them."""
        return 0


def _without_added(model: Frozen, written: Mapping[str, JSON]) -> dict[str, JSON]:
    fields = type(model).model_fields
    at_default = {
        name
        for name, field in fields.items()
        if ADDED_LATER in field.metadata
        and getattr(model, name) == field.get_default(call_default_factory=True)
    }
    return {name: value for name, value in written.items() if name not in at_default}


@dataclass(frozen=True)
class LaneEdit:
    """One lane's part of one call: its requests (``batch_size`` of them) and the random numbers it
    may use."""

    requests: tuple[EditRequest, ...]
    streams: RandomStreams
    inputs: Mapping[str, ArtifactData] = field(default_factory=dict)
    """The artifacts of the lane's own cell, by the name the method gave them (they may differ by
    seed)."""


@dataclass(frozen=True)
class EditOutcome:
    """Result of one lane's edit. A loss that is not finite fails the lane (and only it)."""

    iterations: int
    loss: float | None
    details: dict[str, JSON] = field(default_factory=dict)


C = TypeVar("C", bound=MethodConfig)
OverlayT = TypeVar("OverlayT", bound=Overlay)


class Method(ABC, Generic[C, OverlayT]):
    """An editing method. Class attributes describe it; an instance is one prepared for a base model
    and a config.

    ``C`` is its config and ``OverlayT`` the overlay that it edits: the one that :meth:`new_overlay`
    makes, and no other.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int]
    """Raise when the numbers a given config produces change: it enters every cell id."""
    needs_pretraining: ClassVar[bool] = False
    batch_edits: ClassVar[bool] = False
    """True if several requests can be edited in one call."""
    whole_group: ClassVar[bool] = False
    """True if a call always edits all T requests of a group (then there is nothing between the
    first and the last)."""
    relative_cost: ClassVar[float] = 1.0
    """Rough seconds per edit relative to FT, for ordering shards before anything was measured."""
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> None:
        self.base = base
        self.config = config
        self.inputs = inputs

    @classmethod
    def prepare(cls, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> Self:
        """Make everything that edits share. ``inputs`` holds, by name, what
        :meth:`MethodConfig.artifacts` asked for."""
        return cls(base, config, inputs)

    @abstractmethod
    def new_overlay(self, lanes: int) -> OverlayT:
        """A pristine overlay. Dropping it is the rollback."""

    @abstractmethod
    def edit(self, overlay: OverlayT, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        """Edit each lane's requests into its lane, in place; ``edits[i]`` belongs to lane i."""

    # --- without an instance ---

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        """Hyperparameters for the embedded model, chosen on its tuning split."""
        return {}

    @classmethod
    def embedded_for(cls, hparams: Mapping[str, JSON]) -> dict[str, JSON]:
        """The same, where it depends on what a sweep asks for (``hparams``, which override it)."""
        return cls.embedded()

    @classmethod
    def trainer(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> Trainer:
        """An untrained trainer, for methods that ask for
        :func:`workers.artifacts.pretrain.pretrained` with these ``hparams``.

        ``generator`` is for its initial weights.
        """
        raise NotImplementedError(f"{cls.name} trains nothing")


def as_float(loss: Tensor) -> float:
    """A scalar tensor as a Python float."""
    return float(loss.detach().to(torch.float64))
