"""The verbs that all results I/O goes through.

Knows nothing of torch, Ray, Parquet or of what the objects mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from workers.types import EditSweepError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


class StoreError(EditSweepError):
    """Results cannot be read or written. The message names path and cause; ``path`` and ``cause``
    hold them apart."""

    def __init__(self, action: str, path: str, cause: str) -> None:
        super().__init__(action, path, cause)  # the arguments as given, so that it can be pickled
        self.action = action
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot {self.action} {self.path}: {self.cause}"


class Missing(StoreError):
    """The object does not exist (any more): a reader starts over, everyone else has lost
    something."""


class Damaged(EditSweepError):
    """An object is truncated, altered or foreign. The message names it and says how it was
    noticed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder. ``size`` is in bytes, 0 for a folder."""

    key: str
    name: str
    folder: bool
    size: int


class Store(ABC):
    """Whole objects under relative POSIX keys (see
    :class:`~orchestrator.storage.paths.ResultsPaths`).

    >>> store = LocalStore("results/demo")                           # doctest: +SKIP
    >>> store.publish_new("table/000001.parquet", data)              # doctest: +SKIP
    True

    Every verb raises :class:`StoreError` with path and cause if the storage refuses.
    """

    @abstractmethod
    def publish_new(self, key: str, data: bytes) -> bool:
        """Makes ``data`` appear durably under ``key`` as a whole. False, and no change, if the key
        is taken."""

    @abstractmethod
    def replace(self, key: str, data: bytes, settle: bool = True) -> None:
        """Makes ``data`` the durable value of ``key``, taken or not. Readers see the old or the new
        value, whole.

        With ``settle=False`` its name may become durable only with the next object that is
        published into the same folder.
        """

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises :class:`Missing`."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A seekable reader, for objects of which only the end is wanted. Raises
        :class:`Missing`."""

    @abstractmethod
    def list(self, folder: str) -> list[Entry]:
        """List the entries directly in ``folder``, sorted by name; empty if there is no such
        folder."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether the key, or a folder of that name, exists."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes one object; nothing happens if it is gone already."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Removes everything under ``folder``; nothing happens if it is gone already."""

    @abstractmethod
    def sync(self, folder: str = "") -> None:
        """Makes deletions in ``folder`` durable (publishing is durable by itself)."""

    @abstractmethod
    def tidy(self, folder: str, older_than_s: float = 3600.0) -> None:
        """Removes what interrupted writes left directly in ``folder``, if it is older than
        ``older_than_s`` seconds."""

    @abstractmethod
    def filesystem(self) -> tuple[FileSystem, str]:
        """Arrow's view of the storage and the path of the results folder in it, for scans of many
        files."""

    @abstractmethod
    def where(self, key: str = "") -> str:
        """The object's full name, for messages and for tools outside."""


def put_aside(store: Store, key: str, aside: str, instead: bytes | None = None) -> None:
    """Keeps a damaged object as evidence under the name ``aside`` and frees its own, or puts
    ``instead`` there."""
    try:
        data = store.read(key)
    except Missing:
        return
    store.publish_new(aside, data)
    if instead is None:
        store.delete(key)
    else:
        store.replace(key, instead)
