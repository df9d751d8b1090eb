"""The commands that plan and run: `plan`, `run`, `artifacts`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.cli.app import (
    MOST_ACTORS,
    Bug,
    Only,
    Overrides,
    RedoOutdated,
    RemoteCode,
    RetryFailed,
    RuntimeEnv,
    SpecFile,
    quote,
    silence_libraries,
)
from orchestrator.cli.console import Output, duration, size
from orchestrator.cli.summary import by_cause, show_summary
from workers.inputs import counted
from workers.types import EditSweepError

if TYPE_CHECKING:
    from orchestrator.cli.summary import Failure
    from orchestrator.engine.run_state import Outcome
    from orchestrator.engine.sweep import ArtifactState
    from orchestrator.planning.plan import Plan
    from orchestrator.planning.spec import SweepSpec


commands = typer.Typer()

_CAUSES = 10
"""Causes of failures, and cells, that are listed at the end of a run."""


@commands.command()
def plan(
    spec_file: SpecFile,
    results: Annotated[
        str | None, typer.Option(help="subtract what this results folder already holds")
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_ACTORS, help="simulate so many actors (default: engine.max_actors)"),
    ] = None,
    only: Only = None,
    retry_failed: RetryFailed = False,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show cells, shards, lanes, edits, memory and time; run nothing, write nothing."""
    from orchestrator.cli.console import begin_line
    from orchestrator.engine.folder import compare_code, known_statistics, read_folder
    from orchestrator.engine.statistics import read_statistics, say_unresolved
    from orchestrator.planning.inputs import read_inputs
    from orchestrator.planning.plan import Planner
    from orchestrator.planning.spec import default_results, naming
    from orchestrator.results.code import say_outdated, say_unknown
    from orchestrator.results.records import is_results
    from orchestrator.results.select import select
    from orchestrator.storage.open import open_store
    from orchestrator.storage.paths import ResultsPaths

    out = Output()
    spec = _load(spec_file, overrides, trust_remote_code)
    folder = default_results(spec) if results is None else results
    store = open_store(folder)
    there = is_results(store, ResultsPaths())
    with naming(spec_file):
        progress = read_folder(spec, store, retry_failed)
        planner = Planner(read_inputs(spec))
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
    header = (
        "method",
        "is",
        "cells",
        "shards",
        "lanes",
        "edits",
        "edits left",
        "memory/lane",
        "peak",
        "artifacts",
    )
    out.table("", header, rows, right=range(2, 10))
    out.say(f"lanes: for T={'/'.join(map(str, spec.grid.T))}, as far as there are groups")
    if made.edits_shared:
        out.say(f"edits shared between T: {made.edits_shared} more, which a lane of a larger T makes")
    out.say(
        f"model: {spec.model.name}, {size(made.weight_bytes)} of weights; peak memory of one actor, "
        f"estimated: up to "
        f"{size(max(map(made.peak_bytes, range(len(made.variants)))))}: weights + what lanes share + lanes "
        f"x memory/lane "
        "+ one batch's activations"
    )
    if made.shards:
        show_makespan(out, made, actors)
    for note in made.notes:
        out.say(f"data set: {note}")
    codes = compare_code(progress, store, ResultsPaths())
    asked = [cell.cell_id for cell in made.asked]
    if outdated := say_outdated(codes, asked):
        out.warn(f"{outdated}; editsweep run {quote(str(spec_file))} --redo-outdated runs them again")
    if unknown := say_unknown(codes, asked):
        out.say(unknown)
    for warning in (
        *made.warnings,
        *say_unresolved(made, read_statistics(made, store, known_statistics(store, ResultsPaths()))),
    ):
        out.warn(warning)
    from orchestrator.results.artifact_store import ArtifactStore
    from workers.artifacts.base import in_order

    artifact_store = ArtifactStore(store)
    needed = {key: made.artifacts[key] for shard in made.shards for key in made.artifact_keys(shard)}
    if needed:
        missing = in_order(needed.values(), artifact_store.has if there else None)
        kinds = ", ".join(sorted({spec.kind for spec in needed.values()}))
        present = sum(key not in {spec.key for spec in missing} for key in needed)
        first = len(missing) - (len(needed) - present)
        why = f", {first} of them because others are built from {'it' if first == 1 else 'them'}"
        out.say(
            f"artifacts: {len(needed)} needed ({kinds}), {present} present, {len(missing)} to be built"
            f"{why if first else ''}"
        )
    out.say(f"nothing was run; `editsweep run {quote(str(spec_file))}` runs it into {folder}")


