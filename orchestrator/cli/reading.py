"""The commands that read results folders: `status`, `query`, `show`, `report`, `diff`, `methods`,
`forget`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.app import Folder, Folders, finite_seconds, open_existing, open_together
from orchestrator.cli.console import Output, percent
from orchestrator.cli.summary import by_cause, show_summary
from orchestrator.results.status import read_status
from workers.inputs import counted
from workers.types import JSON, EditSweepError

commands = typer.Typer()

_LISTED = 10
"""At most so many cells, or failures of a cell, are listed individually."""

_ROWS = 100
"""At most so many rows of a table of `status` are shown: to print the ten thousand cells of a large
sweep takes seconds."""

_FORCE_SECONDS = 5.0
"""Time between the interruption of a query and the forced end of the process."""

_CELL_CHARACTERS = 1000
"""At most so many characters of a value are shown."""


@commands.command()
def status(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False
) -> None:
    """Show the progress of a sweep: finished cells, unfinished shards, failures, and the driver
    that runs it."""
    found = read_status(folder)
    out = Output()
    if as_json:
        _write_json(out, found)
        return
    running = found["running"]
    state = f"a run is active ({running})" if running else "no run is active"
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
            percent(shard["committed"], shard["ticks"]),
            str(shard["attempts"]),
            shard["error"] or "",
        )
        for shard in found["shards"]
    ]
    if shards:
        columns = ("shard", "method", "T", "saved", "attempts", "last error")
        out.table("shards begun", columns, shards[:_ROWS], right=(2, 3, 4))
        _say_more(out, shards, "shards begun")
    causes = by_cause(
        (
            f"{cell['method']} T={cell['T']} seed={cell['seed']}, {failure['step']}",
            f"{failure['kind']}: {failure['message']}",
            failure["attempts"],
            failure["log"] or "-",
        )
        for cell in found["failed_cells"]
        for failure in cell["failures"]
    )
    if causes:
        lines = [
            (str(len(of_cause)), _shortened(cause, 300), of_cause[0][0], str(of_cause[0][2]), of_cause[0][3])
            for cause, of_cause in causes.items()
        ]
        out.table("failures", ("times", "cause", "first", "attempts", "log"), lines[:_ROWS], right=(0, 3))
        _say_more(out, lines, "causes")
        out.say("run them again with: editsweep run SPEC --retry-failed")


def _say_more(out: Output, rows: Sequence[object], what: str) -> None:
    if len(rows) > _ROWS:
        out.say(f"and {len(rows) - _ROWS} more {what}: --json lists all")


@commands.command()
def query(
    folders: Folders,
    sql: Annotated[
        str,
        typer.Argument(
            metavar="SQL",
            help="a question to the tables edits, outputs, groups, requests (with superseded rows: edits_all, "
            "...) and cells",
            show_default=False,
        ),
    ],
    output: Annotated[
        Literal["table", "csv", "json", "parquet"], typer.Option("--format", help="how to answer")
    ] = "table",
    limit: Annotated[int, typer.Option(min=1, help="rows shown by --format table")] = 200,
    time_limit: Annotated[
        float,
        typer.Option(min=0.1, callback=finite_seconds, help="seconds after which the query is stopped"),
    ] = 300.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="--format csv: texts with their control characters as they are")
    ] = False,
) -> None:
    """Ask the table a question in SQL (DuckDB). Rows of unfinished shards are included; of several
    folders, the column results tells which a row is of."""
    from orchestrator.results.query import python_values, write

    if output == "parquet" and sys.stdout.isatty():
        raise EditSweepError(
            "--format parquet: the answer is binary and standard output is a terminal; send it to a file, for "
            "example with `> answer.parquet`"
        )
    results = open_together(folders)
    out = Output()
    if output != "table":
        with _hard_time_limit(time_limit + _FORCE_SECONDS, out):
            table = results.sql(sql, time_limit)
        write(table, output, out.raw(), raw)
        return
    with _hard_time_limit(time_limit + _FORCE_SECONDS, out):
        shown, total = results.first_rows(sql, limit, time_limit)
    numbers = [
        i
        for i, kind in enumerate(shown.schema.types)
        if str(kind).startswith(("int", "uint", "double", "float"))
    ]
    columns = [map(_cell, python_values(column)) for column in shown.columns]
    rows = list(zip(*columns, strict=True))
    out.table("", shown.column_names, rows, right=numbers)
    if total > limit:
        out.note(f"{limit} of {total} rows shown; --limit or --format csv gives more")


def _write_json(out: Output, value: JSON) -> None:
    """Write a value to standard output, for programs."""
    from orchestrator.results.query import escape_controls

    text = json.dumps(value, indent=1, ensure_ascii=False)
    out.raw().write(escape_controls(text).encode() + b"\n")


def _cell(value: JSON) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else _shortened(str(value), _CELL_CHARACTERS)


@commands.command()
def show(
    folder: Folder,
    case_id: Annotated[
        str, typer.Argument(metavar="CASE_ID", help="a request's id, as in case_id", show_default=False)
    ],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="only this method (label); repeatable")
    ] = None,
    size: Annotated[list[int] | None, typer.Option("-T", help="only this T; repeatable")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="only this seed; repeatable")] = None,
    output: Annotated[Literal["table", "json"], typer.Option("--format", help="how to show it")] = "table",
) -> None:
    """Show one request: everything that was asked, what was expected, and what the models wrote, for
    every method, T and seed."""
    from orchestrator.results.show import show as look_up

    wanted = [("method", method), ("T", size), ("seed", seed)]
    condition = ",".join(f"{key}={value}" for key, values in wanted for value in values or ())
    found = look_up(open_existing(folder), case_id, [condition] if condition else ())
    out = Output()
    if output == "json":
        _write_json(out, found)
        return
    request = found["request"]
    if request is None:
        out.say(f"request {case_id}")
        out.note("its texts are not in this folder, which an earlier version wrote; the next run adds them")
    else:
        fields = {
            "data set": f"{request['dataset']} ({request['dataset_fingerprint'][:16]})",
            "prompt": request["prompt"],
            "subject": request["subject"],
            "target": request["target"],
            "ground truth": request["ground_truth"],
        }
        out.table("", ("request", case_id), [(name, _one_line(text)) for name, text in fields.items()])
        lines = [(_name_of(q), _one_line(q["prompt"]), _expected(q)) for q in found["questions"]]
        out.table("", ("question", "asked", "expected"), lines)
    dropped = False
    for answer in found["answers"]:
        out.say(
            f"{answer['method']} T={answer['T']} seed={answer['seed']}: {answer['scored']}, after "
            f"{counted(answer['edits_applied'], 'edit')} (group {answer['group']}, position {answer['position']})"
        )
        rows = [
            (
                _name_of(row),
                row["how"],
                _yes(row["correct"]),
                _written(row["text"], row["ending"]),
                _written(row["text_base"], row["ending_base"]),
            )
            for row in answer["outputs"]
        ]
        dropped |= any("dropped" in (row["ending"], row["ending_base"]) for row in answer["outputs"])
        if rows:
            names = ("question", "how", "right", "edited model wrote", "unedited model wrote")
            out.table("", names, rows)
        else:
            values = (f"{name} {value:.4g}" for name, value in answer["scores"].items())
            text = f"no outputs were kept (scoring.keep_outputs); scores: {', '.join(values)}"
            out.say("\n".join(f"  {line}" for line in textwrap.wrap(text, 76)))
            out.say()
    for cell in found["others"]:
        why = "does not edit this request" if cell["finished"] else "no result of this request yet"
        out.say(f"{cell['method']} T={cell['T']} seed={cell['seed']}: {why}")
    if dropped:
        out.say(f"{_DROPPED} not continued, because the text could no longer become right")


_DROPPED = "..."


def _name_of(question: Mapping[str, JSON]) -> str:
    """A probe as people count it."""
    return str(question["probe"]) + (
        f" {question['number'] + 1}" if question["probe"] != "reliability" else ""
    )


def _expected(question: Mapping[str, JSON]) -> str:
    if question["probe"] == "locality":
        return "as the unedited model"
    if question["target"] is None:
        return "the text itself"
    return " / ".join(_one_line(text) for text in (question["target"], *question["aliases"]))


def _written(text: str | None, ending: str | None) -> str:
    return _one_line(text) + {"dropped": f" {_DROPPED}", "cut": " (cut)"}.get(ending or "", "")


def _one_line(text: str | None) -> str:
    """A text of a data set or a model in a cell of a table."""
    if text is None:
        return "-"
    return _shortened(text.replace("\n", "\\n").replace("\t", "\\t"), _CELL_CHARACTERS) or "(nothing)"


@contextlib.contextmanager
def _hard_time_limit(seconds: float, out: Output) -> Iterator[None]:
    """End the process if the block takes longer than ``seconds``. DuckDB interrupts a query only
    between two work units, and one of them may not end."""
    import threading

    def end() -> None:
        out.error(f"the query did not stop when interrupted; ended by force after {seconds:.0f} s")
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
    folders: Folders,
    output: Annotated[
        Literal["table", "markdown", "json"], typer.Option("--format", help="how to show it")
    ] = "table",
    picture: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw it: .png, .pdf or .svg")
    ] = None,
    complete: Annotated[
        bool,
        typer.Option("--require-complete", help="exit code 1 if any edit that was asked for has no result"),
    ] = False,
) -> None:
    """The summary: methods x T with mean scores on the final state and right after the edit, how
    certain they are, and what is missing."""
    from orchestrator.results.report import CAPTION, footnotes, incomplete, markdown, summary

    results = open_together(folders)
    out = Output()
    if picture is None and output == "table":
        rows = show_summary(out, results)
        if not rows:
            out.say("no cell was planned in this folder yet")
    else:
        rows = summary(results)
        if picture is not None:
            from orchestrator.results.plots import plot

            plot(rows, picture)
            out.say(f"written: {picture}")
        elif output == "json":
            _write_json(out, rows)
        else:
            notes = "".join(f"\n{line}\n" for line in footnotes(rows))
            out.raw().write(f"{markdown(rows)}\n{CAPTION}\n{notes}".encode())
    missing = incomplete(rows)
    if complete and (missing or not rows):
        out.error(f"{len(missing)} of {len(rows)} rows of the summary lack results")
        raise typer.Exit(1)


@commands.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="DIR1", help="a results folder", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="DIR2", help="another one", show_default=False)],
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", metavar="COLUMN", help="a column that may differ, e.g. shard_id; repeatable"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Did a change alter anything? Compare two results folders cell by cell, row by row and bit for
    bit; exit code 1 if anything differs. Times, memory, run and attempt are left out."""
    from orchestrator.results.diff import compare, to_json

    found = compare(open_existing(first), open_existing(second), ignore or ())
    out = Output()
    if as_json:
        _write_json(out, to_json(found))
        raise typer.Exit(int(not found.same))
    for folder, cell_ids in zip((first, second), found.only, strict=True):
        if cell_ids:
            shown = ", ".join(cell_ids[:_LISTED]) + (", ..." if len(cell_ids) > _LISTED else "")
            out.say(f"{len(cell_ids)} cells are in {folder} only: {shown}")
    for cell_id, parts in list(found.definitions.items())[:_LISTED]:
        out.say(f"cell {cell_id} is defined otherwise: {', '.join(parts)}")
    if len(found.definitions) > _LISTED:
        out.say(f"and {len(found.definitions) - _LISTED} more cells that are defined otherwise")
    for folder, count in zip((first, second), found.rows_only, strict=True):
        if count:
            out.say(f"{count} rows are in {folder} only")
    if found.columns:
        lines = [
            (name, f"{column.rows}/{found.rows}", "-" if column.largest is None else f"{column.largest:.6g}")
            for name, column in found.columns.items()
        ]
        out.table(
            f"columns that differ among the {found.rows} rows of both",
            ("column", "rows", "largest difference"),
            lines,
            right=(1, 2),
        )
    if found.means:
        means = [
            (method, str(T), score, *("-" if mean is None else f"{mean:.6g}" for mean in pair))
            for (method, T, score), pair in found.means.items()
        ]
        out.table(
            "final means that differ", ("method", "T", "score", first, second), means[:_ROWS], (1, 3, 4)
        )
        _say_more(out, means, "means")
    out.say(
        f"the same: {found.rows} rows, {len(found.compared)} columns"
        if found.same
        else "the two folders differ"
    )
    raise typer.Exit(int(not found.same))


