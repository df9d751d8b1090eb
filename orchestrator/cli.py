"""The command line. Exit codes: 0 everything finished, 1 something failed or is a bug, 2 bad input, 130 Ctrl-C.

Every command imports what it needs when it runs: `status`, `query` and `report` start without torch and Ray.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.console import Output, duration, size
from workers.types import JSON, DataError, EditSweepError, ModelError, SpecError

if TYPE_CHECKING:
    from orchestrator.execute import Outcome
    from orchestrator.plan import Plan
    from orchestrator.query import Results
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
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="a results folder", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a field, e.g. grid.T=[1,10]; repeatable"),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="allow the model's own code to run (the spec must ask for it too)")
]


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
    results: Annotated[Path | None, typer.Option(help="subtract what this results folder already holds")] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="simulate so many actors (default: engine.max_actors)")
    ] = None,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show cells, shards, lanes, edits, memory and time; run nothing, write nothing."""
    from orchestrator.console import begin_line
    from orchestrator.execute import check_folder, read_progress
    from orchestrator.journal import Journal
    from orchestrator.paths import ResultsPaths
    from orchestrator.plan import make_plan
    from orchestrator.store import LocalStore
    from orchestrator.table import CentralTable

    out = Output()
    spec = _load(spec_file, overrides, trust_remote_code)
    folder = results or default_results(spec)
    store = LocalStore(folder)
    check_folder(spec, store, ResultsPaths())
    progress = read_progress(CentralTable(store), Journal(store)) if folder.exists() else None
    with _naming(spec_file):
        made = make_plan(spec, progress)
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
                "/".join(str(made.widths[v, T]) for T in spec.grid.T),
                str(sum(cell.groups * cell.T for cell in cells)),
                str(sum(shard.edits for shard in shards)),
                size(max(made.memory[v, T].overlay for T in spec.grid.T)),
                size(made.peak_bytes(v)),
                str(len(artifacts)),
            )
        )
    header = ("method", "is", "cells", "shards", "lanes", "edits", "edits left", "memory/lane", "peak", "artifacts")
    out.table("", header, rows, right=range(2, 10))
    out.say(f"lanes: for T={'/'.join(map(str, spec.grid.T))}, as far as there are groups")
    out.say(
        f"model: {spec.model.name}, {size(made.weight_bytes)} of weights; peak memory of one actor, estimated: up to "
        f"{size(max(map(made.peak_bytes, range(len(made.variants)))))}: weights + lanes x memory/lane + one batch's activations"
    )
    if made.shards:
        _show_schedule(out, made, actors)
    for note in made.notes:
        out.say(f"data set: {note}")
    for warning in made.warnings:
        out.warn(warning)
    from orchestrator.artifacts import ArtifactStore

    artifact_store = ArtifactStore(store)
    needed = {key: made.artifacts[key] for shard in made.shards for key in made.artifact_keys(shard)}
    present = sum(artifact_store.has(spec) for spec in needed.values()) if folder.exists() else 0
    if needed:
        kinds = ", ".join(sorted({spec.kind for spec in needed.values()}))
        out.say(f"artifacts: {len(needed)} needed ({kinds}), {present} present")
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
    results: Annotated[Path | None, typer.Option(help="results folder (default: results/<name of the sweep>)")] = None,
    engine: Annotated[Literal["ray", "local"], typer.Option(help="local: in this process, without Ray")] = "ray",
    max_actors: Annotated[int | None, typer.Option(min=1, help="shards in flight at most")] = None,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="show the libraries' own log messages too")] = False,
) -> None:
    """Run what is not done yet. Run it again after any interruption: it continues."""
    out = Output()
    _quiet(verbose)
    spec = _load(spec_file, overrides, trust_remote_code)
    folder = results or default_results(spec)

    from orchestrator.execute import Engine, run_sweep
    from orchestrator.store import LocalStore

    chosen: Engine
    if engine == "local":
        from orchestrator.local import run_local as chosen
    else:
        from orchestrator.driver import run_ray as chosen
    began = time.monotonic()
    try:
        with _naming(spec_file):
            outcome = run_sweep(spec, LocalStore(folder), chosen, out.view(), max_actors)
    except EditSweepError:
        raise
    except KeyboardInterrupt:
        out.note("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None
    except Exception as error:
        raise Bug(folder) from error
    _conclude(out, spec_file, folder, outcome, time.monotonic() - began)
    raise typer.Exit(outcome.exit_code)


def _conclude(out: Output, spec_file: Path, folder: Path, outcome: Outcome, seconds: float) -> None:
    """The summary, what failed and how to go on."""
    from orchestrator.query import open_results

    _show_summary(out, open_results(folder), outcome.run_id if outcome.unfinished else None)
    cells = outcome.plan.cells
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


@contextmanager
def _naming(spec_file: Path) -> Iterator[None]:
    """What the planner finds wrong with a spec, or with what it names, tells the spec's file, as the parser's messages do."""
    try:
        yield
    except (SpecError, DataError, ModelError) as error:
        raise type(error)(f"{spec_file}: {error}") from None


def default_results(spec: SweepSpec) -> Path:
    return Path("results") / spec.name


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
        out.table("not finished", ("method", "T", "seed", "groups", "failed", "cell"), rows, right=(1, 2, 3, 4))
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
        out.table("shards begun", ("shard", "method", "T", "ticks", "attempts", "last error"), shards, right=(2, 3, 4))
    if found["failures"]:
        failed = [
            (str(f["cell_id"]), str(f["group"]), str(f["position"]), f["kind"], f["message"]) for f in found["failures"]
        ]
        out.table("failed groups", ("cell", "group", "edit", "kind", "cause"), failed, right=(1, 2))


def read_status(folder: Path) -> dict[str, JSON]:
    """What `status --json` prints."""
    from orchestrator import lock
    from orchestrator.store import Missing, unseal_json

    results = _existing(folder)
    store, paths = results.store, results.paths
    name = unseal_json(store.read(paths.sweep), store.where(paths.sweep)).get("name")
    planned, current = results.plan()
    shards = []
    for shard_id, manifest in results.journal.begun().items():
        try:
            progress = results.journal.progress(shard_id)
        except Missing:
            continue  # gathered meanwhile
        error = progress.error or {}
        shards.append(
            {
                "shard_id": shard_id,
                "methods": sorted({str(c["method"]) for c in manifest.columns.values()}),
                "T": manifest.job.T,
                "cells": sorted(manifest.columns),
                "ticks": progress.ticks,
                "committed": progress.committed,
                "attempts": progress.attempts,
                "edits": progress.edits,
                "error": f"{error.get('kind')}: {error.get('message')}" if error else None,
            }
        )
    done = results.central.done()
    failed = results.central.failed()
    cells = []
    for cell_id in current:
        cell = planned[cell_id]
        cells.append(
            {
                "cell_id": cell_id,
                **{key: cell[key] for key in ("method", "algorithm", "T", "seed", "groups")},
                "done": sum(group < cell["groups"] for group in done.get(cell_id, ())),
                "failed": sum(failure["cell_id"] == cell_id for failure in failed),
            }
        )
    holder = lock.owner(store, paths)
    return {
        "sweep": name,
        "running": str(holder) if holder else None,
        "finished": sum(cell["done"] == cell["groups"] for cell in cells),
        "cells": cells,
        "shards": shards,
        "failures": failed,
    }


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
) -> None:
    """Ask the table a question in SQL (DuckDB). Rows of unfinished shards are included."""
    from orchestrator.query import write

    table = _existing(folder).sql(sql)
    out = Output()
    if output != "table":
        write(table, output, out.raw())
        return
    shown = table.slice(0, limit)
    numbers = [
        i for i, kind in enumerate(table.schema.types) if str(kind).startswith(("int", "uint", "double", "float"))
    ]
    rows = [tuple(_cell(value) for value in row.values()) for row in shown.to_pylist()]
    out.table("", table.column_names, rows, right=numbers)
    if table.num_rows > limit:
        out.note(f"{limit} of {table.num_rows} rows shown; --limit or --format csv gives more")


