"""The interface of an editing method. One method, one file: its config, its mathematics, its
citation.

>>> editor = FT.prepare(base, FTConfig(layers=(3,)), inputs={})
>>> overlay = editor.new_overlay(lanes=2)
>>> outcomes = editor.edit(overlay, [LaneEdit((request_a,), draws_a), LaneEdit((request_b,), draws_b)])

A prepared method is immutable: everything an edit changes is in the overlay. All lanes edit in
lockstep, each its own requests; a lane's result does not depend on the other lanes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import torch
from pydantic import (
    AfterValidator,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor

from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.pretrain import Trainer, TrainingSource
from workers.artifacts.stats import CorpusHashes
from workers.data.needs import Need
from workers.methods.easyedit import COMMON_KEYS, COMMON_LOST, IGNORED, SWEEP_KEYS, FileRemarks
from workers.model.base import BaseModel
from workers.model.batch import Encoder
from workers.model.config import EMBEDDED, ModelConfig, ModelFingerprint, ModelShape
from workers.model.overlay import Overlay
from workers.rng import RandomStreams
from workers.types import JSON, EditRequest, Frozen, SpecError, Written

MOST_STEPS = 1_000_000
"""Optimiser steps of one edit at most: more are a slip of the pen and would never end."""


def _distinct(layers: tuple[int, ...]) -> tuple[int, ...]:
    if layers and (min(layers) < 0 or len(set(layers)) < len(layers)):
        raise ValueError("layers must be distinct and not negative")
    return layers


Layers = Annotated[tuple[int, ...], AfterValidator(_distinct)]
"""Distinct decoder layers, in any order."""


@dataclass(frozen=True)
class ArtifactContext:
    """Everything except the hyperparameters that an artifact's recipe may depend on."""

    fingerprint: ModelFingerprint
    model: ModelConfig
    seed: int
    training: TrainingSource | None = None
    """The training data of methods with trained networks."""
    corpora: CorpusHashes = field(default_factory=CorpusHashes)
    """Shared between contexts, so that a corpus is read once for all layers, seeds and methods."""

    @property
    def model_recipe(self) -> dict[str, JSON]:
        """The part of a recipe that names the base model."""
        return {
            "model": self.fingerprint.model,
            "tokenizer": self.fingerprint.tokenizer,
            "dtype": self.model.dtype,
        }


ADDED_LATER = "added later"
"""Marks a field that earlier versions did not have: at its default it enters neither cell ids nor
random numbers."""


class Deviations(Written):
    """Switches, off by default, for single deviations of a method's public code from its paper.

    They exist for parity tests. Users write ``protocol: easyedit``, which turns on all switches of
    a method.
    """


