"""State of one run in the driver: finished shards, gathering of their rows, failures, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from orchestrator.engine.causes import Cause
from orchestrator.engine.statistics import read_statistics, say_unresolved
from orchestrator.engine.worker import StepReport
from orchestrator.planning.plan import Plan
from orchestrator.planning.work import Shard
from orchestrator.results.artifact_store import ArtifactStore
from orchestrator.results.journal import Journal
from orchestrator.results.table import CentralTable
from orchestrator.storage.base import Store
from orchestrator.storage.paths import ResultsPaths
from workers.artifacts.base import ArtifactSpec, in_order
from workers.artifacts.stats import KIND as SECOND_MOMENT
from workers.types import JSON, EditSweepError

GATHER_SHARDS = 64
"""Finished shards that wait before they are gathered, at most."""

GATHER_SECONDS = 60.0
"""Seconds that a finished shard waits before it is gathered, at most."""


@dataclass(frozen=True, slots=True)
class Safety:
    """Time that one run spent on making its results durable: in the actors (journal) and in the
    driver (gathering)."""

    journal_seconds: float = 0.0
    actor_seconds: float = 0.0
    """Time of all actors between the start and the end of their shards, including loading the
    model."""
    gather_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def share(self) -> float:
        """Upper bound of its share of the wall time. It assumes that the actors are idle while the
        driver gathers."""
        journal = self.journal_seconds / self.actor_seconds if self.actor_seconds else 0.0
        return journal + (self.gather_seconds / self.wall_seconds if self.wall_seconds else 0.0)


@dataclass(frozen=True, slots=True)
class ShardError:
    """The error of a shard that did not finish in any of its attempts. ``log``: full name of the
    log, or of the shard's folder."""

    shard_id: str
    kind: str
    message: str
    attempts: int
    log: str


