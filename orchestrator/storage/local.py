"""A results folder on a local disk or a shared POSIX file system.

A results folder is a set of small immutable objects. The central method is
:meth:`LocalStore.publish_new`: it writes and fsyncs a temporary file, then links it to its name. A
hard link fails if the name exists, so two writers cannot overwrite each other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from orchestrator.storage.base import ONE_OBJECT_ERRORS, Entry, Missing, Store, StoreError, Unreadable
from workers.types import EditSweepError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

Answer = TypeVar("Answer")

_TEMPORARY = ".tmp-"
_NO_FILE = errno.EINVAL
_CAUSES: Mapping[int, str] = {
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the device reports an I/O error",
    errno.ESTALE: "the network file system lost the file (stale handle)",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the path is too long",
    errno.EMFILE: "too many open files",
    errno.EISDIR: "it is a folder, not a file",
    errno.ELOOP: "a link that leads nowhere",
    _NO_FILE: "it is no regular file",
}

_MAY_PASS = frozenset((errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT))
READ_PAUSES = (0.1, 0.5)
"""Seconds before each further try to read a file that a device or a network reports an error of."""


class LocalStore(Store):
    """A folder on a disk or on a shared POSIX file system that has hard links.

    ``LocalStore(path)`` creates nothing. A folder is created with its first object.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        name = os.path.expanduser(root)  # leaves "~name" unchanged if there is no such user
        try:
            usable = b"\0" not in os.fsencode(name)
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise EditSweepError(f"{os.fspath(root)!r} cannot name a folder")
        if name.startswith("~"):
            raise EditSweepError(f"{name}: there is no such user; give ./{name} for a folder of that name")
        self.root = Path(name).absolute()

    def _path(self, key: str) -> Path:
        parts = key.split("/") if key else []
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"not a key: {key!r}")
        return self.root.joinpath(*parts)

    def is_folder(self) -> bool:
        """Return whether there is a folder of the store's name."""
        with _store_errors("read", self.root):
            return self.root.is_dir()

    def publish_new(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _store_errors("write", path), self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                # Over NFS the reply to a successful link can be lost. The client repeats the
                # request, which then fails because the name exists.
                if os.stat(temporary).st_nlink != 2:
                    return False
            _sync_folder(path.parent)
        return True

    def replace(self, key: str, data: bytes, settle: bool = True) -> None:
        path = self._path(key)
        with _store_errors("write", path), self._temporary(path, data) as temporary:
            try:
                os.replace(temporary, path)
            except IsADirectoryError:  # not ours, so not deleted
                path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.aside"))
                os.replace(temporary, path)
            if settle:
                _sync_folder(path.parent)

    @contextlib.contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        """A complete, fsynced file in the folder of ``path``, removed when the block ends."""
        self._make_folder(path.parent)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _make_folder(self, folder: Path) -> None:
        """Create the missing folders. Each one's entry in its parent is fsynced: without it a crash
        can lose the folder with its files."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            if folder == folder.parent:
                break
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _sync_folder(new.parent)

    def read(self, key: str) -> bytes:
        def whole(path: Path) -> bytes:
            with _open_file(path) as file:
                return file.read()

        return self._read(key, whole)

    def open(self, key: str) -> BinaryIO:
        return self._read(key, _open_file)

    def _read(self, key: str, read: Callable[[Path], Answer]) -> Answer:
        path = self._path(key)
        with _store_errors("read", path):
            for pause in READ_PAUSES:
                try:
                    return read(path)
                except OSError as error:
                    if error.errno not in _MAY_PASS:
                        raise
                time.sleep(pause)
            return read(path)

    def list(self, folder: str) -> list[Entry]:
        path = self._path(folder)
        prefix = f"{folder}/" if folder else ""
        entries = []
        with _store_errors("list", path):
            try:
                with os.scandir(path) as found:
                    for item in found:
                        if item.name.startswith(_TEMPORARY):
                            continue
                        try:
                            is_folder = item.is_dir()
                            size = 0 if is_folder else item.stat().st_size
                        except OSError:
                            if not item.is_symlink():
                                continue  # it has just been deleted
                            is_folder, size = False, 0  # a link that leads nowhere
                        entries.append(Entry(prefix + item.name, item.name, is_folder, size))
            except FileNotFoundError:
                return []
        return sorted(entries, key=lambda entry: entry.name)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with _store_errors("read", path):
            try:
                path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def move(self, key: str, target: str, instead: bytes | None = None) -> None:
        path, new = self._path(key), self._path(target)
        if not self.exists(key):
            return
        with _store_errors("write", new):
            self._make_folder(new.parent)
            linked = instead is not None and not stat.S_ISDIR(path.lstat().st_mode)
            if linked:  # the name is then never free in between: another process could take it
                try:
                    os.link(path, new, follow_symlinks=False)
                except PermissionError:  # a file of another user
                    linked = False
            if not linked:
                path.rename(new)
            _sync_folder(new.parent)
            _sync_folder(path.parent)
        if instead is not None:
            self.replace(key, instead)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _store_errors("delete", path):
            try:
                path.unlink(missing_ok=True)
            except IsADirectoryError:
                return  # not an object

    def delete_folder(self, folder: str) -> None:
        if not folder:
            raise ValueError("refusing to delete the whole results folder")
        path = self._path(folder)
        with _store_errors("delete", path):
            # A worker that was declared dead may still add a file. What remains after three tries
            # is deleted by the next call.
            for _ in range(3):
                try:
                    shutil.rmtree(path)
                    break
                except FileNotFoundError:
                    if not path.exists():
                        break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise

    def sync(self, folder: str = "") -> None:
        path = self._path(folder)
        with _store_errors("write", path), contextlib.suppress(FileNotFoundError):
            _sync_folder(path)

    def tidy(self, folder: str, older_than_s: float = 3600.0) -> None:
        path = self._path(folder)
        limit = time.time() - older_than_s
        with _store_errors("delete", path), contextlib.suppress(FileNotFoundError):
            for item in path.glob(f"{_TEMPORARY}*"):
                with contextlib.suppress(FileNotFoundError):
                    if item.stat().st_mtime < limit:
                        item.unlink()

    def filesystem(self) -> tuple[FileSystem, str]:
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), self.root.as_posix()

    def where(self, key: str = "") -> str:
        return str(self._path(key))


def _open_file(path: Path) -> BinaryIO:
    """Open a regular file. A pipe would wait for its writer, a device may never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "a link that leads nowhere") from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else _NO_FILE, "it is no regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _store_errors(action: str, path: Path) -> Iterator[None]:
    """Convert an operating system error into a :class:`StoreError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(action, str(path), "no such file") from error
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0) or error.strerror or str(error)
        kind = Unreadable if action == "read" and error.errno in ONE_OBJECT_ERRORS else StoreError
        raise kind(action, str(path), cause) from error
