"""Use a results folder: check it, write the plan and the record of each run, read progress."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import yaml

from orchestrator.engine.machine import this_process, versions
from orchestrator.engine.run_state import Outcome
from orchestrator.engine.statistics import Statistic, Statistics
from orchestrator.planning.plan import Plan, Progress, Spent
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.results import records
from orchestrator.results.code import CellCode, CodeBook, held_groups
from orchestrator.results.journal import Journal, ShardProgress
from orchestrator.results.records import (
    Identity,
    is_results,
    newest_spec,
    put_aside_damaged,
    read_identity,
    write_identity,
)
from orchestrator.results.table import CentralTable, TableShard
from orchestrator.storage.base import Damaged, Missing, Store, StoreError
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import seal_json, unseal_json
from workers.methods import get_method
from workers.scoring.registry import SCORES
from workers.types import JSON, EditSweepError, SpecError


class ResultsError(EditSweepError):
    """The folder belongs to another sweep, or is not a results folder."""


class ScoringError(ResultsError, SpecError):
    """The folder's cells were scored with other settings than the spec's."""


def read_progress(table: CentralTable, journal: Journal, retry_failed: bool = False) -> Progress:
    """Read the progress of a results folder for the planner. ``retry_failed``: failed groups count
    as not run."""
    listed = table.shards()
    begun = tuple(manifest for shard_id, manifest in journal.begun().items() if shard_id not in listed)
    spent = [
        Spent(shard.shard_id, tuple(shard.cells), shard.edits, _seconds(shard))
        for shard in listed.values()
        if shard.cells
    ]
    for manifest in begun:
        try:
            progress = journal.progress(manifest.shard_id)
        except (Missing, EditSweepError):
            continue  # gathered meanwhile, or damaged: only the time estimates lack it
        cells = tuple(manifest.columns)
        spent.append(Spent(manifest.shard_id, cells, progress.edits, _seconds(progress), progress.committed))
    given_up = {} if retry_failed else table.given_up()
    return Progress(done=table.done(), given_up=given_up, begun=begun, used=frozenset(listed), spent=spent)


def read_folder(spec: SweepSpec, store: Store, retry_failed: bool = False) -> Progress:
    """Progress of a sweep in a results folder, which need not exist yet. Writes nothing.

    Raises :class:`ResultsError` for the folder of another sweep.
    """
    paths = ResultsPaths()
    check_folder(spec, store, paths)
    if not is_results(store, paths):
        return Progress()
    return read_progress(CentralTable(store, paths), Journal(store, paths), retry_failed)


def _seconds(shard: TableShard | ShardProgress) -> float:
    return shard.edit_seconds + shard.score_seconds + shard.commit_seconds


def check_folder(spec: SweepSpec, store: Store, paths: ResultsPaths) -> None:
    """Raise :class:`ResultsError` if the folder belongs to another sweep, or holds files but is not
    a results folder. Writes nothing."""
    try:
        found: Identity | None = read_identity(store, paths)
    except (Missing, Damaged):
        found = _recorded_identity(store, paths)
    except StoreError as error:
        if error.cause.startswith("a part of the path is a file"):
            raise ResultsError(
                f"{store.where()} is a file, not a folder; give a folder with --results"
            ) from None
        raise
    if found is None:
        return
    if found.name != spec.name:
        raise ResultsError(
            f"{store.where()} holds the results of the sweep {found.name!r}, not of {spec.name!r}; "
            "give another folder with --results"
        )
    mine = SCORES.identity(spec.scoring)
    theirs = mine if found.scoring is None else found.scoring
    changed = [
        f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} here"
        for key in dict.fromkeys((*mine, *theirs))
        if theirs.get(key) != mine.get(key)
    ]
    if changed:
        raise ScoringError(
            f"scoring: the cells in {store.where()} were scored with other settings ({'; '.join(changed)}); "
            "use the same settings, or a new folder with --results"
        )


def _recorded_identity(store: Store, paths: ResultsPaths) -> Identity | None:
    """The identity of a folder without a readable sweep.json, by the spec of its last run; None for
    an empty folder, and for one whose runs left none. Raises :class:`ResultsError` for a folder
    that holds other things than results."""
    if not is_results(store, paths):
        foreign = [e.name for e in store.list("") if e.name != paths.lock and not _by_storage(e.name)]
        if foreign:
            raise ResultsError(
                f"{store.where()} is not a results folder: it has no {paths.sweep} but holds "
                f"{', '.join(foreign[:5])}; "
                "give an empty or a new folder with --results"
            )
        return None
    raw = newest_spec(store, paths)
    if raw is None:
        return None
    try:
        last = parse_spec(yaml.safe_dump(raw), store.where(paths.runs), Path("/"))
    except SpecError:  # of another version
        return Identity(str(raw.get("name")), None, "")
    return Identity(last.name, SCORES.identity(last.scoring), "")


def _by_storage(name: str) -> bool:
    """Return whether file servers and desktops put an entry of this name into any folder."""
    return name == "lost+found" or name.startswith((".", "@"))


def enter_folder(spec: SweepSpec, store: Store, paths: ResultsPaths) -> None:
    """Make the folder this sweep's results folder, or check that it is. A sweep.json or plan.json
    that cannot be read is put aside, and the first is written anew."""
    check_folder(spec, store, paths)
    put_aside_damaged(store, paths)
    if not store.exists(paths.sweep):
        seals = CentralTable(store, paths).seals()
        write_identity(store, paths, Identity.new(spec.name, SCORES.identity(spec.scoring)), seals)


def held_by(progress: Progress) -> dict[str, set[int]]:
    """The groups of each cell that hold work of earlier runs, half done ones too."""
    committed = {spent.shard_id: spent.committed for spent in progress.spent}
    begun = [
        # one whose progress could not be read may hold work in all its groups
        (manifest, committed.get(manifest.shard_id, manifest.bounds[-1]))
        for manifest in progress.begun
    ]
    return held_groups(progress.done, progress.given_up, begun)


def compare_code(progress: Progress, store: Store, paths: ResultsPaths) -> dict[str, CellCode]:
    """Compare the code that made each cell's groups with today's."""
    return CodeBook(_read_plan(store, paths)).compare(held_by(progress))


def _read_plan(store: Store, paths: ResultsPaths) -> dict[str, JSON]:
    found = records.read_plan(store, paths) or {"cells": {}}
    return {**found, "cells": dict(found["cells"])}


def known_statistics(store: Store, paths: ResultsPaths) -> list[Statistic]:
    """The second moments that plan.json has noted with its cells."""
    cells = _read_plan(store, paths)["cells"].values()
    noted = {value["key"]: value for cell in cells for value in cell.get("statistics", ())}
    return [Statistic.from_json(value) for value in noted.values()]


def write_statistics(statistics: Statistics, store: Store, paths: ResultsPaths) -> None:
    """Note with each cell of plan.json the second moments that it uses."""
    value = _read_plan(store, paths)
    for cell_id, found in statistics.items():
        value["cells"][cell_id]["statistics"] = [statistic.to_json() for statistic in found]
    records.write_plan(store, paths, value)


def write_plan(
    plan: Plan, progress: Progress, statistics: Statistics, store: Store, paths: ResultsPaths
) -> None:
    """plan.json: the definition of every cell there ever was, which of them the last plan asked
    for, the code that works on each, and the second moments that it uses, as far as they exist."""
    before = _read_plan(store, paths)
    known, book, held = before["cells"], CodeBook(before), held_by(progress)
    working = {cell_id for shard in plan.shards for cell_id in plan.cell_ids(shard)}
    codes: dict[int, str] = {}
    for cell in plan.cells:
        if cell.cell_id in working:
            if cell.variant not in codes:
                kind = get_method(plan.variants[cell.variant].algorithm)
                codes[cell.variant] = book.today(kind.__module__)
            book.work(cell.cell_id, codes[cell.variant], len(held.get(cell.cell_id, ())))
    for cell in plan.cells:
        variant = plan.variants[cell.variant]
        known[cell.cell_id] = {
            "method": variant.label,
            "algorithm": variant.algorithm,
            "version": variant.version,
            "hparams_id": variant.hparams_id,
            "config": variant.config,
            "T": cell.T,
            "seed": cell.seed,
            "groups": cell.groups,
            "rollback": plan.common.rollback,
            "batch_size": cell.batch_size,
            "model": plan.common.model.name,
            "model_fingerprint": plan.common.model_fingerprint,
            "tokenizer_fingerprint": plan.common.tokenizer_fingerprint,
            "dataset": plan.common.dataset_name,
            "dataset_fingerprint": plan.common.dataset_fingerprint,
            "code": book.cells.get(cell.cell_id, []),
            "statistics": [found.to_json() for found in statistics.get(cell.cell_id, ())],
        }
    current = [cell.cell_id for cell in plan.cells]
    records.write_plan(store, paths, {"cells": known, "current": current, "codes": book.to_json()})


def write_run(plan: Plan, store: Store, paths: ResultsPaths, run_id: str, max_actors: int | None) -> None:
    text = yaml.safe_dump(plan.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.replace(paths.run_spec(run_id), text.encode())
    info: dict[str, JSON] = {
        "run_id": run_id,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv[1:],
        "max_actors": max_actors,
        "versions": versions(),
        "driver": this_process(),
        "shards": len(plan.shards),
    }
    store.replace(paths.run_info(run_id), seal_json(info))


def write_end(store: Store, paths: ResultsPaths, run_id: str, outcome: Outcome) -> None:
    key = paths.run_info(run_id)
    try:
        info = unseal_json(store.read(key), store.where(key))
    except (Missing, Damaged):
        info = {"run_id": run_id}  # damaged since the run began; no result depends on it
    info |= {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "exit_code": outcome.exit_code,
        "unfinished_cells": len(outcome.unfinished),
        "errors": [dataclasses.asdict(error) for error in outcome.errors.values()],
        "safety": dataclasses.asdict(outcome.safety),
    }
    store.replace(key, seal_json(info))
