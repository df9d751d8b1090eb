"""The pretraining stage: networks that learn to edit, trained once and shared as artifacts.

A method that needs it provides a :class:`Trainer` (its loss and its optimiser) and lists
:func:`pretrained` in its ``artifacts``. The stage provides the order of the requests, checkpoints,
progress and experience replay:

    def artifacts(self, context):               # of the config
        return (pretrained(name, hparams, self.schedule, context.fingerprint, context.model, context.training),)

    def trainer(cls, base, hparams, generator): ...      # an untrained Trainer
    inputs["pretrained"]                                 # at edit time: the trainer's ``product``

A training set is a sequence of data shards. Each gives an artifact of kind ``training`` (weights,
optimiser, replay buffer) that is built from the one before. So a new data shard continues from the
last one, and earlier shards are neither trained nor read again. On later shards a share of every
batch comes from the replay buffer: a uniform sample of all earlier requests, passed on from shard
to shard (experience replay; Rolnick et al., arXiv 1811.11682). Edits need only the artifact of kind
``pretrained``, built from the last one.

The bits of a step depend on the recipe, the step's number and the state before it, and not on the
times of checkpoints.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from workers.artifacts.base import ArtifactData, ArtifactSpec, Workbench
from workers.data import OnBadRecord, TargetField, fingerprint, load_training
from workers.data.scripts import joiner_mark
from workers.rng import canonical, derive_generator
from workers.types import JSON, DataError, EditRequest, Frozen, ModelError, Probe, SpecError, Written

if TYPE_CHECKING:
    from workers.model.base import BaseModel
    from workers.model.config import ModelConfig, ModelFingerprint

TRAINING = "training"
"""Kind of a trainer's state after a data shard."""

PRETRAINED = "pretrained"
"""Kind and usual name of the finished networks."""

_BEFORE = "before"
_STATE = "state"
_LOG_ENTRIES = 20


# --- training data --------------------------------------------------------------------------


class TrainingShard(Frozen):
    """Requests ``start .. stop`` (exclusive) of the training set, and the hash of their
    contents."""

    start: int
    stop: int
    fingerprint: str


class TrainingSource(Frozen):
    """The requests of a training set; a sweep never edits them."""

    kind: str
    path: str | None = None
    on_bad_record: OnBadRecord = "error"
    joiner: str | None = None
    target_field: TargetField | None = None
    shards: tuple[TrainingShard, ...]


def training_source(
    kind: str,
    path: Path | None = None,
    shards: Sequence[int] | None = None,
    on_bad_record: OnBadRecord = "error",
    joiner: str | None = None,
    target_field: TargetField | None = None,
) -> tuple[TrainingSource, tuple[EditRequest, ...]]:
    """A training set and its requests. ``shards``: requests per data shard; None: one shard with
    all.

    Raises :class:`SpecError` if the set is too small for the shards.
    """
    requests = load_training(kind, path, on_bad_record, joiner, target_field).requests
    sizes = list(shards) if shards else [len(requests)]
    if sum(sizes) > len(requests):
        raise SpecError(
            f"training.shards: {sizes} are {sum(sizes)} requests together, but the training set has "
            f"{len(requests)}"
        )
    cut, start = [], 0
    for size in sizes:
        part = requests[start : start + size]
        cut.append(TrainingShard(start=start, stop=start + size, fingerprint=_hash_of(part)))
        start += size
    source = TrainingSource(
        kind=kind,
        path=None if path is None else str(path),
        on_bad_record=on_bad_record,
        joiner=joiner,
        target_field=target_field,
        shards=tuple(cut),
    )
    return source, requests[:start]


def _hash_of(requests: Sequence[EditRequest]) -> str:
    """The hash of requests and of what joins their prompts and answers, where that is not a space
    everywhere."""
    mark = joiner_mark(requests)
    return fingerprint(requests) + (f"+{mark}" if mark else "")


# --- interface of a method ------------------------------------------------------------------


class TrainingSchedule(Written):
    """Length of a training, its batches, and the share of earlier data in them."""

    steps: int = Field(ge=1, le=100_000_000, description="optimiser steps on each data shard")
    batch_size: int = Field(1, ge=1, le=1_000_000, description="requests of one step")
    replay: float = Field(
        0.5, ge=0, lt=1, description="share of the requests that come from earlier data shards"
    )
    buffer: int = Field(
        512, ge=0, le=10_000_000, description="requests of earlier data shards that are kept for replay"
    )
    seed: int = Field(0, ge=0, description="of initial weights, order and everything drawn in a step")


class Trainer(ABC):
    """One method's training. :meth:`state` holds everything that a later step depends on."""

    @abstractmethod
    def step(self, requests: Sequence[EditRequest], generator: torch.Generator) -> dict[str, float]:
        """Make one optimiser step on these requests; return figures for the log (at least
        ``loss``). ``generator``: for this step only."""

    @abstractmethod
    def state(self) -> ArtifactData:
        """Weights, optimiser and statistics. A new trainer that loads them continues
        bit-identically."""

    @abstractmethod
    def load_state(self, state: ArtifactData) -> None:
        """Restore a result of :meth:`state`."""

    @abstractmethod
    def product(self) -> ArtifactData:
        """Return the finished artifact, which is all that edits need."""