class View(Protocol):
    """Receiver of a run's progress. :mod:`orchestrator.cli.console` has the implementations for the
    terminal."""

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
class RunState:
    """State of one run, which the engine updates: reports progress to the view, gathers finished
    shards, collects failures.

    ``check`` raises :class:`~orchestrator.storage.lock.LockLost` if another driver has taken the
    folder over.
    """

    plan: Plan
    store: Store
    run_id: str
    view: View
    check: Callable[[], None] = lambda: None
    paths: ResultsPaths = field(default_factory=ResultsPaths)
    artifacts_only: bool = False
    """True if the engine builds artifacts and runs no shard."""
    errors: dict[str, ShardError] = field(default_factory=dict)
    interrupted: bool = False
    safety: Safety = Safety()
    _began: float = field(default_factory=time.monotonic)
    _ready: list[str] = field(default_factory=list)
    _gathered: float = field(default_factory=time.monotonic)

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
    def artifacts(self) -> ArtifactStore:
        return ArtifactStore(self.store, self.paths)

    def missing_artifacts(self) -> list[ArtifactSpec]:
        """Missing artifacts of the remaining shards, each after the artifacts that it needs."""
        keys = dict.fromkeys(key for shard in self.plan.shards for key in self.plan.artifact_keys(shard))
        if self.artifacts_only:
            keys = dict.fromkeys(self.plan.artifacts)
        return in_order((self.plan.artifacts[key] for key in keys), self.artifacts.has)

    def artifact_step(self, spec: ArtifactSpec, done: int, total: int, what: str) -> None:
        self.view.artifact_step(artifact_title(spec), done, total, what)

    def artifact_built(self, spec: ArtifactSpec, number: int, total: int) -> None:
        self.view.artifact_ended(artifact_title(spec))
        self.view.note(f"artifact {number}/{total} built: {artifact_title(spec)}")
        if spec.kind == SECOND_MOMENT:
            for text in say_unresolved(self.plan, read_statistics(self.plan, self.store, only={spec.key})):
                self.view.warn(text)

    def artifact_failed(self, spec: ArtifactSpec, cause: Cause) -> None:
        """Record the failure of an artifact. It is not built again in this run, and the shards
        that need it fail with the same cause.

        Raises :class:`~workers.types.EditSweepError` if the storage failed.
        """
        self.view.artifact_ended(artifact_title(spec))
        _raise_storage_error(cause)
        text = self.artifacts.failure(spec, self.run_id) or str(cause)
        self.artifacts.record_failure(spec, self.run_id, text)
        self.view.warn(f"artifact {artifact_title(spec)} failed: {text.splitlines()[0][:500]}")

    def title(self, shard: Shard) -> str:
        sizes = "/".join(map(str, self.plan.group_sizes(shard)))
        return f"{self.plan.variants[shard.variant].label} T={sizes} {shard.shard_id[:6]}"

    def started(self, shard_id: str) -> None:
        """Raises :class:`~orchestrator.storage.lock.LockLost`, because a driver without the lock
        must not start a shard."""
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

    def retrying(self, shard_id: str, attempt: int, cause: Cause) -> None:
        self.view.warn(
            f"{self.title(self.shards[shard_id])} failed ({cause}); launching it again (try {attempt + 1})"
        )

    def failed(self, shard_id: str, attempts: int, cause: Cause) -> None:
        """Record the failure of a shard that is not launched again in this run.

        Raises :class:`~workers.types.EditSweepError` if the storage failed, because then every
        other shard would fail too.
        """
        _raise_storage_error(cause)
        error = ShardError(
            shard_id, cause.kind, cause.message, attempts, self.store.where(self.paths.shard(shard_id))
        )
        try:
            recorded = self.journal.errors(shard_id)
        except EditSweepError:
            recorded = {}
        if recorded:
            last = max(recorded)
            error = ShardError(
                shard_id,
                str(recorded[last].get("kind", cause.kind)),
                str(recorded[last].get("message", cause.message)),
                attempts,
                self.store.where(self.paths.shard_log(shard_id, last)),
            )
        self.errors[shard_id] = error
        self.view.shard_ended(shard_id, ok=False)
        first_line = error.message.partition("\n")[0][:200]
        self.view.warn(f"{self.title(self.shards[shard_id])} failed: {error.kind}: {first_line}")
        self.tick()

    def tick(self) -> None:
        """Gather if enough shards have finished or :data:`GATHER_SECONDS` have passed. Engines call
        this often. Raises :class:`~orchestrator.storage.lock.LockLost`."""
        self.check()
        waited = time.monotonic() - self._gathered
        if len(self._ready) >= GATHER_SHARDS or (self._ready and waited >= GATHER_SECONDS):
            self.gather(self._ready)

    def gather(self, shard_ids: list[str] | None = None) -> None:
        """Move finished shards (None: all of the folder) into the central table."""
        began = time.monotonic()
        done = self.table.gather(self.journal, shard_ids)
        self._ready, self._gathered = [], time.monotonic()
        self.safety = replace(
            self.safety,
            gather_seconds=self.safety.gather_seconds + self._gathered - began,
            wall_seconds=self._gathered - self._began,
        )
        for shard_id in done.again:
            self.view.warn(
                f"a part of shard {shard_id} was damaged on disk; run the same command again to redo it"
            )
        for shard_id, cause in (done.refused or {}).items():
            self.errors[shard_id] = ShardError(
                shard_id, "TableError", cause, 0, self.store.where(self.paths.shard(shard_id))
            )


def _raise_storage_error(cause: Cause) -> None:
    if cause.storage:
        raise EditSweepError(f"{cause.message}; repair it and run the same command again: it continues")


def artifact_title(spec: ArtifactSpec) -> str:
    return f"{spec.kind} {spec.key[:8]}"


class Engine(Protocol):
    """Builds the artifacts and (unless ``run_state.artifacts_only``) runs the shards of ``run_state.plan``.

    Returns when all of them have ended or the user has interrupted the run (``run_state.interrupted``).
    """

    def __call__(self, run_state: RunState, max_actors: int | None) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """Result of a run. ``unfinished``: ids of the cells that are not complete in the table.
    ``errors``: by shard id."""

    plan: Plan
    run_id: str
    unfinished: tuple[str, ...]
    errors: Mapping[str, ShardError]
    failed_groups: tuple[Mapping[str, JSON], ...]
    interrupted: bool
    folder: str
    """The results folder, as its store names it."""
    safety: Safety = Safety()

    @property
    def exit_code(self) -> int:
        if self.interrupted and self.unfinished:
            return 130
        return 1 if self.unfinished else 0
