"""Entry point of the command `editsweep`: exit codes, and what is said when something goes
wrong."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from orchestrator.cli import reading, running
from orchestrator.cli.app import Bug, app
from orchestrator.cli.console import Output
from workers.types import EditSweepError

_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base of the errors about the command line itself; newer Typers carry their own copy of click."""


app.add_typer(running.commands)
app.add_typer(reading.commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except _USAGE as error:
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
        code = _bug(error)
    sys.exit(code if isinstance(code, int) else 0)


def _bug(error: Exception) -> int:
    """Keep the traceback, say where it is."""
    folder = error.folder if isinstance(error, Bug) else None
    cause = error.__cause__ if isinstance(error, Bug) and error.__cause__ else error
    text = "".join(traceback.format_exception(cause))
    path = _keep(text, folder)
    kind = f"{type(cause).__name__}: {cause}".splitlines()[0][:300]
    Output().error(f"this is a bug in editsweep: {kind}\n  the traceback is in {path}")
    return 1


def _keep(text: str, folder: str | None) -> str:
    from orchestrator.storage.open import open_store
    from orchestrator.storage.paths import ResultsPaths

    name = f"bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if folder is not None:
        store = open_store(folder)
        try:
            if not store.exists(ResultsPaths().sweep):
                raise EditSweepError("no results folder to keep it in")
            store.replace(ResultsPaths().log(name), text.encode())
            return store.where(ResultsPaths().log(name))
        except EditSweepError:
            pass
    with tempfile.NamedTemporaryFile("w", prefix="editsweep-", suffix=".log", delete=False) as file:
        file.write(text)
    return file.name