def pretrained(
    method: str,
    hparams: Mapping[str, JSON],
    schedule: TrainingSchedule,
    fingerprint: ModelFingerprint,
    model: ModelConfig,
    training: TrainingSource | None,
    name: str = PRETRAINED,
    trainer_version: int = 1,
    places: Mapping[str, str] | None = None,
) -> ArtifactSpec:
    """The trained networks of a method. Their ``needs``: the trainings on the data shards, in
    order.

    ``hparams``: the JSON argument of :meth:`Method.trainer`. It holds only what training depends
    on, so that configs which differ in other fields share the networks. ``trainer_version``
    increases when the numbers of a training change. ``places``: where the folders that ``hparams``
    name lie, if elsewhere. Raises :class:`SpecError` without a training
    set.
    """
    if training is None:
        raise SpecError(
            f"training: required, because {method} learns from data before it edits; give training: "
            f"{{kind: zsre, "
            "counterfact or jsonl, path: ...}, a file of requests that the sweep does not edit"
        )
    common: dict[str, JSON] = {
        "method": method,
        "trainer_version": trainer_version,
        "hparams": dict(hparams),
        "seed": schedule.seed,
        "model": fingerprint.model,
        "tokenizer": fingerprint.tokenizer,
        "dtype": model.dtype,
    }
    where: dict[str, JSON] = {"places": dict(places)} if places else {}
    needs: tuple[ArtifactSpec, ...] = ()
    for number, shard in enumerate(training.shards):
        spec = ArtifactSpec(
            name=_BEFORE,
            kind=TRAINING,
            recipe={
                **common,
                # replay has no effect on the first shard, so sweeps with different shares can share
                # its artifact
                "schedule": schedule.model_dump(exclude={"replay"} if number == 0 else None),
                "shard": number,
                "requests": shard.stop - shard.start,
                "data": shard.fingerprint,
            },
            where={
                "kind": training.kind,
                "path": training.path,
                "on_bad_record": training.on_bad_record,
                "start": shard.start,
                "stop": shard.stop,
                **training.model_dump(include={"joiner", "target_field"}, exclude_none=True),
                **where,
            },
            needs=needs,
        )
        needs = (spec,)
    return ArtifactSpec(
        name=name,
        kind=PRETRAINED,
        recipe=common,
        where=where,
        needs=(needs[0].model_copy(update={"name": _STATE}),),
    )


# --- the builders ---------------------------------------------------------------------------


