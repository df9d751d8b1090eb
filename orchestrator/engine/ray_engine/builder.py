"""A Ray actor that builds artifacts, independent of the plan."""

from __future__ import annotations

import threading

from orchestrator.engine.causes import Cause
from orchestrator.engine.ray_engine.causes import TaskFailed
from orchestrator.engine.worker import Worker
from workers.artifacts.base import ArtifactSpec
from workers.model.config import ModelConfig


class Builder:
    """An actor that builds artifacts with one loaded model. A second thread answers
    :meth:`progress` and :meth:`stop` during the construction."""

    def __init__(self, root: str, run_id: str, save_seconds: float, own_code: bool = False) -> None:
        self.worker = Worker(root, run_id, save_seconds, own_code)
        self.last: tuple[int, int, str] | None = None
        self.stopped = threading.Event()

    def build(self, spec: ArtifactSpec, model: ModelConfig, threads: int) -> None:
        self.last = None
        try:
            self.worker.build(spec, model, threads, self._record, self.stopped.is_set)
        except Exception as error:
            raise TaskFailed(Cause.of(error)) from error

    def _record(self, done: int, total: int, what: str) -> None:
        self.last = (done, total, what)

    def progress(self) -> tuple[int, int, str] | None:
        """Last progress (done, total, text) of the present artifact; None before the first."""
        return self.last

    def stop(self) -> None:
        self.stopped.set()
