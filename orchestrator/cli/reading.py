"""The commands that read a results folder: `status`, `query`, `report`, `methods`, `forget`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.cli.app import Folder, open_existing
from orchestrator.cli.console import Output, percent
from orchestrator.cli.summary import show_summary
from orchestrator.results.status import read_status
from workers.types import JSON

if TYPE_CHECKING:
    pass

commands = typer.Typer()

_LISTED = 10
"""Cells, or failures of a cell, that are listed one by one."""

_ROWS = 100
"""Rows of a table of `status`: a terminal needs seconds for the ten thousand cells of a large
sweep, and no reader wants them all."""

_FORCE_SECONDS = 5.0
_CELL_CHARACTERS = 1000
"""Characters of one value that are shown in a terminal."""


@commands.command()
def status(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False
) -> None:
    """Show the progress of a sweep: finished cells, shards under way, failures, and its running
    driver."""
    found = read_status(folder)
    out = Output()
    if as_json:
        out.raw().write(json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n")
        return
    running = found["running"]
    state = f"a run is at work ({running})" if running else "no run is at work"
    out.say(f"sweep {found['sweep']}: {found['finished']} of {len(found['cells'])} cells finished; {state}")
    if found["code"]["outdated"]:
        out.say(f"{found['code']['outdated']}; editsweep run SPEC --redo-outdated runs them again")
    unresolved = [cell for cell in found["cells"] if cell["unresolved"]]
    if unresolved:
        labels = ", ".join(sorted({str(cell["method"]) for cell in unresolved}))
        out.say(
            f"{len(unresolved)} of {len(found['cells'])} cells ({labels}) use second moments beyond the "
            f"resolution of their precision: other orders of summation may give other scores; set "
            f"precision: float64 or use more samples"
        )
    if found["code"]["unknown"]:
        out.say(found["code"]["unknown"])
    rows = [
        (
            str(cell["method"]),
            str(cell["T"]),
            str(cell["seed"]),
            f"{cell['done']}/{cell['groups']}",
            str(cell["failed"] or ""),
            cell["cell_id"],
        )
        for cell in found["cells"]
        if cell["done"] < cell["groups"]
    ]
    if rows:
        columns = ("method", "T", "seed", "groups", "failed", "cell")
        out.table("not finished", columns, rows[:_ROWS], right=(1, 2, 3, 4))
        _say_more(out, rows, "cells that are not finished")
    built = [(a["kind"], a["key"], percent(a["done"], a["total"]), a["what"]) for a in found["artifacts"]]
    if built:
        out.table("artifacts begun", ("kind", "key", "done", "what"), built, right=(2,))
    shards = [
        (
            shard["shard_id"],
            ", ".join(shard["methods"]),
            str(shard["T"]),
            f"{shard['committed']}/{shard['ticks']}",
            str(shard["attempts"]),
            shard["error"] or "",
        )
        for shard in found["shards"]
    ]
    if shards:
        columns = ("shard", "method", "T", "ticks", "attempts", "last error")
        out.table("shards begun", columns, shards[:_ROWS], right=(2, 3, 4))
        _say_more(out, shards, "shards begun")
    failed = [
        (
            f"{cell['method']} T={cell['T']} seed={cell['seed']}",
            str(failure["attempts"]),
            failure["step"],
            f"{failure['kind']}: {_shortened(str(failure['message']), 300)}",
            failure["log"] or "-",
        )
        for cell in found["failed_cells"]
        for failure in cell["failures"][:_LISTED]
    ]
    if failed:
        out.table(
            "failed cells", ("cell", "attempts", "last step", "exception", "log"), failed[:_ROWS], right=(1,)
        )
        _say_more(out, failed, "failures")
        more = sum(max(0, len(cell["failures"]) - _LISTED) for cell in found["failed_cells"])
        if more:
            out.say(f"{more} further failures: --json lists all")
        out.say("run them again with: editsweep run SPEC --retry-failed")


def _say_more(out: Output, rows: Sequence[object], what: str) -> None:
    if len(rows) > _ROWS:
        out.say(f"and {len(rows) - _ROWS} more {what}: --json lists all")


@commands.command()
def query(
    folder: Folder,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="a question; the table is called edits", show_default=False)
    ],
    output: Annotated[
        Literal["table", "csv", "json", "parquet"], typer.Option("--format", help="how to answer")
    ] = "table",
    limit: Annotated[int, typer.Option(min=1, help="rows shown by --format table")] = 200,
    time_limit: Annotated[
        float, typer.Option(min=0.1, help="seconds after which the query is stopped")
    ] = 300.0,
) -> None:
    """Ask the table a question in SQL (DuckDB). Rows of unfinished shards are included."""
    from orchestrator.results.query import write

    results = open_existing(folder)
    out = Output()
    if output != "table":
        with _ended_by_force(time_limit + _FORCE_SECONDS, out):
            table = results.sql(sql, time_limit)
        write(table, output, out.raw())
        return
    with _ended_by_force(time_limit + _FORCE_SECONDS, out):
        shown, total = results.first_rows(sql, limit, time_limit)
    numbers = [
        i
        for i, kind in enumerate(shown.schema.types)
        if str(kind).startswith(("int", "uint", "double", "float"))
    ]
    rows = [tuple(_cell(value) for value in row.values()) for row in shown.to_pylist()]
    out.table("", shown.column_names, rows, right=numbers)
    if total > limit:
        out.note(f"{limit} of {total} rows shown; --limit or --format csv gives more")


def _cell(value: JSON) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else _shortened(str(value), _CELL_CHARACTERS)


@contextlib.contextmanager
def _ended_by_force(seconds: float, out: Output) -> Iterator[None]:
    """End the process if the block takes longer: a query is interrupted between two pieces of work,
    and one can be endless."""
    import threading

    def end() -> None:
        out.error(f"the query did not stop when told to; ended by force after {seconds:.0f} s")
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


@commands.command()
def report(
    folder: Folder,
    output: Annotated[
        Literal["table", "markdown"], typer.Option("--format", help="how to show it")
    ] = "table",
    picture: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw it: .png, .pdf or .svg")
    ] = None,
) -> None:
    """The summary: methods x T with mean scores on the final state and right after the edit."""
    results = open_existing(folder)
    if picture is not None:
        from orchestrator.results.plots import plot
        from orchestrator.results.report import summary

        plot(summary(results), picture)
        Output().say(f"written: {picture}")
        return
    if output == "table":
        show_summary(Output(), results, None)
        return
    from orchestrator.results.report import CAPTION, markdown, summary

    Output().raw().write(f"{markdown(summary(results))}\n{CAPTION}\n".encode())


@commands.command()
def methods() -> None:
    """The editing methods: name, paper, whether they need pretraining, whether they edit in
    batches, and the hyperparameters that `protocol: easyedit` changes."""
    from workers.methods import get_method, method_names

    rows = []
    for name in method_names():
        method = get_method(name)
        changed = {**method.Config.easyedit_values}
        changed.update(changed.pop("deviations", {}))  # type: ignore[arg-type]
        rows.append(
            (
                name,
                method.title,
                method.paper,
                _yes(method.needs_pretraining),
                _yes(method.batch_edits),
                ", ".join(changed),
            )
        )
    Output().table(
        "",
        ("name", "title", "paper", "needs pretraining", "batch edits", "protocol: easyedit changes"),
        rows,
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@commands.command()
def forget(
    folder: Folder,
    cells: Annotated[
        list[str],
        typer.Option(
            "--cells",
            metavar="CELLS",
            help="cell ids, or e.g. method=wise,T=1000 (method, algorithm, T, seed, cell); repeatable",
            show_default=False,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove cells from the results, after asking. If the spec still has them, the next run makes
    them again."""
    from orchestrator.results import forget as forgetting

    results = open_existing(folder)
    out = Output()
    found = forgetting.look_up(results, cells)
    for title in found.titles[:_LISTED]:
        out.say(f"  {title}")
    if len(found.titles) > _LISTED:
        out.say(f"  and {len(found.titles) - _LISTED} more")
    out.say(
        f"{len(found.cells)} cells with {found.rows} rows of the table would be removed from "
        f"{results.store.where()}"
    )
    if found.shards:
        out.say(f"{len(found.shards)} shards under way lose their progress")
    if found.others:
        out.warn(
            f"that progress is also of {len(found.others)} other cells: {', '.join(found.others[:_LISTED])}"
        )
    if not yes and not typer.confirm("Remove them for good?", err=True):
        out.note("nothing was removed")
        raise typer.Exit(1)
    removed = forgetting.forget(results, found, out.note)
    out.say(f"removed: {len(found.cells)} cells, {removed} rows")