def build_training(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Train on one data shard, starting from the artifact of the shard before (if any). Recipe: see
    :func:`pretrained`."""
    course = _ShardRequests.of(recipe, bench.inputs.get(_BEFORE))
    trainer = _trainer(base, recipe, bench)
    step = 0
    log = _Log(course.schedule.steps)
    unfinished = bench.load()
    if unfinished is not None:
        state = ArtifactData.from_bytes(unfinished)
        step, log = state.meta["step"], _Log.of(course.schedule.steps, state.meta["log"])
        trainer.load_state(_trainer_state(state))
    elif course.before is not None:
        trainer.load_state(_trainer_state(course.before))
    what = f"{recipe['method']}, data shard {recipe['shard'] + 1}"
    for number in range(step, course.schedule.steps):
        figures = trainer.step(course.batch(number), course.generator(number, "step"))
        loss = figures.get("loss", 0.0)
        if not all(map(math.isfinite, figures.values())):
            raise ModelError(
                f"pretraining of {what}: step {number + 1} gave {figures}; lower the learning rate"
            )
        log.add(number, figures)
        done = number + 1
        bench.progress(done, course.schedule.steps, f"{what}, loss {loss:.3g}")
        if done < course.schedule.steps:
            bench.keep(lambda done=done: _pack(trainer, {"step": done, "log": log.state()}).to_bytes())  # type: ignore[misc]
    return _pack(trainer, {"log": log.entries, **course.afterwards()})


def build_pretrained(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Build the artifact that edits need from a trained state. ``meta["pretraining"]`` records the
    training data and the log."""
    state = bench.inputs[_STATE]
    trainer = _trainer(base, recipe, bench)
    trainer.load_state(_trainer_state(state))
    product = trainer.product()
    history = {key: state.meta[key] for key in ("shards", "requests", "steps", "log")}
    return replace(product, meta={**product.meta, "pretraining": history})


def _trainer(base: BaseModel, recipe: Mapping[str, JSON], bench: Workbench) -> Trainer:
    """The method's trainer before its first step."""
    start = derive_generator("pretraining", recipe["method"], recipe["hparams"], recipe["seed"], "start")
    trainer: Trainer = bench.trainer_of(recipe["method"])(
        base, {**recipe["hparams"], **recipe.get("places", {})}, start
    )
    return trainer


def _pack(trainer: Trainer, meta: dict[str, JSON]) -> ArtifactData:
    state = trainer.state()
    return ArtifactData(state.tensors, {**meta, "trainer": state.meta})


def _trainer_state(state: ArtifactData) -> ArtifactData:
    """The trainer's part of a result of :func:`_whole`."""
    return ArtifactData(state.tensors, state.meta["trainer"])


@dataclass(frozen=True)
class _ShardRequests:
    """The requests that each training step of one data shard learns from."""

    identity: tuple[JSON, ...]
    schedule: TrainingSchedule
    shard: int
    fresh: tuple[EditRequest, ...]
    kept: tuple[tuple[str, EditRequest], ...]
    before: ArtifactData | None

    @classmethod
    def of(cls, recipe: Mapping[str, JSON], before: ArtifactData | None) -> _ShardRequests:
        return cls(
            identity=("pretraining", recipe["method"], recipe["hparams"], recipe["seed"], recipe["shard"]),
            schedule=TrainingSchedule.model_validate(recipe["schedule"]),
            shard=recipe["shard"],
            fresh=_requests_of(recipe),
            kept=()
            if before is None
            else tuple((key, _request(value)) for key, value in before.meta["buffer"]),
            before=before,
        )

    def generator(self, step: int, purpose: str) -> torch.Generator:
        return derive_generator(*self.identity, step, purpose)

    def batch(self, step: int) -> list[EditRequest]:
        """The requests of one step: new ones, shuffled anew in each epoch, then replayed ones."""
        size, share = self.schedule.batch_size, self.schedule.replay if self.kept else 0.0
        old, later = int(step * size * share), int((step + 1) * size * share)
        batch = [self.fresh[i] for i in self._places(step * size - old, (step + 1) * size - later)]
        if later > old:
            chosen = torch.randint(len(self.kept), (later - old,), generator=self.generator(step, "replay"))
            batch += [self.kept[i][1] for i in chosen.tolist()]
        return batch

    def _places(self, start: int, stop: int) -> Iterator[int]:
        for number in range(start, stop):
            epoch, place = divmod(number, len(self.fresh))
            yield _order(canonical([*self.identity, "order", epoch]), len(self.fresh))[place]

    def afterwards(self) -> dict[str, JSON]:
        """The replay buffer for the next shard, and the totals of the training so far.

        The buffer holds the requests with the smallest hashes among all seen, so each has the same
        probability, whatever its shard.
        """
        past = self.before.meta if self.before is not None else {"shards": 0, "requests": 0, "steps": 0}
        seen = [*self.kept, *((self._hash(i, r), r) for i, r in enumerate(self.fresh))]
        chosen = sorted(seen, key=lambda pair: pair[0])[: self.schedule.buffer]
        return {
            "buffer": [[ticket, asdict(request)] for ticket, request in chosen],
            "shards": past["shards"] + 1,
            "requests": past["requests"] + len(self.fresh),
            "steps": past["steps"] + self.schedule.steps,
        }

    def _hash(self, place: int, request: EditRequest) -> str:
        text = canonical([*self.identity, "buffer", place, fingerprint([request])])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=2)
def _order(purpose: str, size: int) -> list[int]:
    return torch.randperm(size, generator=derive_generator(purpose)).tolist()


def _requests_of(recipe: Mapping[str, JSON]) -> tuple[EditRequest, ...]:
    """The requests of one data shard. Raises :class:`DataError` if they changed after planning."""
    path = recipe["path"]
    requests = load_training(
        recipe["kind"],
        None if path is None else Path(path),
        recipe["on_bad_record"],
        recipe.get("joiner"),
        recipe.get("target_field"),
    ).requests
    requests = requests[recipe["start"] : recipe["stop"]]
    if _hash_of(requests) != recipe["data"]:
        raise DataError(
            f"training: {path or recipe['kind']}: requests {recipe['start']} to {recipe['stop']} are not "
            f"the ones this "
            "training was planned with; restore the file, or run again to plan anew"
        )
    return requests


def _request(value: Mapping[str, JSON]) -> EditRequest:
    return EditRequest(
        **{
            **value,
            "rephrases": tuple(value["rephrases"]),
            "locality": tuple(Probe(**probe) for probe in value["locality"]),
            "portability": tuple(Probe(**probe) for probe in value["portability"]),
            "ood": tuple(value["ood"]),
        }
    )


@dataclass
class _Log:
    """Means of the figures over each twentieth of the training."""

    steps: int
    entries: list[dict[str, JSON]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    @classmethod
    def of(cls, steps: int, state: Mapping[str, JSON]) -> _Log:
        return cls(steps, list(state["entries"]), dict(state["sums"]), state["count"])

    def state(self) -> dict[str, JSON]:
        return {"entries": list(self.entries), "sums": dict(self.sums), "count": self.count}

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        every = max(1, self.steps // _LOG_ENTRIES)
        if (step + 1) % every == 0 or step + 1 == self.steps:
            self.entries.append(
                {"step": step + 1, **{name: total / self.count for name, total in self.sums.items()}}
            )
            self.sums, self.count = {}, 0
