"""What both engines share: running one shard in a worker, and keeping the books in the driver.

    bench = Bench(root="/data/results/demo", run_id="r1")      # in a worker process; keeps the loaded model
    for step in bench.run(manifest):                           # each step is durable when it is yielded
        ...

    outcome = run_sweep(spec, store, local_engine, view)       # in the driver: lock, plan, engine, gather

Progress lives in the journal alone: a shard that is run again, for whatever reason, continues after its last commit.
Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import secrets
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import yaml

import orchestrator
import workers
from orchestrator.plan import Common, Plan, Planner, Progress, Shard, Spent, Task, base_scores_of, load_spec_dataset
from orchestrator.results.artifact_store import ArtifactStore, Unfinished
from orchestrator.results.journal import Journal, ShardProgress, Superseded
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.select import select
from orchestrator.results.table import CentralTable, TableShard, count_done
from orchestrator.spec import DatasetSpec, SweepSpec, scoring_identity
from orchestrator.storage import lock as locking
from orchestrator.storage.base import Missing, Store, StoreError
from orchestrator.storage.open import open_store
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json, sha256_of, unseal_json
from workers.artifacts import BASE_SCORES, ArtifactData, ArtifactSpec, Workbench, in_order
from workers.data import requests_of
from workers.failures import may_pass
from workers.job import StreamJob
from workers.models import ModelConfig
from workers.types import JSON, DataError, Dataset, EditSweepError, ModelError

if TYPE_CHECKING:
    from workers.basescores import BaseScores
    from workers.session import Session
    from workers.stream import GroupFailure

GATHER_SHARDS = 64
GATHER_SECONDS = 60.0
SAVE_SECONDS = 30.0
"""Time between two savings of an unfinished artifact, about."""
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "pydantic")
"""Packages whose versions a result may depend on: equal on every node."""

TOLD_TOGETHER = frozenset({BASE_SCORES})
"""Kinds of small artifacts that come in hundreds."""

BACKOFF_SECONDS = 1.0
BACKOFF_MOST = 30.0
"""A shard that is launched again in the same run without having got further waits 1 s, then 2 s, 4 s and so on."""

GIB = 1 << 30
_LOG_CHARACTERS = 1_000_000


class ResultsError(EditSweepError):
    """The results folder is not this sweep's, or not a results folder at all."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One committed step of a shard. The first report of an attempt commits nothing: it says where it continues."""

    shard_id: str
    tick: int
    ticks: int
    edits: int
    rows: int
    seconds: float
    attempt: int
    failures: int = 0
    kept: int = 0
    """Scoring batches whose activations below the edit were kept from before, of ``batches``."""
    batches: int = 0
    journal_seconds: float = 0.0
    """Spent in the journal (claiming, committing), of the ``actor_seconds`` since the report before."""
    actor_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Safety:
    """What the durability of one run's results cost: actors in the journal, the driver gathering."""

    journal_seconds: float = 0.0
    actor_seconds: float = 0.0
    """All actors, from taking up a shard to its end, loading the model included."""
    gather_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def share(self) -> float:
        """An upper bound of the part of the wall time it takes: as if nothing else happened while the driver gathers."""
        journal = self.journal_seconds / self.actor_seconds if self.actor_seconds else 0.0
        return journal + (self.gather_seconds / self.wall_seconds if self.wall_seconds else 0.0)


@dataclass(frozen=True, slots=True)
class ShardError:
    """Why a shard did not finish, after all its attempts."""

    shard_id: str
    kind: str
    message: str
    attempts: int
    log: str


# --- in a worker -----------------------------------------------------------------------------------------------------


def _nobody(done: int, total: int, what: str) -> None:
    """Nobody is watching."""


@dataclass
class _Workbench(Workbench):
    """One whose unfinished work outlives the process."""

    durable: Unfinished | None = None

    def __post_init__(self) -> None:
        told = self.progress

        def tell(done: int, total: int, what: str) -> None:
            if self.durable is not None:
                self.durable.progress = (done, total, what)
            told(done, total, what)

        self.progress = tell

    def load(self) -> bytes | None:
        return None if self.durable is None else self.durable.load()

    def save(self, data: bytes) -> None:
        if self.durable is not None:
            self.durable.save(data)


