"""The command line. Exit codes: 0 everything finished, 1 something failed or is a bug, 2 bad input, 130 Ctrl-C.

Every command imports what it needs when it runs: `status`, `query` and `report` start without torch and Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.console import Output, duration, percent, size
from orchestrator.results.status import read_status
from workers.types import JSON, DataError, EditSweepError, ModelError, SpecError

if TYPE_CHECKING:
    from orchestrator.execute import ArtifactState, Engine, Outcome
    from orchestrator.plan import Plan
    from orchestrator.results.query import Results
    from orchestrator.spec import SweepSpec

app = typer.Typer(
    name="editsweep",
    help="Runs the (method x T x seed) grid of lifelong knowledge editing with one command and leaves one table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="the sweep's YAML file", show_default=False)]
Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="a results folder, or s3://bucket/prefix", show_default=False)
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="CELLS",
        help="only these cells, e.g. method=wise,T=1000 (method, algorithm, T, seed, cell); repeatable",
    ),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="also what failed in an earlier run")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a field, e.g. grid.T=[1,10]; repeatable"),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="allow the model's own code to run (the spec must ask for it too)")
]


_LISTED = 10
"""Cells, or failures of a cell, that are listed one by one."""

_ROWS = 100
"""Rows of a table of `status`: a terminal needs seconds for the ten thousand cells of a large sweep, and nobody reads them."""

_FORCE_SECONDS = 5.0
_CELL_CHARACTERS = 1000
"""What is shown of one value in a terminal."""


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


# --- plan and run ----------------------------------------------------------------------------------------------------


@app.command()
def plan(
    spec_file: SpecFile,
    results: Annotated[str | None, typer.Option(help="subtract what this results folder already holds")] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="simulate so many actors (default: engine.max_actors)")
    ] = None,
    only: Only = None,
    retry_failed: RetryFailed = False,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show cells, shards, lanes, edits, memory and time; run nothing, write nothing."""
    from orchestrator.console import begin_line
    from orchestrator.execute import check_folder, read_progress
    from orchestrator.plan import Planner, Progress
    from orchestrator.results.journal import Journal
    from orchestrator.results.select import select
    from orchestrator.results.table import CentralTable
    from orchestrator.storage.open import open_store
    from orchestrator.storage.paths import ResultsPaths

    out = Output()
    spec = _load(spec_file, overrides, trust_remote_code)
    folder = results or default_results(spec)
    store = open_store(folder)
    check_folder(spec, store, ResultsPaths())
    there = store.exists(ResultsPaths().sweep)
    progress = read_progress(CentralTable(store), Journal(store), retry_failed) if there else Progress()
    with _naming(spec_file):
        planner = Planner(spec)
        made = planner.plan(progress, select(only, planner.described(), "--only") if only else None)
    out.say(f"sweep {spec.name}: {begin_line(made)}")
    rows: list[tuple[str, ...]] = []
    for v, variant in enumerate(made.variants):
        cells = [cell for cell in made.cells if cell.variant == v]
        shards = [shard for shard in made.shards if shard.variant == v]
        artifacts = {key for shard in shards for key in made.artifact_keys(shard)}
        rows.append(
            (
                variant.label,
                variant.algorithm if variant.algorithm != variant.label else "",
                str(len(cells)),
                str(len(shards)),
                "/".join(str(made.widths[v, T]) if T in spec.sizes(v) else "-" for T in spec.grid.T),
                str(sum(cell.groups * cell.T for cell in cells)),
                str(sum(shard.edits for shard in shards)),
                size(max(made.memory[v, T].overlay for T in spec.sizes(v))),
                size(made.peak_bytes(v)),
                str(len(artifacts)),
            )
        )
    header = ("method", "is", "cells", "shards", "lanes", "edits", "edits left", "memory/lane", "peak", "artifacts")
    out.table("", header, rows, right=range(2, 10))
    out.say(f"lanes: for T={'/'.join(map(str, spec.grid.T))}, as far as there are groups")
    if made.edits_shared:
        out.say(f"edits shared between T: {made.edits_shared} more, which a lane of a larger T makes")
    out.say(
        f"model: {spec.model.name}, {size(made.weight_bytes)} of weights; peak memory of one actor, estimated: up to "
        f"{size(max(map(made.peak_bytes, range(len(made.variants)))))}: weights + what lanes share + lanes x memory/lane "
        "+ one batch's activations"
    )
    if made.shards:
        _show_schedule(out, made, actors)
    for note in made.notes:
        out.say(f"data set: {note}")
    failed = sum(len(progress.given_up.get(cell.cell_id, ())) for cell in made.asked)
    if failed:
        out.warn(f"{failed} groups failed before and are left alone; --retry-failed runs them again")
    for warning in made.warnings:
        out.warn(warning)
    from orchestrator.results.artifact_store import ArtifactStore
    from workers.artifacts import in_order

    artifact_store = ArtifactStore(store)
    needed = {key: made.artifacts[key] for shard in made.shards for key in made.artifact_keys(shard)}
    if needed:
        missing = in_order(needed.values(), artifact_store.has if there else None)
        kinds = ", ".join(sorted({spec.kind for spec in needed.values()}))
        present = sum(key not in {spec.key for spec in missing} for key in needed)
        out.say(f"artifacts: {len(needed)} needed ({kinds}), {present} present, {len(missing)} to be built")
    shared = [shards for shards in made.schedules() if len(shards) > 1]
    if shared:
        out.say(
            f"base model: its replies to what {sum(map(len, shared))} of {len(made.shards)} shards score are computed once "
            f"for {len(shared)} schedules that several share"
        )
    out.say(f"nothing was run; `editsweep run {spec_file}` runs it into {folder}")


