"""Remove cells from a results folder. Nothing else ever deletes a result.

>>> found = look_up(results, ["method=wise,T=1000"])  # what would be removed  # doctest: +SKIP
>>> forget(results, found, say=print)  # takes the folder's lock  # doctest: +SKIP

Table files are replaced one by one, each atomically. If this is interrupted, calling it again
finishes it. An unfinished shard that serves a removed cell is listed in the table as a shard
without rows, so that rows are ignored which a worker may still write for it. Independent of torch
and Ray.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.results.journal import Journal
from orchestrator.results.query import Results
from orchestrator.results.records import put_aside_damaged, read_plan, write_plan
from orchestrator.results.select import select
from orchestrator.results.table import CentralTable
from orchestrator.storage import lock as locking
from workers.types import JSON


@dataclass(frozen=True)
class Found:
    """The things that :func:`forget` would remove: the groups of each cell from its limit on;
    ``rows`` of the table; ``shards`` under way, ``others`` they serve besides."""

    limits: Mapping[str, int]
    titles: tuple[str, ...]
    rows: int
    shards: tuple[str, ...]
    others: tuple[str, ...]
    kept: bool = False
    """Other shards under way that serve the cells are left alone."""


def look_up(results: Results, texts: Sequence[str]) -> Found:
    """Find the cells that match ``texts`` (see :mod:`orchestrator.results.select`) among all cells
    ever planned in this folder."""
    planned, _ = results.plan()
    described: list[dict[str, JSON]] = [{"cell_id": cell_id, **cell} for cell_id, cell in planned.items()]
    cells = select(texts, described, "--cells")
    shards: list[str] = []
    others: set[str] = set()
    for shard_id, manifest in results.journal.begun().items():
        if cells & manifest.columns.keys():
            shards.append(shard_id)
            others |= manifest.columns.keys() - cells
    limits = dict.fromkeys(sorted(cells), 0)
    return Found(
        limits=limits,
        titles=tuple(_title(cell_id, planned[cell_id]) for cell_id in planned if cell_id in cells),
        rows=results.central.count(limits),
        shards=tuple(shards),
        others=tuple(_title(cell_id, planned.get(cell_id, {})) for cell_id in sorted(others)),
    )


def look_up_superseded(results: Results) -> Found:
    """All rows that the last plan no longer asks for. A shard under way is among them if it serves
    no group that the plan asks for."""
    planned, _ = results.plan()
    live = results.live()
    ends: dict[str, int] = {}
    for shard in results.central.shards().values():
        for cell_id, groups in (*shard.cells.items(), *shard.failed.items()):
            ends[cell_id] = max(ends.get(cell_id, 0), max(groups, default=-1) + 1)
    shards = []
    for shard_id, manifest in results.journal.begun().items():
        shares = {
            (manifest.job.cells[share.cell].cell_id, share.group)
            for wave in manifest.job.waves
            for lane in wave
            for share in lane.shares
        }
        if not any(live.counts(*share) for share in shares):
            shards.append(shard_id)
            for cell_id, group in shares:
                ends[cell_id] = max(ends.get(cell_id, 0), group + 1)
    if live.groups is not None:
        ends |= {cell_id: max(1, ends.get(cell_id, 0)) for cell_id in planned if cell_id not in live.groups}
    limits = {cell_id: int(live.limit(cell_id)) for cell_id, end in ends.items() if end > live.limit(cell_id)}
    return Found(
        limits=limits,
        titles=tuple(
            _title(cell_id, planned.get(cell_id, {})) + (f" from group {limit} on" if limit else "")
            for cell_id, limit in limits.items()
        ),
        rows=results.central.count(limits),
        shards=tuple(shards),
        others=(),
        kept=True,
    )


def forget(results: Results, found: Found, say: Callable[[str], None]) -> int:
    """Remove the cells' rows and failures, and the progress of unfinished shards that serve them.
    Return the number of rows removed.

    Finished shards are gathered first, so that their other cells lose nothing. Raises
    :class:`~orchestrator.storage.lock.Locked` if a run uses the folder.
    """
    run_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    with locking.acquire(results.store, run_id, say) as lock:
        results.central.gather(results.journal)
        whole = frozenset(cell_id for cell_id, limit in found.limits.items() if not limit)
        begun = results.journal.begun()
        shards = [
            shard_id
            for shard_id, manifest in begun.items()
            if shard_id in found.shards or (not found.kept and whole & manifest.columns.keys())
        ]
        lock.check()
        removed = results.central.forget(found.limits, shards, results.journal)
        _forget_definitions(results, whole)
    return removed


def remove_cells(table: CentralTable, journal: Journal, cells: frozenset[str]) -> int:
    """Remove the rows and failures of cells, and the progress of shards that serve them; how many
    rows went. For the folder's owner, after gathering."""
    begun = journal.begun()
    shards = [shard_id for shard_id, manifest in begun.items() if cells & manifest.columns.keys()]
    return table.forget(dict.fromkeys(cells, 0), shards, journal)


def _forget_definitions(results: Results, cells: frozenset[str]) -> None:
    """Remove from plan.json those of ``cells`` that the last run did not ask for. The others stay
    planned, as cells that have not run."""
    store, paths = results.store, results.paths
    put_aside_damaged(store, paths)
    value = read_plan(store, paths)
    if value is None:
        return
    gone = cells - set(value["current"])
    kept = {cell_id: cell for cell_id, cell in value["cells"].items() if cell_id not in gone}
    write_plan(store, paths, {**value, "cells": kept})


def _title(cell_id: str, cell: dict[str, JSON]) -> str:
    return f"{cell.get('method', '?')} T={cell.get('T', '?')} seed={cell.get('seed', '?')} ({cell_id})"