class Bench:
    """What a worker process keeps between shards: the loaded model, the data set, artifacts of the last shard."""

    def __init__(self, root: str, run_id: str, save_seconds: float = SAVE_SECONDS) -> None:
        self.save_seconds = save_seconds
        self.store = open_store(root)
        self.paths = ResultsPaths()
        self.journal = Journal(self.store, self.paths)
        self.artifacts = ArtifactStore(self.store, self.paths)
        self.run_id = run_id
        self._session: tuple[ModelConfig, int, Session] | None = None
        self._dataset: tuple[DatasetSpec, Dataset] | None = None
        self._data: dict[str, ArtifactData] = {}

    def session(self, model: ModelConfig, threads: int) -> Session:
        """The session of ``model``, loaded on first use."""
        from workers.session import Session

        if self._session is None or self._session[:2] != (model, threads):
            self._session = None  # let go of the old weights before the new ones are read
            self._session = (model, threads, Session.open(model, threads=threads))
        return self._session[2]

    def build(
        self,
        spec: ArtifactSpec,
        model: ModelConfig,
        threads: int,
        progress: Callable[[int, int, str], None] = _nobody,
        stopping: Callable[[], bool] = bool,
    ) -> ArtifactData:
        """An artifact from the store, built and stored first if it is not there, and what it needs before it.

        Raises :class:`~workers.artifacts.Stopped`, with everything saved, if ``stopping`` says so between two steps.
        """

        def make(unfinished: Unfinished) -> bytes:
            inputs = {need.name: self.build(need, model, threads, progress, stopping) for need in spec.needs}
            bench = _Workbench(inputs, progress, save_seconds=self.save_seconds, stopping=stopping)
            bench.durable, bench.dataset = unfinished, self._read_dataset
            return self.session(model, threads).build(spec, bench).to_bytes()

        data = ArtifactData.from_bytes(self.artifacts.get_or_build(spec, self.run_id, make))
        data.check_made_as(spec, self.store.where(self.paths.artifact(spec.kind, spec.key)))
        return data

    def run(self, manifest: ShardManifest) -> Iterator[StepReport]:
        """Run or continue a shard; every report but the first stands for a durable step.

        A launch again within one run waits first if the last came to nothing, longer each time: what may pass needs time to
        pass. Raises whatever the
        stream raises, after noting it in the journal, and :class:`~orchestrator.results.journal.Superseded`.
        """
        from workers.stream import Stream

        task = Task.of(manifest)
        common = task.common
        told = time.perf_counter()
        self.journal.begin(manifest)
        stalled = self.journal.stalled(manifest.shard_id, self.run_id)
        if stalled:
            time.sleep(min(BACKOFF_SECONDS * 2.0 ** (stalled - 1), BACKOFF_MOST))
            told = time.perf_counter()
        attempt = self.journal.claim(manifest.shard_id, self.run_id, _worker())
        ticks = manifest.bounds[-1]
        try:
            spent = -told + (told := time.perf_counter())
            yield StepReport(
                shard_id=manifest.shard_id,
                tick=attempt.position,
                ticks=ticks,
                edits=0,
                rows=0,
                seconds=0.0,
                attempt=attempt.number,
                journal_seconds=spent,
                actor_seconds=spent,
            )
            if attempt.position == ticks:
                return
            check_declared(manifest.shard_id, task.gpu_memory_gb, _gpu_bytes(common.model))
            session = self.session(common.model, common.threads)
            data = self._load_dataset(common.dataset, common.dataset_fingerprint)
            specs = task.artifact_specs()
            self._data = {
                key: self._data.get(key) or self.build(spec, common.model, common.threads)
                for key, spec in specs.items()
            }
            requests = requests_of(manifest.job, data, common.dataset.order)
            stream = Stream(session, manifest.job, requests, self._data)
            session.base_answers.know(self._base_scores(session, common, manifest.job))
            prefixes = session.prefixes
            prefixes.resize(common.cache_bytes)
            hits, misses = prefixes.hits, prefixes.misses
            began = time.perf_counter()
            for step in stream.run(manifest.bounds, attempt.position, attempt.state):
                computed = time.perf_counter()
                if step.failures:
                    self._log(manifest.shard_id, attempt.number, _failures_text(step.failures))
                attempt.commit(
                    step.start,
                    step.stop,
                    step.rows,
                    [_failure_json(failure) for failure in step.failures],
                    step.state,
                    {"edits": step.edits, "edit_seconds": step.edit_seconds, "score_seconds": step.score_seconds},
                )
                now = time.perf_counter()
                yield StepReport(
                    shard_id=manifest.shard_id,
                    tick=step.stop,
                    ticks=ticks,
                    edits=step.edits,
                    rows=len(step.rows),
                    seconds=now - began,
                    attempt=attempt.number,
                    failures=len(step.failures),
                    kept=prefixes.hits - hits,
                    batches=prefixes.hits + prefixes.misses - hits - misses,
                    journal_seconds=now - computed,
                    actor_seconds=now - told,
                )
                began = told = now
                hits, misses = prefixes.hits, prefixes.misses
        except Superseded:
            raise
        except Exception as error:
            note: dict[str, JSON] = {
                "kind": type(error).__name__,
                "message": str(error)[:2000],
                "traceback": traceback.format_exc()[-20_000:],
                "tick": attempt.position,
                "worker": _worker(),
            }
            with contextlib.suppress(StoreError):  # the storage may be what failed
                self._log(manifest.shard_id, attempt.number, f"{note['traceback']}\n")
                self.journal.record_error(manifest.shard_id, attempt.number, note)
            raise

    def _log(self, shard_id: str, attempt: int, text: str) -> None:
        """Append to an attempt's log, which outlives the shard's parts."""
        key = self.paths.shard_log(shard_id, attempt)
        try:
            before = self.store.read(key).decode()
        except Missing:
            before = f"shard {shard_id}, attempt {attempt}, run {self.run_id}, {_worker()}\n\n"
        self.store.replace(key, (before + text)[-_LOG_CHARACTERS:].encode())

    def _base_scores(self, session: Session, common: Common, job: StreamJob) -> BaseScores | None:
        """What the store knows of the base model's replies to this job; what it does not, the stream computes."""
        from workers.basescores import BaseScores

        spec = base_scores_of(common, job)
        found = self.artifacts.get(spec)
        if found is None:
            return None
        data = ArtifactData.from_bytes(found)
        data.check_made_as(spec, self.store.where(self.paths.artifact(spec.kind, spec.key)))
        return BaseScores.open(data, session.base)

    def _read_dataset(self, source: Mapping[str, JSON], fingerprint: str) -> Dataset:
        return self._load_dataset(DatasetSpec.model_validate(source), fingerprint)

    def _load_dataset(self, spec: DatasetSpec, fingerprint: str) -> Dataset:
        if self._dataset is None or self._dataset[0] != spec or self._dataset[1].fingerprint != fingerprint:
            self._dataset = (spec, load_spec_dataset(spec))
        data = self._dataset[1]
        if data.fingerprint != fingerprint:
            raise DataError(
                f"the data set {spec.kind} ({spec.path or 'embedded'}) is not the one this shard was planned with "
                f"(fingerprint {data.fingerprint}, expected {fingerprint}): restore the file, or use a new results folder"
            )
        return data