class MethodConfig(Written):
    """Hyperparameters of one method, and what the planner needs to know about them. Frozen, rejects
    unknown keys.

    The methods for the planner are arithmetic on the model's :class:`ModelShape`, without tensors.

    ``easyedit_keys`` maps keys of an EasyEdit hyperparameter YAML to ours (or to :data:`IGNORED`);
    keys of the same name and meaning need no entry. ``easyedit_off`` holds keys that are accepted
    with some values only, ``easyedit_lost`` those whose value changes numbers there and not here,
    with the reason. A key in no such place is refused with a clear error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    easyedit_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    easyedit_off: ClassVar[Mapping[str, tuple[JSON, ...]]] = MappingProxyType({})
    easyedit_lost: ClassVar[Mapping[str, str]] = MappingProxyType({})
    easyedit_required: ClassVar[Mapping[str, tuple[str, str]]] = MappingProxyType({})
    """Hyperparameters that a file has to give, since layouts of files differ where it is silent:
    the key there, and how to choose."""
    alg_names: ClassVar[tuple[str, ...]] = ()
    """Values of EasyEdit's ``alg_name`` for this method."""
    easyedit_values: ClassVar[Mapping[str, JSON]] = MappingProxyType({})
    """Values that ``protocol: easyedit`` sets: behaviour of EasyEdit's code that is not in its
    hyperparameter files."""

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

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
        that is in both places."""
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
        """Both mappings; where they differ, ``high`` wins. Deviations are merged one by one."""
        low, high = cls.nested(low), cls.nested(high)
        out = {**low, **high}
        below, above = low.get("deviations"), high.get("deviations")
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            out["deviations"] = {**below, **above}
        return out

    @classmethod
    def like_easyedit(cls, values: Mapping[str, JSON]) -> dict[str, JSON]:
        """``values``, with :attr:`easyedit_values` for missing keys."""
        return cls.merged(cls.easyedit_values, values)

    @model_validator(mode="before")
    @classmethod
    def _accept_flat(cls, values: Any) -> Any:
        """Accept deviations among the hyperparameters, as in specs and manifests of version 0.1."""
        return cls.nested(values) if isinstance(values, Mapping) else values

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, JSON]:
        """Write deviations among the hyperparameters: the form for cell ids, manifests and random
        numbers.

        Fields that are :data:`ADDED_LATER` are left out at their default, so that ids of earlier
        versions stay valid.
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

        Subclasses override it to convert values, and call this one for the keys.
        """
        cls.check_alg(values, source)
        for key, allowed in cls.easyedit_off.items():
            if key in values and values[key] not in allowed:
                raise SpecError(f"{source}: {key}: {values[key]!r} is not supported; choices: {allowed[0]!r}")
        table = cls._easyedit_table()
        out: dict[str, JSON] = {}
        for key, value in values.items():
            ours = table.get(key, key if key in (*cls.model_fields, *cls.switches()) else None)
            if ours is None:
                known = sorted({*table, *cls.model_fields})
                raise SpecError(f"{source}: {key}: has no meaning for this method; known: {', '.join(known)}")
            if ours != IGNORED:
                out[ours] = value
        return out

    @classmethod
    def check_alg(cls, values: Mapping[str, JSON], source: str) -> None:
        """Raise :class:`SpecError` where a file says that it is for another method."""
        for key in ("alg_name", "alg"):
            alg = values.get(key)
            if alg is not None and alg not in cls.alg_names:
                expected = (
                    f"expected {' or '.join(cls.alg_names)}" if cls.alg_names else "this one has no files"
                )
                raise SpecError(f"{source}: {key}: {alg!r} is another method; {expected}")

    @classmethod
    def merged_with_file(cls, values: Mapping[str, JSON], hparams: Mapping[str, JSON]) -> dict[str, JSON]:
        """The translated ``values`` of a file, and ``hparams`` where they differ."""
        return cls.merged(values, hparams)

    @classmethod
    def check_complete(cls, values: Mapping[str, JSON], source: str) -> None:
        """Raise :class:`SpecError` if ``values`` lack a hyperparameter that a file has to give
        because layouts of files disagree on it."""
        for ours, (theirs, how) in cls.easyedit_required.items():
            if ours not in values:
                raise SpecError(f"{source}: {theirs}: the file does not say it; {how}")

    @classmethod
    def easyedit_remarks(cls, values: Mapping[str, JSON], source: str) -> FileRemarks:
        """The keys of an EasyEdit file (which :meth:`from_easyedit` has accepted) that did not become
        hyperparameters."""
        lost = {**COMMON_LOST, **cls.easyedit_lost}
        if "alg" in values and "alg_name" not in values and values.get("batch_size") != 1:
            lost["batch_size"] = "requests of one forward in EasyEdit's trainer"
        own = (*lost, *cls.easyedit_keys)  # of another meaning in this method's files
        sweep = {key: value for key, value in values.items() if key in SWEEP_KEYS and key not in own}
        if "v_loss_layer" in lost and "v_loss_layer" in values:
            sweep["v_loss_layer"] = values["v_loss_layer"]
        return FileRemarks(
            {key: value for key, value in sweep.items() if value is not None},
            {
                key: (value, lost[key])
                for key, value in values.items()
                if key in lost and key != "v_loss_layer" and value is not None and value is not False
            },
            tuple(
                key
                for key in values
                if key not in sweep and key not in lost and cls._easyedit_table().get(key) == IGNORED
                if key not in ("alg_name", "alg") and key not in cls.easyedit_off
            ),
        )

    @classmethod
    def _easyedit_table(cls) -> dict[str, str]:
        """All keys of a file: what each is here."""
        aside = dict.fromkeys((*COMMON_LOST, *cls.easyedit_lost, *cls.easyedit_off), IGNORED)
        return {**COMMON_KEYS, **aside, **cls.easyedit_keys}

    # --- for the planner ---

    def check(self, shape: ModelShape) -> None:
        """Raise :class:`SpecError` if the config does not fit the model (layer index, module
        name)."""

    def check_edits(self, shape: ModelShape, edits: int) -> None:
        """Raise :class:`SpecError` if one lane cannot hold ``edits`` edits between two
        rollbacks."""

    def artifacts(self, context: ArtifactContext) -> tuple[ArtifactSpec, ...]:
        """The artifacts to build before an edit, each under its own name."""
        return ()

    @property
    def needs(self) -> tuple[Need, ...]:
        """The parts of a request that an edit cannot do without."""
        return ()

    @property
    def training_needs(self) -> tuple[Need, ...]:
        """The same, of a request that networks are trained on."""
        return ()

    @property
    def networks(self) -> Mapping[str, str]:
        """The further models that the method reads: hyperparameter -> folder or hub name."""
        return {}

    @property
    def files(self) -> Mapping[str, str]:
        """The files that its artifacts are made from: hyperparameter -> path, as it is written."""
        corpus = getattr(self, "corpus", None)
        read = isinstance(corpus, str) and corpus != EMBEDDED and self.reads_corpus(dict(self))
        return {"corpus": str(corpus)} if read else {}

    def check_networks(self, encoder: Encoder) -> Iterator[str]:
        """What is wrong with the folders of :attr:`networks`, each text with its field. ``encoder``:
        the base model's."""
        return iter(())

    def token_needs(self, encoder: Encoder, shape: ModelShape) -> tuple[Need, ...]:
        """Like :attr:`needs`, for parts of a request whose tokens have to be counted."""
        return ()

    def before(self, requests: Sequence[EditRequest]) -> str:
        """The text that stands before every prompt once these requests of a group are edited."""
        return ""

    @property
    def template_tokens(self) -> int:
        """Tokens of the longest context template before a prompt; 0 without templates."""
        return 0

    @classmethod
    def reads_corpus(cls, hparams: Mapping[str, JSON]) -> bool:
        """Return whether artifacts are made from ``corpus``, with these hyperparameters."""
        return False

    def located(self, places: Mapping[str, str]) -> Self:
        """A copy that finds its :attr:`files` and :attr:`networks` elsewhere than they are written
        (``places``: hyperparameter -> path). It is equal in everything that is written."""
        copy = self.model_copy()
        copy._places = dict(places)
        return copy

    def place(self, field: str) -> Any:
        """Where the file or the folder of a hyperparameter lies; None if none is given."""
        written = {**self.files, **self.networks}
        return self._places.get(field, written.get(field, getattr(self, field, None)))

    @property
    def uses_seed(self) -> bool:
        """False if two seeds differ only in the order of the requests."""
        return False

    @property
    def reads_subject(self) -> bool:
        """True if the place of the subject's tokens in the prompt changes the edit."""
        return False

    @property
    def first_layer(self) -> int:
        """The lowest decoder layer with an edited map: an edit's steps run the layers from there
        on. 0, the most expensive case, if there is none."""
        return 0

    @property
    def rows_per_edit(self) -> int:
        """Rows of one request in an optimisation step: its prompt, one for locality, and one per
        context template."""
        return 2

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        """Estimated bytes of one lane after ``edits`` edits, optimiser state included."""
        return 0

    def shared_bytes(self, shape: ModelShape) -> int:
        """Estimated bytes shared by all lanes, without the base: artifacts, and what
        :meth:`Method.prepare` computes from them."""
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
    """One lane's input of one edit call: its requests (``batch_size`` of them) and its random
    numbers."""

    requests: tuple[EditRequest, ...]
    streams: RandomStreams
    inputs: Mapping[str, ArtifactData] = field(default_factory=dict)
    """The artifacts of the lane's cell, by the method's names (they may differ by seed)."""


