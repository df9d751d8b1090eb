"""Endings that come from outside: SIGTERM and SIGHUP.

with ended_by_signal(view.note):
    ...                           # SIGTERM raises SystemExit(143) here, so that cleanup runs
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)

CLEANUP_SECONDS = 30.0
"""Seconds that the cleanup after a signal may take before the process ends without it."""


@contextmanager
def ended_by_signal(say: Callable[[str], None]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise ``SystemExit`` with the code that a shell gives such an end, 128 +
    the signal's number. A second one ends the process at once. ``say`` gets one line.

    Does nothing outside the main thread, where signal handlers cannot be set, and for a signal that
    the caller ignores (as ``nohup`` does) or handles itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    came: list[int] = []
    timers: list[threading.Timer] = []

    def handle(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
        came.append(number)
        timers.append(threading.Timer(CLEANUP_SECONDS, os._exit, (128 + number,)))
        timers[0].daemon = True
        timers[0].start()
        say(f"ended by {signal.Signals(number).name}; run the same command again to continue")
        raise SystemExit(128 + number)

    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    except BaseException:
        if came:  # a library may have put another exception in the place of ours
            raise SystemExit(128 + came[0]) from None
        raise
    finally:
        for timer in timers:
            timer.cancel()
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Undo afterwards what a library does to the handlers of these signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
