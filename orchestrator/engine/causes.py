"""The cause of a failed shard or artifact as plain data, which can be sent between processes."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.storage.base import Missing, StoreError


@dataclass(frozen=True, slots=True)
class Cause:
    """An error's class and message. ``storage`` is True if the storage itself failed, so that every
    other shard would fail too."""

    kind: str
    message: str
    storage: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Cause:
        # A missing object is not a failure of the storage itself.
        storage = isinstance(error, StoreError) and not isinstance(error, Missing)
        return cls(type(error).__name__, str(error)[:2000], storage)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"