def _cell(value: JSON) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@app.command()
def report(
    folder: Folder,
    output: Annotated[Literal["table", "markdown"], typer.Option("--format", help="how to show it")] = "table",
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="draw it: .png, .pdf or .svg")] = None,
) -> None:
    """The summary: methods x T with mean scores on the final state and right after the edit."""
    results = _existing(folder)
    if picture is not None:
        from orchestrator.plots import plot
        from orchestrator.report import summary

        plot(summary(results), picture)
        Output().say(f"written: {picture}")
        return
    if output == "table":
        _show_summary(Output(), results, None)
        return
    from orchestrator.report import CAPTION, markdown, summary

    Output().raw().write(f"{markdown(summary(results))}\n{CAPTION}\n".encode())


def _show_summary(out: Output, results: Results, partial: str | None) -> None:
    from orchestrator.report import CAPTION, HEADER, cells, summary

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


def _existing(folder: Path) -> Results:
    from orchestrator.query import open_results

    return open_results(folder)


# --- how a call ends -------------------------------------------------------------------------------------------------


_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""Base of the errors about the command line itself; newer Typers carry their own copy of click."""


class Bug(Exception):
    """An exception nobody expected, with the results folder whose log gets the traceback."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
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


def _keep(text: str, folder: Path | None) -> str:
    from orchestrator.paths import ResultsPaths
    from orchestrator.store import LocalStore

    name = f"bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if folder is not None and folder.is_dir():
        store = LocalStore(folder)
        try:
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
