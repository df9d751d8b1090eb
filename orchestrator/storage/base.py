"""The interface that all results I/O goes through.

Independent of torch, Ray, Parquet, and of the contents of the objects.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, ClassVar

from workers.types import EditSweepError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


class StoreError(EditSweepError):
    """Results cannot be read or written. The message names path and cause, which are also the
    attributes ``path`` and ``cause``."""

    def __init__(self, action: str, path: str, cause: str) -> None:
        super().__init__(action, path, cause)  # pickle calls the class with these arguments
        self.action = action
        self.path = path
        self.cause = cause

    def __str__(self) -> str:
        return f"cannot {self.action} {self.path}: {self.cause}"


class Missing(StoreError):
    """The object does not exist, or no longer exists."""


class Damaged(EditSweepError):
    """An object is truncated, altered, or not written by editsweep. The message names it and the
    check that failed."""


ONE_OBJECT_ERRORS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ESTALE, errno.EINVAL, errno.ENXIO)
)
"""Errors (errno) of reading one object, not of the whole storage."""


class Unreadable(StoreError, Damaged):
    """Something stands under an object's name that cannot be read, although the storage answers: a
    folder, a link to nothing, a file without permission or on a bad sector. Whoever can do without
    the object treats it as damaged."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder. ``size`` is in bytes, 0 for a folder and for a link to nothing."""

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

    Every method raises :class:`StoreError` if the storage refuses.
    """

    folders_take_names: ClassVar[bool] = True
    """A folder and an object cannot have the same name."""

    @abstractmethod
    def publish_new(self, key: str, data: bytes) -> bool:
        """Create the object ``key`` atomically and durably. Return False, and change nothing, if
        the key exists."""

    @abstractmethod
    def replace(self, key: str, data: bytes, settle: bool = True) -> None:
        """Write ``key`` atomically and durably, whether or not it exists. Readers see the whole old
        or the whole new value.

        With ``settle=False`` the name may become durable only when the next object is published
        into the same folder.
        """

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises :class:`Missing` and :class:`Unreadable`."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A seekable reader, for reading a part of an object. Raises :class:`Missing` and
        :class:`Unreadable`."""

    @abstractmethod
    def list(self, folder: str) -> list[Entry]:
        """List the entries directly in ``folder``, sorted by name; empty if there is no such
        folder."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether the key, or a folder of that name, exists."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove one object. Nothing happens if it does not exist."""

    @abstractmethod
    def move(self, key: str, target: str, instead: bytes | None = None) -> None:
        """Rename whatever stands under ``key`` (a folder or an unreadable file too) to ``target``,
        which must be free; then write ``instead`` under ``key``, durably. Nothing happens if
        ``key`` does not exist."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Remove everything under ``folder``. Nothing happens if it does not exist."""

    @abstractmethod
    def sync(self, folder: str = "") -> None:
        """Make deletions in ``folder`` durable. (Publishing is durable without it.)"""

    @abstractmethod
    def tidy(self, folder: str, older_than_s: float = 3600.0) -> None:
        """Remove temporary files of interrupted writes directly in ``folder`` that are older than
        ``older_than_s`` seconds."""

    @abstractmethod
    def filesystem(self) -> tuple[FileSystem, str]:
        """Arrow's view of the storage and the path of the results folder in it, for scans of many
        files."""

    @abstractmethod
    def where(self, key: str = "") -> str:
        """The object's full name, for messages and for other programs."""


def put_aside(store: Store, key: str, aside: str, instead: bytes | None = None) -> None:
    """Rename a damaged object to the key ``aside``, or to the first free one of ``aside.2``,
    ``aside.3``, ...; then write ``instead`` in its place."""
    free = next(
        name for name in (aside, *(f"{aside}.{n}" for n in range(2, 10_000))) if not store.exists(name)
    )
    store.move(key, free, instead)
