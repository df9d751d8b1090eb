"""The cause of a failed shard or artifact as plain data that crosses the border of a process."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.storage.base import Missing, StoreError


@dataclass(frozen=True, slots=True)
class Cause:
    """An error's class and message, and whether the storage is at fault, in which case everything
    else would fail too."""

    kind: str
    message: str
    storage: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Cause:
        # An object that is missing concerns those who need it; the storage itself still works.
        storage = isinstance(error, StoreError) and not isinstance(error, Missing)
        return cls(type(error).__name__, str(error)[:2000], storage)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"
