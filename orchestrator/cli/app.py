"""The command line application and the options that several commands share.

Exit codes: 0 everything finished, 1 a failure or a bug, 2 invalid input, 130 Ctrl-C. The imports
are inside the commands, so that `status`, `query` and `report` start without torch and Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.cli.console import Output

if TYPE_CHECKING:
    from orchestrator.results.query import Results, Union

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""


class _Commands(TyperGroup):
    """Says that Ctrl-C ended a command, which Typer does without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Output().note("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="editsweep",
    cls=_Commands,
    help="Runs the (method x T x seed) grid of lifelong knowledge editing with one command and leaves one "
    "table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MOST_SECONDS = 366 * 86400.0
MOST_ACTORS = 1_000_000

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="the sweep's YAML file", show_default=False)]
Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="a results folder, or s3://bucket/prefix", show_default=False)
]
Folders = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR...",
        help="results folders, or s3://bucket/prefix; several are one table",
        show_default=False,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="CELLS",
        help="only these cells, e.g. method=wise,T=1000 (method, algorithm, T, seed, cell; a key given twice fits "
        "either value); repeatable",
    ),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="also what failed in an earlier run")]
RedoOutdated = Annotated[
    bool,
    typer.Option(
        "--redo-outdated",
        help="remove the rows of cells that other code has made, and run these cells again",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a field, e.g. grid.T=[1,10]; repeatable"),
]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="allow the model's own code to run (the spec must ask for it too)"
    ),
]
RuntimeEnv = Annotated[
    Path | None,
    typer.Option(
        "--runtime-env",
        metavar="FILE",
        help="Ray's runtime_env (YAML or JSON) for the workers; it may install packages and run code on every node",
        show_default=False,
    ),
]


def finite_seconds(value: float) -> float:
    """Refuses a time that no timer can wait for."""
    if not value < MOST_SECONDS:
        raise typer.BadParameter(f"{value} is not a finite, positive number of seconds (at most a year)")
    return value


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="show the version and exit")] = False,
) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as version_of

        try:
            Output().say(f"editsweep {version_of('editsweep')}")
        except PackageNotFoundError:
            Output().say("editsweep (not installed)")
        raise typer.Exit
    if context.invoked_subcommand is None:
        Output().say(context.get_help())
        raise typer.Exit(2)


def open_existing(folder: str) -> Results:
    from orchestrator.results.query import open_results

    return open_results(folder)


def open_together(folders: Sequence[str]) -> Results | Union:
    from orchestrator.results.query import open_results

    return open_results(*folders)


class Bug(Exception):
    """An unexpected exception, with the results folder whose log gets the traceback."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = folder


def silence_libraries(verbose: bool) -> None:
    """Hide the libraries' progress bars and log messages below ERROR unless ``verbose``."""
    import logging

    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if verbose:
        logging.getLogger("orchestrator").setLevel(logging.INFO)
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quote(word: str) -> str:
    import shlex

    return shlex.quote(word)
