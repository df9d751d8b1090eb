"""Transport of errors from a Ray worker to the driver.

Some exceptions cannot be pickled, and Ray changes the class of the others. A worker therefore
raises :class:`TaskFailed`, which holds the cause as plain data.
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
    """The cause of an error that Ray raised in the driver. None means that the worker was lost."""
    if error is None:
        return Cause("WorkerLost", "the worker process or its node was lost")
    if isinstance(error, RayTaskError):
        raised = error.cause
        return raised.cause if isinstance(raised, TaskFailed) else Cause.of(raised)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Cause(type(error).__name__, lines[-1][:300] if lines else "")
