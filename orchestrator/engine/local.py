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

from orchestrator.engine.causes import Cause
from orchestrator.engine.machine import check_memory
from orchestrator.engine.run_state import RunState
from orchestrator.engine.worker import Worker, passing
from orchestrator.storage.lock import LockLost
from workers.artifacts.base import ArtifactSpec, Stopped

LEAVE_SECONDS = 10.0
"""Seconds after the first Ctrl-C in which the current step may be committed."""


def run_local(run_state: RunState, max_actors: int | None = None) -> None:
    """Run every shard of the plan. ``max_actors`` is ignored: this process is the only actor."""
    plan = run_state.plan
    resources = plan.spec.engine.resources
    check_memory(
        plan.common.model, plan.weight_bytes, resources.gpu, resources.memory_gb, where="this machine"
    )
    worker = Worker(
        run_state.store.where(),
        run_state.run_id,
        plan.spec.engine.checkpoint_seconds,
        own_code=plan.common.model.trust_remote_code,
    )
    with _ctrl_c(run_state) as stop:
        try:
            build_artifacts(worker, run_state, stop)
            for shard in () if run_state.artifacts_only else plan.shards:
                if stop.is_set():
                    break
                _run_shard(worker, run_state, shard.shard_id, stop)
        except KeyboardInterrupt:
            stop.set()
        run_state.interrupted = stop.is_set()


def build_artifacts(worker: Worker, run_state: RunState, stop: threading.Event) -> None:
    """Build the missing artifacts. A failure is reported here; the shards that need the artifact
    fail later with the same cause."""
    missing = run_state.missing_artifacts()
    for number, spec in enumerate(missing, start=1):
        if stop.is_set():
            return

        def report(done: int, total: int, what: str, spec: ArtifactSpec = spec) -> None:
            run_state.artifact_step(spec, done, total, what)

        try:
            worker.build(
                spec, run_state.plan.common.model, run_state.plan.common.threads, report, stop.is_set
            )
            run_state.artifact_built(spec, number, len(missing))
        except Stopped:
            return
        except KeyboardInterrupt:
            stop.set()
        except LockLost:
            raise
        except Exception as error:
            run_state.artifact_failed(spec, Cause.of(error))
        run_state.check()


def _run_shard(worker: Worker, run_state: RunState, shard_id: str, stop: threading.Event) -> None:
    plan = run_state.plan
    tries = plan.spec.engine.max_failures + 1
    manifest = plan.manifest(run_state.shards[shard_id])
    for number in range(1, tries + 1):
        run_state.started(shard_id)
        try:
            for step in worker.run(manifest):
                run_state.stepped(step)
                if stop.is_set() and step.tick < step.ticks:
                    return
        except LockLost:
            raise
        except Exception as error:
            cause = Cause.of(error)
            if number < tries and passing(error) and not stop.is_set():
                run_state.retrying(shard_id, number, cause)
                continue
            run_state.failed(shard_id, number, cause)
            return
        run_state.finished(shard_id)
        return


@contextmanager
def _ctrl_c(run_state: RunState) -> Iterator[threading.Event]:
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
        run_state.view.note(
            f"stopping: the current step is committed if that takes less than {LEAVE_SECONDS:.0f} seconds "
            "(Ctrl-C again to leave at once)"
        )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        timeout.cancel()
        signal.signal(signal.SIGINT, before)
