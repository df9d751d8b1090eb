"""Entry point of the command `editsweep`: exit codes and error messages."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from orchestrator.cli import reading, running
from orchestrator.cli.app import Bug, app
from orchestrator.cli.console import Output
from workers.types import EditSweepError

_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base class of errors in the command line's arguments. Looked up by name, because newer versions
of Typer contain their own copy of click."""


app.add_typer(running.commands)
app.add_typer(reading.commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its exit code."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except _UsageError as error:
        error.show()
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except EditSweepError as error:
        Output().error(str(error))
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = _report_bug(error)
    sys.exit(code if isinstance(code, int) else 0)


def _report_bug(error: Exception) -> int:
    """Save the traceback in the results folder, and say where it is; print it where there is no such
    folder. Return the exit code."""
    folder = error.folder if isinstance(error, Bug) else None
    cause = error.__cause__ if isinstance(error, Bug) and error.__cause__ else error
    text = "".join(traceback.format_exception(cause))
    path = _save_traceback(text, folder)
    kind = f"{type(cause).__name__}: {cause}".splitlines()[0][:300]
    where = f"the traceback is in {path}" if path else f"the traceback:\n{text}"
    Output().error(f"this is a bug in editsweep: {kind}\n  {where}")
    return 1


def _save_traceback(text: str, folder: str | None) -> str | None:
    """Save to the results folder's logs. Return the file's name; None if it cannot be saved there."""
    from orchestrator.storage.open import open_store
    from orchestrator.storage.paths import ResultsPaths

    if folder is None:
        return None
    log = ResultsPaths().log(f"bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        store = open_store(folder)
        if not store.exists(ResultsPaths().sweep):
            return None
        store.replace(log, text.encode())
    except EditSweepError:
        return None
    return store.where(log)