def passing(error: BaseException) -> bool:
    """Whether launching a shard again may help (see :func:`workers.failures.may_pass`)."""
    return may_pass(error) or isinstance(error, (StoreError, Superseded))


def _failure_json(failure: GroupFailure) -> dict[str, JSON]:
    return {name: value for name, value in dataclasses.asdict(failure).items() if name != "trace"}


def _failures_text(failures: Sequence[GroupFailure]) -> str:
    """One line per failed group, and every traceback once."""
    lines = [f"group {f.group} of cell {f.cell_id}: {f.kind}: {f.message}" for f in failures]
    return "\n".join([*lines, *dict.fromkeys(f.trace for f in failures if f.trace)]) + "\n"


def _worker() -> dict[str, JSON]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def versions() -> dict[str, str]:
    """What must be equal wherever shards run: Python, the packages, and this code itself."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return {**found, "editsweep": code_digest()}


def code_digest() -> str:
    """Hash of the source files of this package: two nodes with equal digests run the same code."""
    text = []
    for package in (orchestrator, workers):
        folder = Path(str(package.__file__)).parent
        text += [f"{p.relative_to(folder)}:{sha256_of(p.read_bytes())}" for p in sorted(folder.rglob("*.py"))]
    return sha256_of("\n".join(text).encode())[:12]


def check_memory(model: ModelConfig, weight_bytes: int, gpu: float, memory_gb: float, where: str) -> None:
    """Refuse a model that cannot fit the device here. Raises :class:`ModelError` with the sizes."""
    if model.device != "cpu" and (gpu or model.device == "cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ModelError(f"{where}: model.device is {model.device}, but torch finds no GPU there")
        free = torch.cuda.get_device_properties(0).total_memory * (min(gpu, 1.0) or 1.0)
        if weight_bytes > free:
            raise ModelError(
                f"{where}: the weights of {model.name} take {weight_bytes / GIB:.1f} GiB in {model.dtype}, but an actor has "
                f"{free / GIB:.1f} GiB of GPU memory; use a smaller dtype, a larger GPU, or engine.resources.gpu: 1"
            )
        return
    import psutil

    needed = memory_gb * GIB or 2 * weight_bytes
    available = psutil.virtual_memory().available
    if needed > available:
        raise ModelError(
            f"{where}: an actor needs about {needed / GIB:.1f} GiB of memory for {model.name}, {available / GIB:.1f} GiB are "
            "available"
        )


def check_declared(shard_id: str, declared_gb: float | None, present: int | None) -> None:
    """Refuse a shard whose lanes were chosen for a larger GPU than the one here, of ``present`` bytes (None: no GPU).

    A card of a nominal size reports up to 5% less. Raises :class:`ModelError`.
    """
    if declared_gb is None or present is None or present >= 0.95 * declared_gb * GIB:
        return
    raise ModelError(
        f"shard {shard_id} was planned for GPUs with engine.gpu_memory_gb: {declared_gb:g}, but the GPU here has "
        f"{present / GIB:.1f} GiB. A shard that has begun keeps its lanes: continue it on a GPU of {declared_gb:g} GiB. "
        f"Shards that have not begun are planned anew for this GPU by running again with "
        f"--set engine.gpu_memory_gb={int(present / GIB)} (with engine.lanes: auto) or with fewer engine.lanes"
    )


def _gpu_bytes(model: ModelConfig) -> int | None:
    """Memory of the GPU that this process edits on."""
    if model.device == "cpu":
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


# --- in the driver ---------------------------------------------------------------------------------------------------


class View(Protocol):
    """Where progress is shown (:mod:`orchestrator.console` has the terminal's)."""

    def begin(self, plan: Plan) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def artifact_step(self, title: str, done: int, total: int, what: str) -> None: ...
    def artifact_ended(self, title: str) -> None: ...
    def shard_started(self, shard: Shard, title: str) -> None: ...
    def shard_step(self, step: StepReport) -> None: ...
    def shard_ended(self, shard_id: str, ok: bool) -> None: ...
    def end(self) -> None: ...


@dataclass
class Books:
    """The driver's account of one run: tells the view, gathers finished shards, collects failures."""

    plan: Plan
    store: Store
    run_id: str
    view: View
    check: Callable[[], None] = lambda: None
    paths: ResultsPaths = field(default_factory=ResultsPaths)
    artifacts_only: bool = False
    """Whether the engine is to build artifacts and run no shard."""
    errors: dict[str, ShardError] = field(default_factory=dict)
    interrupted: bool = False
    safety: Safety = Safety()
    _began: float = field(default_factory=time.monotonic)
    _ready: list[str] = field(default_factory=list)
    _gathered: float = field(default_factory=time.monotonic)
    _many: Counter[str] = field(default_factory=Counter)
    """How many artifacts are to be built, of kinds that are told together."""
    _built: Counter[str] = field(default_factory=Counter)

    @cached_property
    def journal(self) -> Journal:
        return Journal(self.store, self.paths)

    @cached_property
    def table(self) -> CentralTable:
        return CentralTable(self.store, self.paths)

    @cached_property
    def shards(self) -> dict[str, Shard]:
        return {shard.shard_id: shard for shard in self.plan.shards}

    @cached_property
    def base_scores(self) -> list[ArtifactSpec]:
        return self.plan.base_scores()

    @cached_property
    def artifacts(self) -> ArtifactStore:
        return ArtifactStore(self.store, self.paths)

    def missing_artifacts(self) -> list[ArtifactSpec]:
        """What the shards that are left need and the store does not have, in the order in which it can be built."""
        keys = dict.fromkeys(key for shard in self.plan.shards for key in self.plan.artifact_keys(shard))
        if self.artifacts_only:
            keys = dict.fromkeys(self.plan.artifacts)
        missing = in_order((self.plan.artifacts[key] for key in keys), self.artifacts.has)
        scores = self.base_scores
        there = self.artifacts.sizes(BASE_SCORES) if scores else {}
        missing += [spec for spec in scores if spec.key not in there]
        self._many = Counter(spec.kind for spec in missing if spec.kind in TOLD_TOGETHER)
        self._built = Counter()
        return missing

    def artifact_step(self, spec: ArtifactSpec, done: int, total: int, what: str) -> None:
        if spec.kind in self._many:
            self._tell_together(spec.kind)
        else:
            self.view.artifact_step(artifact_title(spec), done, total, what)

    def artifact_built(self, spec: ArtifactSpec, number: int, total: int) -> None:
        if spec.kind in self._many:
            self._built[spec.kind] += 1
            self._tell_together(spec.kind)
            return
        self.view.artifact_ended(artifact_title(spec))
        self.view.note(f"artifact {number}/{total} built: {artifact_title(spec)}")

    def _tell_together(self, kind: str) -> None:
        """One line for all artifacts of a kind, and one more when the last one is there."""
        built, all_of_kind = self._built[kind], self._many[kind]
        if built < all_of_kind:
            self.view.artifact_step(kind, built, all_of_kind, f"{built} of {all_of_kind}")
            return
        self.view.artifact_ended(kind)
        self.view.note(f"artifacts built: {all_of_kind} {kind}")

    def artifacts_ended(self) -> None:
        """Nothing is being built any more, whatever came of it."""
        for kind in self._many:
            self.view.artifact_ended(kind)

    def artifact_failed(self, spec: ArtifactSpec, cause: str) -> None:
        """One that nobody will try to build again in this run. The shards that need it fail with its cause; base-model
        scores they compute themselves.

        Raises :class:`~workers.types.EditSweepError` if the storage is what failed.
        """
        self.view.artifact_ended(artifact_title(spec))
        _refuse_storage(cause)
        cause = self.artifacts.failure(spec, self.run_id) or cause
        self.artifacts.record_failure(spec, self.run_id, cause)
        self.view.warn(f"artifact {artifact_title(spec)} failed: {cause.splitlines()[0][:500]}")

    def title(self, shard: Shard) -> str:
        sizes = "/".join(map(str, self.plan.group_sizes(shard)))
        return f"{self.plan.variants[shard.variant].label} T={sizes} {shard.shard_id[:6]}"

    def started(self, shard_id: str) -> None:
        """Raises :class:`~orchestrator.storage.lock.LockLost`: who has lost the folder must not claim a shard of it."""
        self.check()
        shard = self.shards[shard_id]
        self.view.shard_started(shard, self.title(shard))

    def stepped(self, step: StepReport) -> None:
        self.safety = replace(
            self.safety,
            journal_seconds=self.safety.journal_seconds + step.journal_seconds,
            actor_seconds=self.safety.actor_seconds + step.actor_seconds,
        )
        self.view.shard_step(step)
        self.tick()

    def finished(self, shard_id: str) -> None:
        self.view.shard_ended(shard_id, ok=True)
        self._ready.append(shard_id)
        self.tick()

    def retrying(self, shard_id: str, attempt: int, cause: str) -> None:
        self.view.warn(f"{self.title(self.shards[shard_id])} failed ({cause}); launching it again (try {attempt + 1})")

    def failed(self, shard_id: str, attempts: int, cause: str) -> None:
        """A shard that will not be launched again in this run.

        Raises :class:`~workers.types.EditSweepError` if the storage is what failed: every other shard would fail too.
        """
        _refuse_storage(cause)
        error = ShardError(shard_id, "error", cause, attempts, self.store.where(self.paths.shard(shard_id)))
        try:
            recorded = self.journal.errors(shard_id)
        except EditSweepError:
            recorded = {}
        if recorded:
            last = max(recorded)
            error = ShardError(
                shard_id,
                str(recorded[last].get("kind", "error")),
                str(recorded[last].get("message", cause)),
                attempts,
                self.store.where(self.paths.shard_log(shard_id, last)),
            )
        self.errors[shard_id] = error
        self.view.shard_ended(shard_id, ok=False)
        self.view.warn(
            f"{self.title(self.shards[shard_id])} failed: {error.kind}: {error.message.splitlines()[0][:200]}"
        )
        self.tick()

    def tick(self) -> None:
        """Called often: gathers when there is enough to gather. Raises :class:`~orchestrator.storage.lock.LockLost`."""
        self.check()
        waited = time.monotonic() - self._gathered
        if len(self._ready) >= GATHER_SHARDS or (self._ready and waited >= GATHER_SECONDS):
            self.gather(self._ready)

    def gather(self, shard_ids: list[str] | None = None) -> None:
        """Move finished shards (None: every one there is) into the central table."""
        began = time.monotonic()
        done = self.table.gather(self.journal, shard_ids)
        self._ready, self._gathered = [], time.monotonic()
        self.safety = replace(
            self.safety,
            gather_seconds=self.safety.gather_seconds + self._gathered - began,
            wall_seconds=self._gathered - self._began,
        )
        for shard_id in done.again:
            self.view.warn(f"a part of shard {shard_id} was damaged on disk; run the same command again to redo it")
        for shard_id, cause in (done.refused or {}).items():
            self.errors[shard_id] = ShardError(
                shard_id, "TableError", cause, 0, self.store.where(self.paths.shard(shard_id))
            )


_STORAGE = re.compile(r"(^|\.)StoreError: ")
"""A cause as `Class: message`, or as the last line of a traceback."""


def _refuse_storage(cause: str) -> None:
    storage = _STORAGE.search(cause)
    if storage:
        raise EditSweepError(f"{cause[storage.end() :]}; mend it and run the same command again: it continues")


def artifact_title(spec: ArtifactSpec) -> str:
    return f"{spec.kind} {spec.key[:8]}"


class Engine(Protocol):
    """Builds the artifacts and (unless ``books.artifacts_only``) runs the shards of ``books.plan``.

    Returns when all ended or the user interrupted (``books.interrupted``).
    """

    def __call__(self, books: Books, max_actors: int | None) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    plan: Plan
    run_id: str
    unfinished: tuple[str, ...]
    errors: Mapping[str, ShardError]
    failed_groups: tuple[Mapping[str, JSON], ...]
    interrupted: bool
    safety: Safety = Safety()

    @property
    def exit_code(self) -> int:
        if self.interrupted and self.unfinished:
            return 130
        return 1 if self.unfinished else 0


def run_sweep(
    spec: SweepSpec,
    store: Store,
    engine: Engine,
    view: View,
    max_actors: int | None = None,
    only: Sequence[str] = (),
    retry_failed: bool = False,
) -> Outcome:
    """The whole of ``editsweep run``: plan, subtract what is done, run the rest, gather.

    ``only``: run the cells that these fit (:mod:`orchestrator.results.select`). ``retry_failed``: also the groups that failed in an
    earlier run, which are otherwise left alone: what diverged or raised would do so again.
    """
    paths = ResultsPaths()
    check_folder(spec, store, paths)
    planner = Planner(spec)  # everything that is wrong with the spec is said before anything is written
    chosen = select(only, planner.described(), "--only") if only else None
    run_id = new_run_id()
    with locking.acquire(store, run_id, say=view.warn) as lock:
        _enter_folder(spec, store, paths)
        table = CentralTable(store, paths)
        journal = Journal(store, paths)
        for number in table.verify():
            view.warn(f"table file {number} is damaged and was put aside; its shards run again")
        table.gather(journal)
        plan = planner.plan(read_progress(table, journal, retry_failed), chosen)
        lock.check()
        _write_plan(plan, store, paths)
        _write_run(plan, store, paths, run_id, max_actors)
        books = Books(plan, store, run_id, view, check=lock.check, paths=paths)
        view.begin(plan)
        try:
            if plan.shards:
                engine(books, max_actors)
        except BaseException:
            view.end()
            if not lock.lost:
                with contextlib.suppress(
                    StoreError
                ):  # the storage may be what ended the run: that is the better message
                    books.gather()
            raise
        view.end()
        lock.check()
        books.gather()
        lock.check()
        outcome = _outcome(books)
        _write_end(store, paths, run_id, outcome)
    return outcome


@dataclass(frozen=True, slots=True)
class ArtifactState:
    """One artifact of a sweep after :func:`build_artifacts`. ``bytes`` is None if it does not exist."""

    spec: ArtifactSpec
    bytes: int | None
    state: str


def build_artifacts(
    spec: SweepSpec, store: Store, engine: Engine, view: View, max_actors: int | None = None
) -> tuple[tuple[ArtifactState, ...], bool]:
    """The whole of ``editsweep artifacts``: everything that the sweep's cells need, and nothing else.

    Base-model scores are those that the shards share which are left to run. Also returns whether the user interrupted it.
    """
    paths = ResultsPaths()
    check_folder(spec, store, paths)
    planner = Planner(spec)
    run_id = new_run_id()
    with locking.acquire(store, run_id, say=view.warn) as lock:
        _enter_folder(spec, store, paths)
        plan = planner.plan(read_progress(CentralTable(store, paths), Journal(store, paths)))
        _write_run(plan, store, paths, run_id, max_actors)
        books = Books(plan, store, run_id, view, check=lock.check, paths=paths, artifacts_only=True)
        missing = {needed.key for needed in books.missing_artifacts()}
        view.begin(plan)
        try:
            if missing:
                engine(books, max_actors)
        finally:
            view.end()
        lock.check()
        states = _artifact_states(books, missing)
    return states, books.interrupted


def _artifact_states(books: Books, missing: Collection[str]) -> tuple[ArtifactState, ...]:
    saved = {found["key"]: found for found in books.artifacts.unfinished()}
    states = []
    specs = [*in_order(books.plan.artifacts.values()), *books.base_scores]
    sizes = {kind: books.artifacts.sizes(kind) for kind in {spec.kind for spec in specs}}
    for spec in specs:
        size = sizes[spec.kind].get(spec.key)
        if size is not None:
            state = "built" if spec.key in missing else "present"
        elif (failure := books.artifacts.failure(spec, books.run_id)) is not None:
            state = f"failed: {failure.splitlines()[0][:200]}"
        elif spec.key not in missing:
            state = "not needed"  # it went into one that is present
        elif (progress := saved.get(spec.key)) and progress["total"]:
            state = f"unfinished, {100 * progress['done'] // progress['total']}%"
        else:
            state = "not begun"
        states.append(ArtifactState(spec, size, state))
    return tuple(states)


def new_run_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


def read_progress(table: CentralTable, journal: Journal, retry_failed: bool = False) -> Progress:
    """What the results folder holds, as the planner wants it. ``retry_failed``: failed groups count as not run."""
    listed = table.shards()
    begun = tuple(manifest for shard_id, manifest in journal.begun().items() if shard_id not in listed)
    spent = [
        Spent(shard.shard_id, tuple(shard.cells), shard.edits, _seconds(shard))
        for shard in listed.values()
        if shard.cells
    ]
    for manifest in begun:
        try:
            progress = journal.progress(manifest.shard_id)
        except (Missing, EditSweepError):
            continue  # gathered meanwhile, or damaged: it only lacks in the estimates
        spent.append(Spent(manifest.shard_id, tuple(manifest.columns), progress.edits, _seconds(progress)))
    given_up = {} if retry_failed else table.given_up()
    return Progress(done=table.done(), given_up=given_up, begun=begun, used=frozenset(listed), spent=spent)


def _seconds(shard: TableShard | ShardProgress) -> float:
    return shard.edit_seconds + shard.score_seconds + shard.commit_seconds


def check_folder(spec: SweepSpec, store: Store, paths: ResultsPaths) -> None:
    """Refuse a results folder that is not this sweep's. Writes nothing."""
    try:
        found = unseal_json(store.read(paths.sweep), store.where(paths.sweep))
    except Missing:
        strangers = [e.name for e in store.list("") if e.name != paths.lock]
        if strangers:
            raise ResultsError(
                f"{store.where()} is not a results folder: it has no {paths.sweep} but holds {', '.join(strangers[:5])}; "
                "give an empty or a new folder with --results"
            ) from None
        return
    except StoreError as error:
        if error.cause.startswith("a part of the path is a file"):
            raise ResultsError(f"{store.where()} is a file, not a folder; give a folder with --results") from None
        raise
    if found.get("name") != spec.name:
        raise ResultsError(
            f"{store.where()} holds the results of the sweep {found.get('name')!r}, not of {spec.name!r}; "
            "give another folder with --results"
        )
    mine = dict(scoring_identity(spec.scoring))
    theirs = found.get("scoring", mine)
    changed = [
        f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} here"
        for key in dict.fromkeys((*mine, *theirs))
        if theirs.get(key) != mine.get(key)
    ]
    if changed:
        raise ResultsError(
            f"scoring: the cells in {store.where()} were scored with other settings ({'; '.join(changed)}); "
            "use the same settings, or a new folder with --results"
        )


