"""Build artifacts on Ray actors, before the shards that need them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.engine.causes import Cause
from orchestrator.engine.ray_engine.builder import Builder
from orchestrator.engine.ray_engine.causes import cause_of
from orchestrator.engine.run_state import RunState, artifact_title
from orchestrator.results.artifact_store import ArtifactFailed
from workers.artifacts.base import ArtifactSpec

STOP_SECONDS = 60.0
"""Seconds that builders may take to save their state."""


@dataclass
class _BuilderActor:
    """A builder actor. ``spec``: the artifact that it builds now. ``pending``: Ray reference
    of a progress request."""

    actor: Any
    spec: ArtifactSpec | None = None
    pending: Any = None

    def poll(self, run_state: RunState) -> None:
        """Report the actor's progress if its reply has arrived, then request it again. Does not
        block."""
        if self.pending is not None and ray.wait([self.pending], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                progress = ray.get(self.pending)
                if progress is not None and self.spec is not None:
                    run_state.artifact_step(self.spec, *progress)
            self.pending = None
        if self.pending is None:
            self.pending = self.actor.progress.remote()


def build_artifacts(run_state: RunState, actors: int) -> None:
    """Build the missing artifacts of the plan's shards. Each is built by one actor, after the
    artifacts that it needs.

    A failure is reported; the shards that need the artifact fail later with the same cause.
    """
    missing = run_state.missing_artifacts()
    if not missing:
        return
    engine, common = run_state.plan.spec.engine, run_state.plan.common
    builder: Any = ray.remote(Builder)
    make = builder.options(
        num_cpus=engine.resources.cpu,
        num_gpus=engine.resources.gpu,
        max_concurrency=2,
        max_restarts=engine.max_failures,
        max_task_retries=engine.max_failures,
    )
    keys = {spec.key for spec in missing}
    at_once = sum(not any(need.key in keys for need in spec.needs) for spec in missing)
    builders = [
        _BuilderActor(
            make.remote(
                run_state.store.where(),
                run_state.run_id,
                engine.checkpoint_seconds,
                own_code=common.model.trust_remote_code,
            )
        )
        for _ in range(min(actors, at_once))
    ]
    todo, failed = list(missing), set[str]()
    running: dict[Any, _BuilderActor] = {}
    done = 0
    try:
        while todo or running:
            waiting = {spec.key for spec in todo} | {
                worker.spec.key for worker in running.values() if worker.spec
            }
            for spec in list(todo):
                lost = [need for need in spec.needs if need.key in failed]
                if lost:
                    todo.remove(spec)
                    failed.add(spec.key)
                    needed = f"it needs {artifact_title(lost[0])}, which failed"
                    run_state.artifact_failed(spec, Cause(ArtifactFailed.__name__, needed))
                elif not any(need.key in waiting for need in spec.needs):
                    free = next((worker for worker in builders if worker.spec is None), None)
                    if free is None:
                        break
                    todo.remove(spec)
                    free.spec = spec
                    running[free.actor.build.remote(spec, common.model, common.threads)] = free
            for ref in ray.wait(list(running), num_returns=1, timeout=1.0)[0] if running else ():
                worker = running.pop(ref)
                built, worker.spec = worker.spec, None
                assert built is not None
                try:
                    ray.get(ref)
                    done += 1
                    run_state.artifact_built(built, done, len(missing))
                except ray.exceptions.RayError as error:
                    failed.add(built.key)
                    run_state.artifact_failed(built, cause_of(error))
            for worker in running.values():
                worker.poll(run_state)
            run_state.tick()
    except KeyboardInterrupt:
        for worker in running.values():
            worker.actor.stop.remote()
        if running:
            run_state.view.note(
                "stopping: unfinished artifacts are being saved (Ctrl-C again to leave at once)"
            )
            ray.wait(list(running), num_returns=len(running), timeout=STOP_SECONDS)
        raise
    finally:
        for worker in builders:
            ray.kill(worker.actor)
