"""Run a sweep: lock the folder, plan, run the engine, gather. Common to both engines.

    worker = Worker(root="/data/results/demo", run_id="r1")  # in a worker process; keeps the loaded model
    for step in worker.run(manifest):                           # each step is durable when it is yielded
        ...

    outcome = run_sweep(spec, store, local_engine, view)  # in the driver

Progress is stored only in the journal. A shard that is run again continues after its last commit.
Independent of Ray.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.engine.endings import ended_by_signal
from orchestrator.engine.folder import (
    check_folder,
    compare_code,
    enter_folder,
    known_statistics,
    read_folder,
    read_progress,
    write_end,
    write_plan,
    write_run,
    write_statistics,
)
from orchestrator.engine.machine import check_device
from orchestrator.engine.run_state import Engine, Outcome, RunState, View, artifact_title
from orchestrator.engine.statistics import read_statistics, say_unresolved
from orchestrator.planning.inputs import read_inputs
from orchestrator.planning.plan import Plan, Planner
from orchestrator.planning.spec import SweepSpec
from orchestrator.results.artifact_store import ArtifactStore
from orchestrator.results.code import FILES_SHOWN, CellCode, say_outdated, say_unknown
from orchestrator.results.forget import remove_cells
from orchestrator.results.journal import Journal
from orchestrator.results.requests import write_requests
from orchestrator.results.select import select
from orchestrator.results.table import CentralTable, count_done
from orchestrator.storage import lock as locking
from orchestrator.storage.base import Store, StoreError
from orchestrator.storage.paths import ResultsPaths
from workers.artifacts.base import ArtifactSpec, in_order
from workers.types import EditSweepError

ENGINES = ("ray", "local")


def engine_named(
    name: Literal["ray", "local"], spec: SweepSpec, runtime_env: Mapping[str, Any] | None = None
) -> Engine:
    """The engine of that name. It is imported here, because the local engine does not need Ray.
    ``runtime_env``: what the user gives Ray's workers besides the spec's own.

    Raises :class:`EditSweepError` for another name, and :class:`ModelError` if the sweep asks for a
    GPU, its actors can run on this machine only, and there is none.
    """
    if name not in ENGINES:
        raise EditSweepError(f"engine: {name!r} is not valid; choose {' or '.join(ENGINES)}")
    if name == "local" and runtime_env is not None:
        raise EditSweepError("runtime_env: is Ray's, and has no effect with the local engine; remove it")
    if name == "local" or spec.ray.address is None:
        check_device(spec.model, "this machine")
    if name == "local":
        from orchestrator.engine.local import run_local

        return run_local
    from orchestrator.engine.ray_engine.run import run_ray

    return functools.partial(run_ray, runtime_env=runtime_env)


def plan_sweep(spec: SweepSpec, store: Store, only: Sequence[str] = (), retry_failed: bool = False) -> Plan:
    """Plan what :func:`run_sweep` would run. Writes nothing."""
    progress = read_folder(spec, store, retry_failed)
    planner = Planner(read_inputs(spec))
    return planner.plan(progress, select(only, planner.described(), "--only") if only else None)


def run_sweep(
    spec: SweepSpec,
    store: Store,
    engine: Engine,
    view: View,
    max_actors: int | None = None,
    only: Sequence[str] = (),
    retry_failed: bool = False,
    redo_outdated: bool = False,
) -> Outcome:
    """Run a sweep (the command ``editsweep run``): plan, leave out finished work, run the rest,
    gather.

    ``only``: run the cells that these fit (:mod:`orchestrator.results.select`). ``retry_failed``:
    also the groups that failed in an earlier run, which are otherwise left alone: what diverged or
    raised would do so again. ``redo_outdated``: remove the rows of cells that other code has made,
    in part or as a whole, and run these cells from the start.
    """
    paths = ResultsPaths()
    check_folder(spec, store, paths)
    # Before the folder is written to: raises all errors of the spec.
    planner = Planner(read_inputs(spec))
    chosen = select(only, planner.described(), "--only") if only else None
    planner.check(chosen)
    run_id = new_run_id()
    with ended_by_signal(view.note), locking.acquire(store, run_id, say=view.warn) as lock:
        enter_folder(spec, store, paths)
        table = CentralTable(store, paths)
        journal = Journal(store, paths)
        table.verify()
        journal.put_aside_damaged()
        table.gather(journal)
        progress = read_progress(table, journal, retry_failed)
        codes = compare_code(progress, store, paths)
        asked = [c.cell_id for c in planner.cells if chosen is None or c.cell_id in chosen]
        removed = redo_outdated and _remove_outdated(asked, codes, table, journal, view)
        if removed:
            progress = read_progress(table, journal, retry_failed)
            codes = compare_code(progress, store, paths)
        plan = planner.plan(progress, chosen)
        if removed:
            _tell_of_kept_artifacts(plan, store, view)
        _tell_of_code(plan, codes, view)
        known = known_statistics(store, paths)
        statistics = read_statistics(plan, store, known)
        for text in say_unresolved(plan, statistics):
            view.warn(text)
        lock.check()
        write_plan(plan, progress, statistics, store, paths)
        write_run(plan, store, paths, run_id, max_actors)
        write_requests(planner.dataset, planner.edited, store, paths)
        run_state = RunState(plan, store, run_id, view, check=lock.check, paths=paths)
        for warning in plan.warnings:
            view.warn(warning)
        view.begin(plan)
        try:
            if plan.shards:
                engine(run_state, max_actors)
        except BaseException:
            view.end()
            if not lock.lost:
                # If the storage has ended the run, its first error is the one to show.
                with contextlib.suppress(StoreError):
                    run_state.gather()
            raise
        view.end()
        lock.check()
        run_state.gather()
        lock.check()
        if (built := read_statistics(plan, store, known)) != statistics:
            write_statistics(built, store, paths)
        outcome = _outcome(run_state)
        write_end(store, paths, run_id, outcome)
    return outcome


def _remove_outdated(
    asked: Sequence[str],
    codes: Mapping[str, CellCode],
    table: CentralTable,
    journal: Journal,
    view: View,
) -> bool:
    """Remove the rows and the unfinished work of the cells that other code has made; whether there
    were any."""
    text = say_outdated(codes, asked)
    if not text:
        return False
    cells = frozenset(cell for cell in asked if cell in codes and codes[cell].other)
    removed = remove_cells(table, journal, cells)
    view.note(f"{text}; they are run again from the start, and their {removed} rows were removed")
    return True


def _tell_of_kept_artifacts(plan: Plan, store: Store, view: View) -> None:
    """Say which artifacts a redone cell uses again: the code that built them may have changed too,
    but some take days, and other cells use them."""
    keys = dict.fromkeys(key for shard in plan.shards for key in plan.artifact_keys(shard))
    artifacts = ArtifactStore(store)
    kept = [plan.artifacts[key] for key in keys if artifacts.has(plan.artifacts[key])]
    if kept:
        view.warn(
            f"{len(kept)} artifacts were built before and are used again "
            f"({', '.join(map(artifact_title, kept[:FILES_SHOWN]))}{', ...' if len(kept) > FILES_SHOWN else ''}); "
            f"if the code that builds them has changed, remove their files under "
            f"{store.where(artifacts.paths.artifacts)} first"
        )


def _tell_of_code(plan: Plan, codes: Mapping[str, CellCode], view: View) -> None:
    """Say which of the cells this run asks for were made by other code, and which of these it goes
    on with."""
    asked = [cell.cell_id for cell in plan.asked]
    if text := say_outdated(codes, asked):
        working = {cell_id for shard in plan.shards for cell_id in plan.cell_ids(shard)}
        both = sum(cell in working and codes[cell].other > 0 for cell in asked if cell in codes)
        if both:
            text += (
                f"; {both} of them are not finished and go on with today's code, so they hold groups of both"
            )
        view.warn(f"{text}; --redo-outdated removes their rows and runs them again")
    if text := say_unknown(codes, asked):
        view.note(text)


@dataclass(frozen=True, slots=True)
class ArtifactState:
    """One artifact of a sweep after :func:`build_artifacts`. ``bytes``: its size, None if it does
    not exist. ``state``: a text for the user."""

    spec: ArtifactSpec
    bytes: int | None
    state: str


def build_artifacts(
    spec: SweepSpec, store: Store, engine: Engine, view: View, max_actors: int | None = None
) -> tuple[tuple[ArtifactState, ...], bool]:
    """Build the artifacts that the sweep's cells need (the command ``editsweep artifacts``).

    Returns the state of each artifact, and True if the user interrupted the construction.
    """
    paths = ResultsPaths()
    check_folder(spec, store, paths)
    planner = Planner(read_inputs(spec))
    run_id = new_run_id()
    with ended_by_signal(view.note), locking.acquire(store, run_id, say=view.warn) as lock:
        enter_folder(spec, store, paths)
        plan = planner.plan(read_progress(CentralTable(store, paths), Journal(store, paths)))
        write_run(plan, store, paths, run_id, max_actors)
        run_state = RunState(plan, store, run_id, view, check=lock.check, paths=paths, artifacts_only=True)
        missing = {needed.key for needed in run_state.missing_artifacts()}
        view.begin(plan)
        try:
            if missing:
                engine(run_state, max_actors)
        finally:
            view.end()
        lock.check()
        states = _artifact_states(run_state, missing)
    return states, run_state.interrupted


def _artifact_states(run_state: RunState, missing: Collection[str]) -> tuple[ArtifactState, ...]:
    saved = {found["key"]: found for found in run_state.artifacts.unfinished()}
    states = []
    specs = in_order(run_state.plan.artifacts.values())
    sizes = {kind: run_state.artifacts.sizes(kind) for kind in {spec.kind for spec in specs}}
    for spec in specs:
        size = sizes[spec.kind].get(spec.key)
        if size is not None:
            state = "built" if spec.key in missing else "present"
        elif (failure := run_state.artifacts.failure(spec, run_state.run_id)) is not None:
            state = f"failed: {failure.splitlines()[0][:200]}"
        elif spec.key not in missing:
            state = "not needed"  # only an artifact that is present needs it
        elif (progress := saved.get(spec.key)) and progress["total"]:
            state = f"unfinished, {100 * progress['done'] // progress['total']}%"
        else:
            state = "not begun"
        states.append(ArtifactState(spec, size, state))
    return tuple(states)


def new_run_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


def _outcome(run_state: RunState) -> Outcome:
    """The outcome, by comparing the table with the plan. What the engine reported does not decide
    which cells are finished."""
    done = run_state.table.done()
    unfinished = [
        cell.cell_id
        for cell in run_state.plan.asked
        if count_done(done.get(cell.cell_id, set()), cell.groups) < cell.groups
    ]
    wanted = set(unfinished)
    failed = tuple(failure for failure in run_state.table.failed() if failure["cell_id"] in wanted)
    return Outcome(
        plan=run_state.plan,
        run_id=run_state.run_id,
        unfinished=tuple(unfinished),
        errors=dict(run_state.errors),
        failed_groups=failed,
        interrupted=run_state.interrupted,
        folder=run_state.store.where(),
        safety=run_state.safety,
    )
