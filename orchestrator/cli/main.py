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
