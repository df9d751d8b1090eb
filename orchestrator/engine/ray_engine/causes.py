"""Errors between a Ray worker and the driver.

Not every exception can be pickled, and Ray makes another class of those that can; so a worker
raises a :class:`TaskFailed`.
"""

from __future__ import annotations

from ray.exceptions import RayTaskError

from orchestrator.engine.causes import Cause


class TaskFailed(Exception):
    """An error in a worker: its cause as plain data."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause

    def __str__(self) -> str:
        return str(self.cause)


def cause_of(error: BaseException | None) -> Cause:
    """The cause of what Ray raised in the driver. An error that no worker raised tells of a lost
    worker."""
    if error is None:
        return Cause("WorkerLost", "the worker process or its node was lost")
    if isinstance(error, RayTaskError):
        raised = error.cause
        return raised.cause if isinstance(raised, TaskFailed) else Cause.of(raised)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Cause(type(error).__name__, lines[-1][:300] if lines else "")