@dataclass(frozen=True)
class EditOutcome:
    """Result of one lane's edit. A non-finite loss fails this lane only."""

    iterations: int
    loss: float | None
    details: dict[str, JSON] = field(default_factory=dict)


C = TypeVar("C", bound=MethodConfig)
OverlayT = TypeVar("OverlayT", bound=Overlay)


class Method(ABC, Generic[C, OverlayT]):
    """An editing method. Class attributes describe it; an instance is one prepared for a base model
    and a config.

    ``C`` is its config, ``OverlayT`` the overlay class that :meth:`new_overlay` returns and
    :meth:`edit` takes.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int]
    """Increase it when the numbers of a given config change: it is part of every cell id."""
    needs_pretraining: ClassVar[bool] = False
    batch_edits: ClassVar[bool] = False
    """True if several requests can be edited in one call."""
    whole_group: ClassVar[bool] = False
    """True if a call always edits all T requests of a group (then no state exists between two
    edits)."""
    no_chat: ClassVar[str] = ""
    """Why prompts cannot be in a chat template; empty if they can."""
    relative_cost: ClassVar[float] = 1.0
    """Approximate time per edit relative to FT, for ordering shards before times are measured."""
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> None:
        if base.encoder.chat_template:
            self.check_chat()
        self.base = base
        self.config = config
        self.inputs = inputs

    @classmethod
    def check_chat(cls) -> None:
        """Raise :class:`SpecError` if prompts cannot be in a chat template."""
        if cls.no_chat:
            raise SpecError(f"chat_template: true is not supported by {cls.name}: {cls.no_chat}")

    @classmethod
    def prepare(cls, base: BaseModel, config: C, inputs: Mapping[str, ArtifactData]) -> Self:
        """Compute what all edits share. ``inputs``: the artifacts of
        :meth:`MethodConfig.artifacts`, by name."""
        return cls(base, config, inputs)

    @abstractmethod
    def new_overlay(self, lanes: int) -> OverlayT:
        """Make a pristine overlay. Rollback means to drop the overlay."""

    @abstractmethod
    def edit(self, overlay: OverlayT, edits: Sequence[LaneEdit]) -> list[EditOutcome]:
        """Apply each lane's requests to its lane, in place; ``edits[i]`` belongs to lane i."""

    # --- without an instance ---

    @classmethod
    def embedded(cls) -> dict[str, JSON]:
        """Hyperparameters for the embedded model, chosen on its tuning split."""
        return {}

    @classmethod
    def embedded_for(cls, hparams: Mapping[str, JSON]) -> dict[str, JSON]:
        """The same, if it depends on the hyperparameters of a sweep (``hparams``, which override
        it)."""
        return cls.embedded()

    @classmethod
    def trainer(cls, base: BaseModel, hparams: Mapping[str, JSON], generator: torch.Generator) -> Trainer:
        """An untrained trainer, for methods with pretrained networks
        (:mod:`workers.artifacts.pretrain`).

        ``generator``: for the initial weights.
        """
        raise NotImplementedError(f"{cls.name} trains nothing")


def as_float(loss: Tensor) -> float:
    """A scalar tensor as a Python float."""
    return float(loss.detach().to(torch.float64))