def show_makespan(out: Output, made: Plan, actors: int | None) -> None:
    """Print the estimated time of the remaining shards: GPU-hours or CPU-hours, and the makespan on
    ``actors`` actors."""
    reserved = made.spec.engine.resources
    seconds = sum(shard.seconds_left for shard in made.shards)
    kind, share = ("GPU", reserved.gpu) if reserved.gpu else ("CPU", reserved.cpu)
    out.say(f"time: about {seconds / 3600 * share:.3g} {kind}-hours of editing and scoring")
    wanted = actors or made.spec.engine.max_actors
    if wanted is not None:
        found = made.simulate(wanted)
        out.say(
            f"schedule: {wanted} actors end after about {duration(found.makespan)}; lower bound "
            f"{duration(found.bound)} "
            f"(longest shard {duration(found.longest)}, total/{wanted} {duration(found.total / wanted)}); "
            f"ratio {found.ratio:.3f}"
        )
    out.say(f"estimate: {made.clock.note({(shard.variant, shard.T) for shard in made.shards})}")


@commands.command()
def run(
    spec_file: SpecFile,
    results: Annotated[
        str | None,
        typer.Option(help="results folder, or s3://bucket/prefix (default: results/<name of the sweep>)"),
    ] = None,
    engine: Annotated[
        Literal["ray", "local"], typer.Option(help="local: in this process, without Ray")
    ] = "ray",
    max_actors: Annotated[
        int | None, typer.Option(min=1, max=MOST_ACTORS, help="shards in flight at most")
    ] = None,
    only: Only = None,
    retry_failed: RetryFailed = False,
    redo_outdated: RedoOutdated = False,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
    runtime_env: RuntimeEnv = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="show the libraries' own log messages too")
    ] = False,
) -> None:
    """Run the unfinished part of a sweep. After an interruption, the same command continues it."""
    from orchestrator.planning.runtime_env import read_runtime_env
    from orchestrator.planning.spec import default_results, naming

    out = Output()
    silence_libraries(verbose)
    spec = _load(spec_file, overrides, trust_remote_code)
    given = None if runtime_env is None else read_runtime_env(runtime_env)
    folder = default_results(spec) if results is None else results

    from orchestrator.engine.sweep import engine_named, run_sweep
    from orchestrator.storage.open import open_store

    began = time.monotonic()
    try:
        with naming(spec_file):
            outcome = run_sweep(
                spec,
                open_store(folder),
                engine_named(engine, spec, given),
                out.view(),
                max_actors,
                only=only or (),
                retry_failed=retry_failed,
                redo_outdated=redo_outdated,
            )
    except EditSweepError:
        raise
    except KeyboardInterrupt:
        out.note("interrupted; run the same command again to continue")
        raise typer.Exit(130) from None
    except Exception as error:
        raise Bug(folder) from error
    _print_outcome(out, spec_file, folder, outcome, time.monotonic() - began)
    raise typer.Exit(outcome.exit_code)


@commands.command()
def artifacts(
    spec_file: SpecFile,
    results: Annotated[
        str | None, typer.Option(help="results folder (default: results/<name of the sweep>)")
    ] = None,
    engine: Annotated[
        Literal["ray", "local"], typer.Option(help="local: in this process, without Ray")
    ] = "ray",
    max_actors: Annotated[
        int | None, typer.Option(min=1, max=MOST_ACTORS, help="artifacts built at once at most")
    ] = None,
    overrides: Overrides = None,
    trust_remote_code: RemoteCode = False,
    runtime_env: RuntimeEnv = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="show the libraries' own log messages too")
    ] = False,
) -> None:
    """Build only the artifacts that the sweep's shards share (statistics, trained networks). After
    an interruption, the same command continues it."""
    from orchestrator.planning.runtime_env import read_runtime_env
    from orchestrator.planning.spec import default_results, naming

    out = Output()
    silence_libraries(verbose)
    spec = _load(spec_file, overrides, trust_remote_code)
    given = None if runtime_env is None else read_runtime_env(runtime_env)
    folder = default_results(spec) if results is None else results

    from orchestrator.engine.sweep import build_artifacts, engine_named
    from orchestrator.storage.open import open_store

    try:
        with naming(spec_file):
            states, interrupted = build_artifacts(
                spec, open_store(folder), engine_named(engine, spec, given), out.view(), max_actors
            )
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
        out.error(
            f"{lacking} of {len(states)} artifacts do not exist; run the same command again to continue"
        )
        raise typer.Exit(130 if interrupted else 1)


