"""Run one shard in an actor, for both engines."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.engine.machine import check_declared, gpu_bytes, this_process
from orchestrator.planning.inputs import load_spec_dataset
from orchestrator.planning.spec import DatasetSpec
from orchestrator.planning.work import Task
from orchestrator.results.artifact_store import ArtifactStore, Unfinished
from orchestrator.results.journal import Journal, Superseded
from orchestrator.results.manifest import ShardManifest
from orchestrator.storage.base import StoreError
from orchestrator.storage.open import open_store
from orchestrator.storage.paths import ResultsPaths
from workers.artifacts.base import ArtifactData, ArtifactSpec, Workbench
from workers.data import requests_of
from workers.failures import is_transient
from workers.model.config import ModelConfig
from workers.types import JSON, DataError, Dataset, ModelError

if TYPE_CHECKING:
    from workers.session import Session
    from workers.stream import GroupFailure


log = logging.getLogger(__name__)

SAVE_SECONDS = 30.0
"""Approximate time between two saves of an unfinished artifact."""

BACKOFF_SECONDS = 1.0
BACKOFF_MOST = 30.0
"""A shard that is launched again in the same run after an attempt without a commit waits first: 1
s, then 2 s, 4 s, ..., at most :data:`BACKOFF_MOST`."""

_LOG_CHARACTERS = 1_000_000
"""A log keeps at most so many characters, the last ones."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One committed step of a shard. The first report of an attempt commits nothing: its ``tick``
    is the position from which the attempt continues."""

    shard_id: str
    tick: int
    ticks: int
    edits: int
    rows: int
    seconds: float
    attempt: int
    failures: int = 0
    causes: tuple[str, ...] = ()
    """Why each of these groups failed."""
    kept: int = 0
    """Scoring batches, of ``batches``, whose activations below the edit were in the cache."""
    batches: int = 0
    journal_seconds: float = 0.0
    """Time spent in the journal (claim, commit), of the ``actor_seconds`` since the last report."""
    actor_seconds: float = 0.0


def _no_progress(done: int, total: int, what: str) -> None:
    """No-op progress callback."""


@dataclass
class _Workbench(Workbench):
    """A workbench that saves unfinished work to the store."""

    durable: Unfinished | None = None

    def __post_init__(self) -> None:
        report = self.progress

        def record_and_report(done: int, total: int, what: str) -> None:
            if self.durable is not None:
                self.durable.progress = (done, total, what)
            report(done, total, what)

        self.progress = record_and_report

    def load(self) -> bytes | None:
        return None if self.durable is None else self.durable.load()

    def save(self, data: bytes) -> None:
        if self.durable is not None:
            self.durable.save(data)


class Worker:
    """Runs shards and builds artifacts in one process. Between shards it keeps the loaded model, the
    data set, and the artifacts of the last shard.

    ``own_code``: this run allows the model's own code. A shard that has begun takes its settings from
    the results folder, which may come from somebody else, so that what it says is not enough.
    """

    def __init__(
        self, root: str, run_id: str, save_seconds: float = SAVE_SECONDS, own_code: bool = False
    ) -> None:
        self.save_seconds = save_seconds
        self.own_code = own_code
        self.store = open_store(root)
        self.paths = ResultsPaths()
        self.journal = Journal(self.store, self.paths)
        self.artifacts = ArtifactStore(self.store, self.paths)
        self.run_id = run_id
        self._session: tuple[ModelConfig, int, Session] | None = None
        self._dataset: tuple[DatasetSpec, Dataset] | None = None
        self._data: dict[str, ArtifactData] = {}

    def session(self, model: ModelConfig, threads: int) -> Session:
        """The session of ``model``, loaded on first use. Raises :class:`ModelError`."""
        from workers.session import Session

        if model.trust_remote_code and not self.own_code:
            raise ModelError(
                f"model.trust_remote_code: the results folder asks for {model.name!r} with its own code, which "
                "this run does not allow; if you trust it, set it to true in the spec and give "
                "--trust-remote-code"
            )
        if self._session is None or self._session[:2] != (model, threads):
            self._session = None  # free the old weights before the new ones are loaded
            self._session = (model, threads, Session.open(model, threads=threads))
        return self._session[2]

    def build(
        self,
        spec: ArtifactSpec,
        model: ModelConfig,
        threads: int,
        progress: Callable[[int, int, str], None] = _no_progress,
        stopping: Callable[[], bool] = bool,
    ) -> ArtifactData:
        """An artifact from the store. If it is missing, it is built and stored first, after the
        artifacts that it needs.

        Between two steps ``stopping`` is called; if it returns True, the state is saved and
        :class:`~workers.artifacts.base.Stopped` is raised.
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
        """Run or continue a shard. Every report except the first is made after a durable commit.

        If the last attempt of the same run committed nothing, this one waits first
        (:data:`BACKOFF_SECONDS`), because a temporary error needs time to pass. Raises the stream's
        exceptions, after recording them in the journal, and
        :class:`~orchestrator.results.journal.Superseded`.
        """
        from workers.stream import Stream

        task = Task.of(manifest)
        common = task.common
        last_report = time.perf_counter()
        self.journal.begin(manifest)
        stalled = self.journal.stalled(manifest.shard_id, self.run_id)
        if stalled:
            time.sleep(min(BACKOFF_SECONDS * 2.0 ** (stalled - 1), BACKOFF_MOST))
            last_report = time.perf_counter()
        attempt = self.journal.claim(manifest.shard_id, self.run_id, this_process())
        ticks = manifest.bounds[-1]
        try:
            spent = -last_report + (last_report := time.perf_counter())
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
            check_declared(manifest.shard_id, task.gpu_memory_gb, gpu_bytes(common.model))
            session = self.session(common.model, common.threads)
            data = self._load_dataset(common.dataset, common.dataset_fingerprint)
            specs = task.artifact_specs()
            self._data = {
                key: self._data.get(key) or self.build(spec, common.model, common.threads)
                for key, spec in specs.items()
            }
            requests = requests_of(manifest.job, data, common.dataset.order)
            stream = Stream(session, manifest.job, requests, self._data)
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
                    {
                        "edits": step.edits,
                        "edit_seconds": step.edit_seconds,
                        "score_seconds": step.score_seconds,
                    },
                    {"outputs": step.outputs, "groups": step.groups},
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
                    causes=tuple(f"{f.kind}: {f.message}" for f in step.failures),
                    kept=prefixes.hits - hits,
                    batches=prefixes.hits + prefixes.misses - hits - misses,
                    journal_seconds=now - computed,
                    actor_seconds=now - last_report,
                )
                began = last_report = now
                hits, misses = prefixes.hits, prefixes.misses
        except Superseded:
            raise
        except Exception as error:
            note: dict[str, JSON] = {
                "kind": type(error).__name__,
                "message": str(error)[:2000],
                "traceback": traceback.format_exc()[-20_000:],
                "tick": attempt.position,
                "worker": this_process(),
            }
            with contextlib.suppress(StoreError):  # the storage may be what failed
                self._log(manifest.shard_id, attempt.number, f"{note['traceback']}\n")
                self.journal.record_error(manifest.shard_id, attempt.number, note)
            raise

    def _log(self, shard_id: str, attempt: int, text: str) -> None:
        """Append to an attempt's log, if it can be written: no result depends on it. It remains when
        the shard's parts are deleted."""
        key = self.paths.shard_log(shard_id, attempt)
        try:
            before = self.store.read(key).decode(errors="replace")
        except StoreError:
            before = f"shard {shard_id}, attempt {attempt}, run {self.run_id}, {this_process()}\n\n"
        try:
            self.store.replace(key, (before + text)[-_LOG_CHARACTERS:].encode())
        except StoreError as error:
            log.warning("%s; without it: %s", error, text)

    def _read_dataset(self, source: Mapping[str, JSON], fingerprint: str) -> Dataset:
        return self._load_dataset(DatasetSpec.model_validate(source), fingerprint)

    def _load_dataset(self, spec: DatasetSpec, fingerprint: str) -> Dataset:
        if self._dataset is None or self._dataset[0] != spec or self._dataset[1].fingerprint != fingerprint:
            self._dataset = (spec, load_spec_dataset(spec))
        data = self._dataset[1]
        if data.fingerprint != fingerprint:
            raise DataError(
                f"the data set {spec.kind} ({spec.path or 'embedded'}) is not the one this shard was "
                f"planned with "
                f"(fingerprint {data.fingerprint}, expected {fingerprint}): restore the file, or use a new "
                f"results folder"
            )
        return data


def passing(error: BaseException) -> bool:
    """Return whether the error may be temporary, so that the shard should be launched again (see
    :func:`workers.failures.is_transient`)."""
    return is_transient(error) or isinstance(error, (StoreError, Superseded))


def _failure_json(failure: GroupFailure) -> dict[str, JSON]:
    return {name: value for name, value in dataclasses.asdict(failure).items() if name != "trace"}


def _failures_text(failures: Sequence[GroupFailure]) -> str:
    """One line per failed group, and every traceback once."""
    lines = [f"group {f.group} of cell {f.cell_id}: {f.kind}: {f.message}" for f in failures]
    return "\n".join([*lines, *dict.fromkeys(f.trace for f in failures if f.trace)]) + "\n"
