"""Entry point of the command `editsweep`. Ctrl-C ends it with one line from the first moment on: all
that takes time to import is imported where that is looked after."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its exit code."""
    _open_streams()
    with _interrupted_at_once():
        from orchestrator.cli.calls import call
    sys.exit(call(arguments))


@contextlib.contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process, which has begun nothing yet. A KeyboardInterrupt would pass
    through the imports of other packages, and some of them make another error of it."""

    def end(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    try:
        before = signal.signal(signal.SIGINT, end)
    except ValueError:  # not in the main thread, which is where Python takes signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open_streams() -> None:
    """Replace standard streams that the caller closed (``>&-``) by the null device. Otherwise the
    next file that is opened could get the number of standard output, and what a library prints
    would go into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                if not _is_open(number):
                    null = os.open(os.devnull, os.O_RDWR)
                    if null != number:
                        os.dup2(null, number)
                        os.close(null)
            setattr(sys, name, open(os.devnull, "r+" if number == 0 else "w"))  # noqa: SIM115


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