def _enter_folder(spec: SweepSpec, store: Store, paths: ResultsPaths) -> None:
    identity = {"name": spec.name, "scoring": dict(scoring_identity(spec.scoring))}
    if not store.publish_new(paths.sweep, seal_json(identity)):
        check_folder(spec, store, paths)


def _write_plan(plan: Plan, store: Store, paths: ResultsPaths) -> None:
    """plan.json: the definition of every cell there ever was, and which of them the last plan asked for."""
    try:
        known = dict(unseal_json(store.read(paths.plan), store.where(paths.plan))["cells"])
    except (Missing, EditSweepError, KeyError, TypeError):
        known = {}
    for cell in plan.cells:
        variant = plan.variants[cell.variant]
        known[cell.cell_id] = {
            "method": variant.label,
            "algorithm": variant.algorithm,
            "version": variant.version,
            "hparams_id": variant.hparams_id,
            "config": variant.config,
            "T": cell.T,
            "seed": cell.seed,
            "groups": cell.groups,
            "rollback": plan.common.rollback,
            "batch_size": cell.batch_size,
            "model": plan.common.model.name,
            "model_fingerprint": plan.common.model_fingerprint,
            "tokenizer_fingerprint": plan.common.tokenizer_fingerprint,
            "dataset": plan.common.dataset_name,
            "dataset_fingerprint": plan.common.dataset_fingerprint,
        }
    store.replace(paths.plan, seal_json({"cells": known, "current": [cell.cell_id for cell in plan.cells]}))


