"""The in-process engine: runs the shards one after another in this process, so that a debugger
works. Same interface as the Ray engine.

After one Ctrl-C the run ends when the current step is committed, or after ten seconds. After a
second Ctrl-C it ends at once. A step that was not committed is run again by the next run.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from orchestrator.engine.books import Books
from orchestrator.engine.causes import Cause
from orchestrator.engine.machine import check_memory
from orchestrator.engine.worker import Bench, passing
from orchestrator.storage.lock import LockLost
from workers.artifacts.base import ArtifactSpec, Stopped

LEAVE_SECONDS = 10.0
"""Seconds after the first Ctrl-C in which the current step may be committed."""


def run_local(books: Books, max_actors: int | None = None) -> None:
    """Run every shard of the plan. ``max_actors`` is ignored: this process is the only actor."""
    plan = books.plan
    resources = plan.spec.engine.resources
    check_memory(
        plan.common.model, plan.weight_bytes, resources.gpu, resources.memory_gb, where="this machine"
    )
    bench = Bench(
        books.store.where(),
        books.run_id,
        plan.spec.engine.checkpoint_seconds,
        own_code=plan.common.model.trust_remote_code,
    )
    with _ctrl_c(books) as stop:
        try:
            build_artifacts(bench, books, stop)
            for shard in () if books.artifacts_only else plan.shards:
                if stop.is_set():
                    break
                _run_shard(bench, books, shard.shard_id, stop)
        except KeyboardInterrupt:
            stop.set()
        books.interrupted = stop.is_set()


def build_artifacts(bench: Bench, books: Books, stop: threading.Event) -> None:
    """Build the missing artifacts. A failure is reported here; the shards that need the artifact
    fail later with the same cause."""
    missing = books.missing_artifacts()
    for number, spec in enumerate(missing, start=1):
        if stop.is_set():
            return

        def report(done: int, total: int, what: str, spec: ArtifactSpec = spec) -> None:
            books.artifact_step(spec, done, total, what)

        try:
            bench.build(spec, books.plan.common.model, books.plan.common.threads, report, stop.is_set)
            books.artifact_built(spec, number, len(missing))
        except Stopped:
            return
        except KeyboardInterrupt:
            stop.set()
        except LockLost:
            raise
        except Exception as error:
            books.artifact_failed(spec, Cause.of(error))
        books.check()


def _run_shard(bench: Bench, books: Books, shard_id: str, stop: threading.Event) -> None:
    plan = books.plan
    tries = plan.spec.engine.max_failures + 1
    manifest = plan.manifest(books.shards[shard_id])
    for number in range(1, tries + 1):
        books.started(shard_id)
        try:
            for step in bench.run(manifest):
                books.stepped(step)
                if stop.is_set() and step.tick < step.ticks:
                    return
        except LockLost:
            raise
        except Exception as error:
            cause = Cause.of(error)
            if number < tries and passing(error) and not stop.is_set():
                books.retrying(shard_id, number, cause)
                continue
            books.failed(shard_id, number, cause)
            return
        books.finished(shard_id)
        return


@contextmanager
def _ctrl_c(books: Books) -> Iterator[threading.Event]:
    """Handle Ctrl-C: the first one sets the event; the second one, or the end of
    :data:`LEAVE_SECONDS`, raises KeyboardInterrupt.

    Does nothing outside the main thread, where signal handlers cannot be set.
    """
    stop = threading.Event()
    main = threading.main_thread()
    if threading.current_thread() is not main or main.ident is None:
        yield stop
        return
    # A signal to the main thread also interrupts a blocking call.
    timeout = threading.Timer(LEAVE_SECONDS, signal.pthread_kill, (main.ident, signal.SIGINT))
    timeout.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        timeout.start()
        books.view.note(
            f"stopping: the current step is committed if that takes less than {LEAVE_SECONDS:.0f} seconds "
            "(Ctrl-C again to leave at once)"
        )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        timeout.cancel()
        signal.signal(signal.SIGINT, before)