def _show_schedule(out: Output, made: Plan, actors: int | None) -> None:
    """How long what is left may take: resources reserved, and the makespan on a number of actors."""
    reserved = made.spec.engine.resources
    seconds = sum(shard.seconds_left for shard in made.shards)
    kind, share = ("GPU", reserved.gpu) if reserved.gpu else ("CPU", reserved.cpu)
    out.say(f"time: about {seconds / 3600 * share:.3g} {kind}-hours of editing and scoring")
    wanted = actors or made.spec.engine.max_actors
    if wanted is not None:
        found = made.simulate(wanted)
        out.say(
            f"schedule: {wanted} actors end after about {duration(found.makespan)}; lower bound {duration(found.bound)} "
            f"(longest shard {duration(found.longest)}, total/{wanted} {duration(found.total / wanted)}); "
            f"ratio {found.ratio:.3f}"
        )
    out.say(f"estimate: {made.clock.note({(shard.variant, shard.T) for shard in made.shards})}")


@app.command()
def run(
    spec_file: SpecFile,
    results: Annotated[
        str | None, typer.Option(help="results folder, or s3://bucket/prefix (default: results/<name of the sweep>)")
    ] = None,
    engine: Annotated[Literal["ray", "local"], typer.Option(help="local: in this process, without Ray")] = "ray",
    max_actors: Annotated[int | None, typer.Option(min=1, help="shards in flight at most")] = None,
    only: Only = None,
    retry_failed: RetryFailed = False,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="show the libraries' own log messages too")] = False,
) -> None:
    """Run what is not done yet. Run it again after any interruption: it continues."""
    out = Output()
    _quiet(verbose)
    spec = _load(spec_file, overrides, trust_remote_code)
    folder = results or default_results(spec)

    from orchestrator.execute import run_sweep
    from orchestrator.storage.open import open_store

    began = time.monotonic()
    try:
        with _naming(spec_file):
            outcome = run_sweep(
                spec,
                open_store(folder),
                _engine(engine),
                out.view(),
                max_actors,
                only=only or (),
                retry_failed=retry_failed,
            )
    except EditSweepError:
        raise
    except KeyboardInterrupt:
        out.note("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None
    except Exception as error:
        raise Bug(folder) from error
    _conclude(out, spec_file, folder, outcome, time.monotonic() - began)
    raise typer.Exit(outcome.exit_code)


@app.command()
def artifacts(
    spec_file: SpecFile,
    results: Annotated[str | None, typer.Option(help="results folder (default: results/<name of the sweep>)")] = None,
    engine: Annotated[Literal["ray", "local"], typer.Option(help="local: in this process, without Ray")] = "ray",
    max_actors: Annotated[int | None, typer.Option(min=1, help="artifacts built at once at most")] = None,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="show the libraries' own log messages too")] = False,
) -> None:
    """Build what the sweep's shards share (statistics, trained networks) and nothing else; run again, it continues."""
    out = Output()
    _quiet(verbose)
    spec = _load(spec_file, overrides, trust_remote_code)
    folder = results or default_results(spec)

    from orchestrator.execute import build_artifacts
    from orchestrator.storage.open import open_store

    try:
        with _naming(spec_file):
            states, interrupted = build_artifacts(spec, open_store(folder), _engine(engine), out.view(), max_actors)
    except EditSweepError:
        raise
    except KeyboardInterrupt:
        out.note("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None
    except Exception as error:
        raise Bug(folder) from error
    rows = _artifact_rows(states)
    out.table("", ("kind", "key", "size", "state"), rows, right=(2,))
    if not rows:
        out.say("no method of this sweep needs an artifact")
    lacking = sum(found.bytes is None and found.state != "not needed" for found in states)
    if lacking:
        out.error(f"{lacking} of {len(states)} artifacts do not exist; run the same command again to continue")
        raise typer.Exit(130 if interrupted else 1)


def _artifact_rows(states: Sequence[ArtifactState]) -> list[tuple[str, str, str, str]]:
    """A line for each; one for all of a kind that comes in hundreds and is in the same state."""
    from orchestrator.execute import TOLD_TOGETHER

    together: dict[tuple[str, str], list[ArtifactState]] = {}
    for found in states:
        one = "" if found.spec.kind in TOLD_TOGETHER else found.spec.key
        together.setdefault((found.spec.kind, one or found.state), []).append(found)
    rows = []
    for alike in together.values():
        first = alike[0]
        told = f"{len(alike)} of them" if first.spec.kind in TOLD_TOGETHER else first.spec.key
        sizes = [found.bytes for found in alike if found.bytes is not None]
        rows.append((first.spec.kind, told, size(sum(sizes)) if sizes else "", first.state))
    return rows


def _conclude(out: Output, spec_file: Path, folder: str, outcome: Outcome, seconds: float) -> None:
    """The summary, what failed and how to go on."""
    from orchestrator.console import safety_line
    from orchestrator.results.query import open_results

    _show_summary(out, open_results(folder), outcome.run_id if outcome.unfinished else None)
    if outcome.safety.actor_seconds:
        out.note(safety_line(outcome.safety))
    cells = outcome.plan.asked
    if not outcome.unfinished:
        out.say(f"all {len(cells)} cells finished in {duration(seconds)}")
        out.say("next:")
        out.say(f"  editsweep status {folder}")
        out.say(
            f'  editsweep query {folder} "SELECT method, T, avg(reliability_exact) AS reliability FROM edits '
            "WHERE scored = 'final' GROUP BY ALL ORDER BY ALL\""
        )
        return
    again = (
        f"editsweep {' '.join(_quoted(word) for word in sys.argv[1:])}" if sys.argv[1:2] == ["run"] else "editsweep run"
    )
    left = f"{len(outcome.unfinished)} of {len(cells)} cells are not finished"
    if outcome.interrupted:
        out.say(f"interrupted: {left}; everything committed so far is kept")
        out.say(f"continue with:  {again}")
        return
    titles = {
        cell.cell_id: f"{outcome.plan.variants[cell.variant].label} T={cell.T} seed={cell.seed}" for cell in cells
    }
    out.error(left)
    by_cell = _failures_by_cell(outcome)
    for cell_id in outcome.unfinished:
        for line in by_cell.get(cell_id) or ["not run to its end"]:
            out.note(f"  {titles[cell_id]} ({cell_id}): {line}")
    if outcome.failed_groups and "--retry-failed" not in sys.argv:
        again += " --retry-failed"  # what failed is otherwise left alone
    out.note(f"details:  editsweep status {_quoted(folder)}")
    out.note(f"try again with:  {again}")


def _failures_by_cell(outcome: Outcome) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for shard in outcome.plan.shards:
        error = outcome.errors.get(shard.shard_id)
        if error is None:
            continue
        lines = error.message.splitlines() or [""]
        text = f"{error.kind}: {lines[0][:300]} ({error.attempts} attempts; see {error.log})"
        for cell_id in outcome.plan.cell_ids(shard):
            found.setdefault(cell_id, []).append(text)
    for failure in outcome.failed_groups:
        found.setdefault(str(failure["cell_id"]), []).append(
            f"group {failure['group']} failed at its edit {failure['position']}: {failure['kind']}: {failure['message']}"
        )
    return found


def _load(spec_file: Path, overrides: Sequence[str] | None, trust_remote_code: bool) -> SweepSpec:
    from orchestrator.spec import load_spec

    spec = load_spec(spec_file, overrides or ())
    if spec.model.trust_remote_code and not trust_remote_code:
        raise SpecError(
            f"{spec_file}: model.trust_remote_code: true lets the model's files run code on this machine; "
            "if you trust them, say so on the command line too: --trust-remote-code"
        )
    return spec


def _engine(name: Literal["ray", "local"]) -> Engine:
    """Imported when it is chosen: the local engine needs no Ray."""
    if name == "local":
        from orchestrator.local import run_local

        return run_local
    from orchestrator.driver import run_ray

    return run_ray


@contextlib.contextmanager
def _naming(spec_file: Path) -> Iterator[None]:
    """What the planner finds wrong with a spec, or with what it names, tells the spec's file, as the parser's messages do."""
    try:
        yield
    except (SpecError, DataError, ModelError) as error:
        raise type(error)(f"{spec_file}: {error}") from None


def default_results(spec: SweepSpec) -> str:
    return str(Path("results") / spec.name)


# --- reading results -------------------------------------------------------------------------------------------------


@app.command()
def status(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """How far a sweep is: finished cells, shards under way, failures, and whether a run is at work."""
    found = read_status(folder)
    out = Output()
    if as_json:
        out.raw().write(json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n")
        return
    running = found["running"]
    state = f"a run is at work ({running})" if running else "no run is at work"
    out.say(f"sweep {found['sweep']}: {found['finished']} of {len(found['cells'])} cells finished; {state}")
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
        out.table("failed cells", ("cell", "attempts", "last step", "exception", "log"), failed[:_ROWS], right=(1,))
        _say_more(out, failed, "failures")
        more = sum(max(0, len(cell["failures"]) - _LISTED) for cell in found["failed_cells"])
        if more:
            out.say(f"{more} further failures: --json lists all")
        out.say("run them again with: editsweep run SPEC --retry-failed")


def _say_more(out: Output, rows: Sequence[object], what: str) -> None:
    if len(rows) > _ROWS:
        out.say(f"and {len(rows) - _ROWS} more {what}: --json lists all")


@app.command()
def query(
    folder: Folder,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="a question; the table is called edits", show_default=False)
    ],
    output: Annotated[
        Literal["table", "csv", "json", "parquet"], typer.Option("--format", help="how to answer")
    ] = "table",
    limit: Annotated[int, typer.Option(min=1, help="rows shown by --format table")] = 200,
    time_limit: Annotated[float, typer.Option(min=0.1, help="seconds after which the query is stopped")] = 300.0,
) -> None:
    """Ask the table a question in SQL (DuckDB). Rows of unfinished shards are included."""
    from orchestrator.results.query import write

    results = _existing(folder)
    out = Output()
    if output != "table":
        with _ended_by_force(time_limit + _FORCE_SECONDS, out):
            table = results.sql(sql, time_limit)
        write(table, output, out.raw())
        return
    with _ended_by_force(time_limit + _FORCE_SECONDS, out):
        shown, total = results.first_rows(sql, limit, time_limit)
    numbers = [
        i for i, kind in enumerate(shown.schema.types) if str(kind).startswith(("int", "uint", "double", "float"))
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
    """End the process if the block takes longer: a query is interrupted between two pieces of work, and one can be endless."""
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


@app.command()
def report(
    folder: Folder,
    output: Annotated[Literal["table", "markdown"], typer.Option("--format", help="how to show it")] = "table",
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="draw it: .png, .pdf or .svg")] = None,
) -> None:
    """The summary: methods x T with mean scores on the final state and right after the edit."""
    results = _existing(folder)
    if picture is not None:
        from orchestrator.results.plots import plot
        from orchestrator.results.report import summary

        plot(summary(results), picture)
        Output().say(f"written: {picture}")
        return
    if output == "table":
        _show_summary(Output(), results, None)
        return
    from orchestrator.results.report import CAPTION, markdown, summary

    Output().raw().write(f"{markdown(summary(results))}\n{CAPTION}\n".encode())