def _write_run(plan: Plan, store: Store, paths: ResultsPaths, run_id: str, max_actors: int | None) -> None:
    text = yaml.safe_dump(plan.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.replace(paths.run_spec(run_id), text.encode())
    info: dict[str, JSON] = {
        "run_id": run_id,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv[1:],
        "max_actors": max_actors,
        "versions": versions(),
        "driver": _worker(),
        "shards": len(plan.shards),
    }
    store.replace(paths.run_info(run_id), seal_json(info))


def _write_end(store: Store, paths: ResultsPaths, run_id: str, outcome: Outcome) -> None:
    info = unseal_json(store.read(paths.run_info(run_id)), store.where(paths.run_info(run_id)))
    info |= {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "exit_code": outcome.exit_code,
        "unfinished_cells": len(outcome.unfinished),
        "errors": [dataclasses.asdict(error) for error in outcome.errors.values()],
        "safety": dataclasses.asdict(outcome.safety),
    }
    store.replace(paths.run_info(run_id), seal_json(info))


def _outcome(books: Books) -> Outcome:
    """Compare the table with the plan: an engine's own account of how it ended is never trusted."""
    done = books.table.done()
    unfinished = [
        cell.cell_id
        for cell in books.plan.asked
        if count_done(done.get(cell.cell_id, set()), cell.groups) < cell.groups
    ]
    wanted = set(unfinished)
    failed = tuple(failure for failure in books.table.failed() if failure["cell_id"] in wanted)
    return Outcome(
        books.plan, books.run_id, tuple(unfinished), dict(books.errors), failed, books.interrupted, books.safety
    )
