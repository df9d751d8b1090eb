"""One driver per results folder.

    with acquire(store, run_id, say=console.warn) as lock:
        ...
        lock.check()            # raises LockLost if another driver took the folder over

Claims are numbered and created without overwriting; the highest number owns the folder. While it
lives, its owner counts a heartbeat up. An observer on the same machine looks the process up; any
other watches the counter by its own monotonic clock, so clocks need not agree. A dead owner is
succeeded by the next number, so two observers can never both win, and an owner that wakes up after
that sees the higher number and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from orchestrator.storage.base import Missing, Store, StoreError
from orchestrator.storage.paths import ResultsPaths
from workers.types import JSON, EditSweepError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""A counter that stands still for this long belongs to a dead owner."""

_RELEASED = -1


class Locked(EditSweepError):
    """Another driver is at work in the results folder."""


class LockLost(EditSweepError):
    """Another driver took this folder over, because this one seemed dead for a while."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Owner of a claim, as far as it is known."""

    number: int
    owner: str
    run_id: str
    host: str
    pid: int
    space: str
    started: float

    def alive_here(self) -> bool | None:
        """Return whether the owner's process runs, if it is of this machine; None if that cannot be
        seen from here, or if it is stopped (Ctrl-Z, a debugger)."""
        if (self.host, self.space) != (socket.gethostname(), _process_space()):
            return None
        try:
            process = psutil.Process(self.pid)
            # one that was killed and not yet waited for by its parent still has its number
            if (
                abs(float(process.create_time()) - self.started) >= 2
                or process.status() == psutil.STATUS_ZOMBIE
            ):
                return False
            # one that is stopped may never go on: its heartbeat decides
            return None if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else True
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass
class Lock:
    """A held lock. Its thread keeps the heartbeat; leaving the ``with`` block releases it."""

    store: Store
    number: int
    paths: ResultsPaths = field(default_factory=ResultsPaths)
    beat_seconds: float = BEAT_SECONDS
    lost: bool = False
    _seen: float = field(default_factory=time.monotonic)
    """The last moment at which the lock was surely still ours."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._keep, name="editsweep-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self.lost:
            with contextlib.suppress(StoreError):  # then the next driver finds a dead owner
                self.store.replace(self.paths.lock_beat(self.number), b"%d" % _RELEASED)

    def check(self) -> None:
        """Raise :class:`LockLost` if the folder has another owner by now.

        Asks the store if the heartbeat has not done so lately: a process that wakes up from a pause
        must not act first.
        """
        if not self.lost and time.monotonic() - self._seen > 2 * self.beat_seconds:
            self._look()
        if self.lost:
            raise LockLost(
                "another `editsweep run` took this results folder over while this one did not answer; what "
                "this one "
                "committed is safe, and it stops now"
            )

    def _look(self) -> None:
        now = time.monotonic()
        # a claim is removed only once it has been succeeded: by then its successor may have
        # finished and gone, too
        succeeded = _highest(self.store, self.paths) > self.number
        if succeeded or not self.store.exists(self.paths.lock_claim(self.number)):
            self.lost = True
        else:
            self._seen = now

    def _keep(self) -> None:
        count = 1
        while not self._stop.wait(self.beat_seconds):
            try:
                self._look()
                if self.lost:
                    return
                self.store.replace(self.paths.lock_beat(self.number), b"%d" % count)
            except EditSweepError:
                continue  # a full disk or a pause of the file system: the next beat may come through
            count += 1


def acquire(
    store: Store,
    run_id: str,
    say: Callable[[str], None],
    paths: ResultsPaths | None = None,
    beat_seconds: float = BEAT_SECONDS,
    silent_seconds: float = SILENT_SECONDS,
) -> Lock:
    """Take the folder, or raise :class:`Locked`. ``say`` is told when a dead owner's lock is taken
    over."""
    paths = paths or ResultsPaths()
    while True:
        number = _highest(store, paths)
        if number:
            takeover = _is_free(store, paths, number, silent_seconds, say)
            if takeover:
                say(takeover)
        mine: dict[str, JSON] = {
            "owner": uuid.uuid4().hex,
            "run_id": run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "space": _process_space(),
            "started": psutil.Process().create_time(),
        }
        if store.publish_new(paths.lock_claim(number + 1), json.dumps(mine, sort_keys=True).encode()):
            for old in _claims(store, paths):
                if old <= number:
                    store.delete(paths.lock_claim(old))
                    store.delete(paths.lock_beat(old))
            return Lock(store, number + 1, paths, beat_seconds)


def owner(store: Store, paths: ResultsPaths | None = None) -> Owner | None:
    """The driver at work in the folder, by its last claim; None if it was released, or is known to
    be dead."""
    paths = paths or ResultsPaths()
    number = _highest(store, paths)
    holder = _read(store, paths, number) if number else None
    if holder is None or _count(store, paths, number) == _RELEASED or holder.alive_here() is False:
        return None
    return holder


def _is_free(
    store: Store, paths: ResultsPaths, number: int, silent: float, say: Callable[[str], None]
) -> str:
    """Raise :class:`Locked` if claim ``number`` is alive; otherwise the message of the takeover (""
    if released)."""
    count = _count(store, paths, number)
    if count == _RELEASED:
        return ""
    holder = _read(store, paths, number)
    if holder is None:
        return f"the lock of {store.where()} is unreadable; taking it over"
    alive = holder.alive_here()
    if alive is None:
        say(
            f"the results folder is locked by {holder}; watching its heartbeat for up to {silent:.0f} seconds"
        )
        alive = _beats(store, paths, number, count, silent)
    if alive:
        raise Locked(
            f"{store.where()} is in use by another `editsweep run` ({holder}, run {holder.run_id}); "
            "wait for it to end, stop it, or give another folder with --results"
        )
    return f"the last run ({holder}) ended without releasing the results folder; taking over"


def _beats(store: Store, paths: ResultsPaths, number: int, count: int, silent: float) -> bool:
    """Return whether the counter moves within ``silent`` seconds of our own clock."""
    end = time.monotonic() + silent
    while time.monotonic() < end:
        time.sleep(min(0.5, silent / 4))
        now = _count(store, paths, number)
        if now == _RELEASED:
            return False
        if now != count:
            return True
    return False


def _claims(store: Store, paths: ResultsPaths) -> list[int]:
    names = (entry.name.partition(".") for entry in store.list(paths.lock))
    return sorted(int(stem) for stem, _, kind in names if stem.isdecimal() and kind == "json")


def _highest(store: Store, paths: ResultsPaths) -> int:
    return max(_claims(store, paths), default=0)


def _read(store: Store, paths: ResultsPaths, number: int) -> Owner | None:
    try:
        value: Mapping[str, JSON] = json.loads(store.read(paths.lock_claim(number)))
        return Owner(
            number=number,
            owner=str(value["owner"]),
            run_id=str(value["run_id"]),
            host=str(value["host"]),
            pid=int(value["pid"]),
            space=str(value["space"]),
            started=float(value["started"]),
        )
    except (Missing, ValueError, KeyError, TypeError):
        return None


def _count(store: Store, paths: ResultsPaths, number: int) -> int:
    try:
        return int(store.read(paths.lock_beat(number)))
    except (Missing, ValueError):
        return 0


def _process_space() -> str:
    """Two processes with equal values see each other's process ids: same boot, same container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