@commands.command()
def methods() -> None:
    """The editing methods: name, paper, whether they need pretraining, whether they edit in
    batches, and the hyperparameters that `protocol: easyedit` changes."""
    from workers.methods import get_method, method_names

    rows = []
    for name in method_names():
        method = get_method(name)
        changed = {**method.Config.easyedit_values}
        changed.update(changed.pop("deviations", {}))
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
        list[str] | None,
        typer.Option(
            "--cells",
            metavar="CELLS",
            help="cell ids, or e.g. method=wise,T=1000 (method, algorithm, T, seed, cell; a key given twice fits "
            "either value); repeatable",
            show_default=False,
        ),
    ] = None,
    superseded: Annotated[
        bool, typer.Option("--superseded", help="all that the last plan no longer asks for")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove cells from the results, after a confirmation. If the spec still contains them, the
    next run runs them again."""
    from orchestrator.results import forget as forgetting

    if bool(cells) == superseded:
        raise EditSweepError("forget: give either --cells CELLS or --superseded")
    results = open_existing(folder)
    out = Output()
    found = forgetting.look_up_superseded(results) if superseded else forgetting.look_up(results, cells or ())
    for title in found.titles[:_LISTED]:
        out.say(f"  {title}")
    if len(found.titles) > _LISTED:
        out.say(f"  and {len(found.titles) - _LISTED} more")
    out.say(
        f"{counted(len(found.limits), 'cell')} with {counted(found.rows, 'row')} of the table would be removed from "
        f"{results.store.where()}"
    )
    if found.shards:
        out.say(f"{len(found.shards)} shards under way lose their progress")
    if found.others:
        out.warn(
            f"these shards also serve {len(found.others)} other cells: {', '.join(found.others[:_LISTED])}"
        )
    if superseded and not found.limits:
        out.say("nothing is superseded")
        return
    if not yes and not typer.confirm("Remove them for good?", err=True):
        out.note("nothing was removed")
        raise typer.Exit(1)
    removed = forgetting.forget(results, found, out.note)
    out.say(f"removed: {counted(len(found.limits), 'cell')}, {counted(removed, 'row')}")
