"""One call of the command line: how it ends, with which exit code and message."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from orchestrator.cli import reading, running
from orchestrator.cli.app import INTERRUPTED, Bug, app
from orchestrator.cli.console import Output, OutputError
from workers.types import EditSweepError

_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base class of errors in the command line's arguments. Looked up by name, because newer versions
of Typer contain their own copy of click."""


app.add_typer(running.commands)
app.add_typer(reading.commands)


class _Warnings(logging.Handler):
    """Shows what the packages warn of, each text once: a file that is put aside or left out is read
    several times by one command."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._told:
            self._told.add(text)
            (Output().warn if record.levelno >= logging.WARNING else Output().note)(text)


@contextlib.contextmanager
def _told_warnings() -> Iterator[None]:
    logger, handler = logging.getLogger("orchestrator"), _Warnings()
    before = (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def call(arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code. ``arguments``: None for those of the process."""
    with _told_warnings():
        code = _run(arguments)
    return code if isinstance(code, int) else 0


def _run(arguments: Sequence[str] | None) -> object:
    code: object
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        Output().flush()
    except _UsageError as error:
        error.show()
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        Output().note("interrupted")
        code = INTERRUPTED
    except OutputError as error:
        _drop_output()
        Output().error(str(error))
        code = 2
    except EditSweepError as error:
        Output().error(str(error))
        code = 2
    except BrokenPipeError:
        _drop_output()
        code = 1
    except Exception as error:
        code = _report_bug(error)
    return code


def _drop_output() -> None:
    """Let what is left in the buffer, which Python writes when it ends, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug(error: Exception) -> int:
    """Save the traceback in the results folder, and say where it is; print it where there is no such
    folder. Return the exit code."""
    folder = error.folder if isinstance(error, Bug) else None
    cause = error.__cause__ if isinstance(error, Bug) and error.__cause__ else error
    text = "".join(traceback.format_exception(cause))
    kind = f"{type(cause).__name__}: {cause}".splitlines()[0][:300]
    path = _save_traceback(text, folder)
    where = f"the traceback is in {path}" if path else f"the traceback:\n{text}"
    Output().error(f"this is a bug in editsweep: {kind}\n  {where}")
    return 1


def _save_traceback(text: str, folder: str | None) -> str | None:
    """Save to the results folder's logs. Return the file's name; None if it cannot be saved there."""
    from orchestrator.results.records import is_results
    from orchestrator.storage.open import open_store
    from orchestrator.storage.paths import ResultsPaths

    if folder is None:
        return None
    log = ResultsPaths().log(f"bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        store = open_store(folder)
        if not is_results(store, ResultsPaths()):
            return None
        store.replace(log, text.encode())
    except EditSweepError:
        return None
    return store.where(log)