def _artifact_rows(states: Sequence[ArtifactState]) -> list[tuple[str, str, str, str]]:
    """One row per artifact: kind, key, size, state."""
    return [
        (found.spec.kind, found.spec.key, "" if found.bytes is None else size(found.bytes), found.state)
        for found in states
    ]


def _print_outcome(out: Output, spec_file: Path, folder: str, outcome: Outcome, seconds: float) -> None:
    """Print the summary, the failures, and the command that continues the sweep."""
    from orchestrator.cli.console import safety_line
    from orchestrator.results.query import open_results

    show_summary(out, open_results(folder), outcome.run_id if outcome.unfinished else None)
    if outcome.safety.actor_seconds:
        out.note(safety_line(outcome.safety))
    cells = outcome.plan.asked
    if not outcome.unfinished:
        all_cells = f"all {len(cells)} cells" if len(cells) > 1 else "the cell"
        out.say(f"{all_cells} finished in {duration(seconds)}")
        out.say("next:")
        out.say(f"  editsweep status {quote(folder)}")
        out.say(
            f'  editsweep query {quote(folder)} "SELECT method, T, avg(reliability_exact) AS reliability FROM edits '
            "WHERE scored = 'final' GROUP BY ALL ORDER BY ALL\""
        )
        return
    again = (
        f"editsweep {' '.join(quote(word) for word in sys.argv[1:])}"
        if sys.argv[1:2] == ["run"]
        else "editsweep run"
    )
    count = len(outcome.unfinished)
    left = f"{count} of {counted(len(cells), 'cell')} {'is' if count == 1 else 'are'} not finished"
    if outcome.interrupted:
        out.say(f"interrupted: {left}; everything committed so far is kept")
        out.say(f"continue with:  {again}")
        return
    titles = {
        cell.cell_id: f"{outcome.plan.variants[cell.variant].label} T={cell.T} seed={cell.seed}"
        for cell in cells
    }
    out.error(left)
    causes = by_cause(_failures(outcome, titles))
    for cause, of_cause in list(causes.items())[:_CAUSES]:
        where, _, attempts, log = of_cause[0]
        tries = f" in {attempts} attempts" if attempts > 1 else ""
        out.note(f"  {len(of_cause)} x {cause[:300]}")
        out.note(f"      first: {where}{tries}{f'; see {log}' if log else ''}")
    if len(causes) > _CAUSES:
        out.note(f"  and {len(causes) - _CAUSES} more causes")
    known = {
        cell_id
        for shard in outcome.plan.shards
        if shard.shard_id in outcome.errors
        for cell_id in outcome.plan.cell_ids(shard)
    }
    known |= {str(failure["cell_id"]) for failure in outcome.failed_groups}
    others = [titles[cell_id] for cell_id in outcome.unfinished if cell_id not in known]
    if others:
        shown = ", ".join(others[:_CAUSES]) + (
            f" and {len(others) - _CAUSES} more" if len(others) > _CAUSES else ""
        )
        out.note(f"  not run to their end: {shown}")
    if outcome.failed_groups and "--retry-failed" not in sys.argv:
        again += " --retry-failed"  # failed groups are not run again without it
    out.note(f"details:  editsweep status {quote(folder)}")
    out.note(f"try again with:  {again}")


def _failures(outcome: Outcome, titles: Mapping[str, str]) -> Iterator[Failure]:
    """What went wrong in this run, and groups that had failed before."""
    for shard in outcome.plan.shards:
        error = outcome.errors.get(shard.shard_id)
        if error is not None:
            cell_ids = outcome.plan.cell_ids(shard)
            more = f" and {counted(len(cell_ids) - 1, 'more cell')}" if len(cell_ids) > 1 else ""
            where = f"{titles[cell_ids[0]]} ({cell_ids[0]}){more}"
            first = (error.message.splitlines() or [""])[0]
            yield where, f"{error.kind}: {first}", error.attempts, error.log
    for failure in outcome.failed_groups:
        cell_id = str(failure["cell_id"])
        where = f"{titles[cell_id]} ({cell_id}), group {failure['group']}, edit {failure['position']}"
        yield where, f"{failure['kind']}: {failure['message']}", 1, ""


def _load(spec_file: Path, overrides: Sequence[str] | None, trust_remote_code: bool) -> SweepSpec:
    from orchestrator.planning.spec import check_trust, load_spec

    spec = load_spec(spec_file, overrides or ())
    check_trust(spec, str(spec_file), trust_remote_code, "on the command line too: --trust-remote-code")
    return spec