def _show_summary(out: Output, results: Results, partial: str | None) -> None:
    from orchestrator.results.report import CAPTION, HEADER, cells, summary

    rows = summary(results)
    if not rows:
        return
    out.table("so far" if partial else "", HEADER, cells(rows), right=range(1, len(HEADER)))
    out.say(CAPTION)


@app.command()
def methods() -> None:
    """The editing methods: name, paper, whether they need pretraining and whether they edit in batches."""
    from workers.methods import get_method, method_names

    rows = []
    for name in method_names():
        method = get_method(name)
        rows.append((name, method.title, method.paper, _yes(method.needs_pretraining), _yes(method.batch_edits)))
    Output().table("", ("name", "title", "paper", "needs pretraining", "batch edits"), rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _existing(folder: str) -> Results:
    from orchestrator.results.query import open_results

    return open_results(folder)


# --- removing results ------------------------------------------------------------------------------------------------


@app.command()
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
    """Remove cells from the results, after asking. If the spec still has them, the next run makes them again."""
    from orchestrator.results import forget as forgetting

    results = _existing(folder)
    out = Output()
    found = forgetting.look_up(results, cells)
    for title in found.titles[:_LISTED]:
        out.say(f"  {title}")
    if len(found.titles) > _LISTED:
        out.say(f"  and {len(found.titles) - _LISTED} more")
    out.say(
        f"{len(found.cells)} cells with {found.rows} rows of the table would be removed from {results.store.where()}"
    )
    if found.shards:
        out.say(f"{len(found.shards)} shards under way lose their progress")
    if found.others:
        out.warn(f"that progress is also of {len(found.others)} other cells: {', '.join(found.others[:_LISTED])}")
    if not yes and not typer.confirm("Remove them for good?", err=True):
        out.note("nothing was removed")
        raise typer.Exit(1)
    removed = forgetting.forget(results, found, out.note)
    out.say(f"removed: {len(found.cells)} cells, {removed} rows")


# --- how a call ends -------------------------------------------------------------------------------------------------


_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base of the errors about the command line itself; newer Typers carry their own copy of click."""


class Bug(Exception):
    """An exception nobody expected, with the results folder whose log gets the traceback."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = folder


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


def _quiet(verbose: bool) -> None:
    """Libraries keep their progress bars and advice to themselves unless asked."""
    import logging

    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


if __name__ == "__main__":
    main()
