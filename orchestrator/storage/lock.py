"""A lock that admits one driver per results folder.

    with acquire(store, run_id, say=console.warn) as lock:
        ...
        lock.check()            # raises LockLost if another driver took the folder over

Claims are numbered and created without overwriting. The claim with the highest number owns the
folder. The owner regularly increments a heartbeat counter. Another process on the same machine
looks up the owner's process id. A process on another machine watches the counter, by its own
monotonic clock, so clocks need not agree. If the owner is dead, the next number takes the folder
over. Two processes may publish one number one after the other, if in between its first owner has
ended and a third has cleaned up: so a new owner looks again, and gives way to a higher number. An
owner that was paused sees the higher number and stops.
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

from orchestrator.storage.base import Damaged, Missing, Store, StoreError
from orchestrator.storage.paths import ResultsPaths
from workers.types import JSON, EditSweepError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""An owner whose heartbeat counter does not change for so many seconds is considered dead."""

_RELEASED = -1


class Locked(EditSweepError):
    """Another driver owns the results folder."""


class LockLost(EditSweepError):
    """Another driver took the folder over, because this one's heartbeat had stopped."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that wrote a claim."""

    number: int
    owner: str
    run_id: str
    host: str
    pid: int
    space: str
    started: float

    def alive_here(self) -> bool | None:
        """Return whether the owner's process runs on this machine. None if it is on another machine
        or in another container, or if it is stopped (Ctrl-Z, a debugger)."""
        if (self.host, self.space) != (socket.gethostname(), _pid_namespace()):
            return None
        try:
            process = psutil.Process(self.pid)
            # A killed process keeps its id until its parent has waited for it (a zombie).
            if (
                abs(float(process.create_time()) - self.started) >= 2
                or process.status() == psutil.STATUS_ZOMBIE
            ):
                return False
            if self.pid == os.getpid():  # it holds what it beats for; a release may have failed
                return any(thread.name == _thread_name(self.owner) for thread in threading.enumerate())
            # A stopped process may never continue: its heartbeat decides.
            return None if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else True
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass
class Lock:
    """A held lock. A thread writes the heartbeat. Leaving the ``with`` block releases the lock."""

    store: Store
    number: int
    paths: ResultsPaths = field(default_factory=ResultsPaths)
    beat_seconds: float = BEAT_SECONDS
    owner: str = ""
    lost: bool = False
    _seen: float = field(default_factory=time.monotonic)
    """Time (monotonic) of the last check that found the lock still owned by this process."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._run_heartbeat, name=_thread_name(self.owner), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self.lost:
            with contextlib.suppress(StoreError):  # not released: the next driver detects a dead owner
                self.store.replace(self.paths.lock_beat(self.number), b"%d" % _RELEASED)

    def check(self) -> None:
        """Raise :class:`LockLost` if another driver has taken the folder over.

        Reads the store if the heartbeat thread has not done so recently: a process that continues
        after a pause must not act before this check.
        """
        if not self.lost and time.monotonic() - self._seen > 2 * self.beat_seconds:
            self._check_owner()
        if self.lost:
            raise LockLost(
                "another `editsweep run` took this results folder over while this one did not answer; what "
                "this one "
                "committed is safe, and it stops now"
            )

    def _check_owner(self) -> None:
        now = time.monotonic()
        # A claim is deleted only after a higher one was created; the higher one may be deleted
        # by now, too.
        taken_over = _highest(self.store, self.paths) > self.number
        if taken_over or not self.store.exists(self.paths.lock_claim(self.number)):
            self.lost = True
        else:
            self._seen = now

    def _run_heartbeat(self) -> None:
        count = 1
        while not self._stop.wait(self.beat_seconds):
            try:
                self._check_owner()
                if self.lost:
                    return
                self.store.replace(self.paths.lock_beat(self.number), b"%d" % count)
            except EditSweepError:
                continue  # a full disk or an outage of the file system: the next write may succeed
            count += 1


def acquire(
    store: Store,
    run_id: str,
    say: Callable[[str], None],
    paths: ResultsPaths | None = None,
    beat_seconds: float = BEAT_SECONDS,
    silent_seconds: float = SILENT_SECONDS,
    *,
    watch: bool = False,
) -> Lock:
    """Acquire the folder's lock, or raise :class:`Locked`. ``say`` receives a message when a dead
    owner's lock is taken over. ``watch``: believe the heartbeat alone, even of a process that is
    there: its release may have failed."""
    paths = paths or ResultsPaths()
    while True:
        number = _highest(store, paths)
        if number:
            takeover = _takeover_message(store, paths, number, silent_seconds, say, watch)
            if takeover:
                say(takeover)
        mine: dict[str, JSON] = {
            "owner": uuid.uuid4().hex,
            "run_id": run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "space": _pid_namespace(),
            "started": psutil.Process().create_time(),
        }
        claim = paths.lock_claim(number + 1)
        if store.publish_new(claim, json.dumps(mine, sort_keys=True).encode()):
            claims = _claims(store, paths)
            if max(claims, default=0) > number + 1:
                # The number was another's, which has ended and was succeeded since the first look.
                store.delete(claim)
                continue
            for old in claims:
                if old <= number:
                    _remove(store, paths, old)
            return Lock(store, number + 1, paths, beat_seconds, owner=str(mine["owner"]))


def _thread_name(owner: str) -> str:
    return f"editsweep-lock-{owner}"


def _remove(store: Store, paths: ResultsPaths, number: int) -> None:
    """Delete a claim that a higher one has replaced. It is ignored from then on, so that what
    cannot be deleted may stay."""
    for key in (paths.lock_claim(number), paths.lock_beat(number)):
        with contextlib.suppress(StoreError):
            store.delete(key)


def owner(store: Store, paths: ResultsPaths | None = None) -> Owner | None:
    """The driver that owns the folder, by the highest claim. None if the lock was released, or if
    its owner is known to be dead."""
    paths = paths or ResultsPaths()
    number = _highest(store, paths)
    holder = _read(store, paths, number) if number else None
    if holder is None or _count(store, paths, number) == _RELEASED or holder.alive_here() is False:
        return None
    return holder


def _takeover_message(
    store: Store, paths: ResultsPaths, number: int, silent: float, say: Callable[[str], None], watch: bool
) -> str:
    """The message of a takeover, "" if claim ``number`` was released. Raises :class:`Locked` if its
    owner is alive."""
    count = _count(store, paths, number)
    if count == _RELEASED:
        return ""
    holder = _read(store, paths, number)
    if holder is None:
        return f"the lock of {store.where()} is unreadable; taking it over"
    alive = holder.alive_here()
    if alive is None or (alive and watch):
        say(
            f"the results folder is locked by {holder}; watching its heartbeat for up to {silent:.0f} seconds"
        )
        alive = _heartbeat_changes(store, paths, number, count, silent)
    if alive:
        raise Locked(
            f"{store.where()} is in use by another `editsweep run` ({holder}, run {holder.run_id}); "
            "wait for it to end, stop it, or give another folder with --results"
        )
    return f"the last run ({holder}) ended without releasing the results folder; taking over"


def _heartbeat_changes(store: Store, paths: ResultsPaths, number: int, count: int, silent: float) -> bool:
    """Return whether the counter changes within ``silent`` seconds of the local clock."""
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
    except (Missing, Damaged, ValueError, KeyError, TypeError):
        return None


def _count(store: Store, paths: ResultsPaths, number: int) -> int:
    try:
        return int(store.read(paths.lock_beat(number)))
    except (Missing, Damaged, ValueError):
        return 0


def _pid_namespace() -> str:
    """Identifier of the machine's boot and of the process id namespace. Processes with equal values
    see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
