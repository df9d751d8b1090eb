"""Removing cells from a results folder, deliberately: the one way a result is ever lost.

>>> found = look_up(results, ["method=wise,T=1000"])  # says what would go  # doctest: +SKIP
>>> forget(results, found, say=print)  # takes the folder's lock  # doctest: +SKIP

Table files are replaced one by one, each whole: interrupted, it is finished by doing it again. A
shard under way that serves a forgotten cell ends as a shard without rows: whatever a worker
believed dead still writes for it counts nothing. Knows nothing of torch or Ray.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.results.journal import Journal
from orchestrator.results.query import Results
from orchestrator.results.select import select
from orchestrator.results.table import CentralTable
from orchestrator.storage import lock as locking
from orchestrator.storage.base import Missing
from orchestrator.storage.sealed import seal_json, unseal_json
from workers.types import JSON


@dataclass(frozen=True)
class Found:
    """The things that :func:`forget` would remove: ``rows`` of the table; ``shards`` under way,
    ``others`` they serve besides."""

    cells: frozenset[str]
    titles: tuple[str, ...]
    rows: int
    shards: tuple[str, ...]
    others: tuple[str, ...]


def look_up(results: Results, texts: Sequence[str]) -> Found:
    """The cells that ``texts`` fit (see :mod:`orchestrator.results.select`) among all this folder
    ever planned."""
    planned, _ = results.plan()
    described: list[dict[str, JSON]] = [{"cell_id": cell_id, **cell} for cell_id, cell in planned.items()]
    cells = select(texts, described, "--cells")
    shards: list[str] = []
    others: set[str] = set()
    for shard_id, manifest in results.journal.begun().items():
        if cells & manifest.columns.keys():
            shards.append(shard_id)
            others |= manifest.columns.keys() - cells
    return Found(
        cells=cells,
        titles=tuple(_title(cell_id, planned[cell_id]) for cell_id in planned if cell_id in cells),
        rows=results.central.count(cells),
        shards=tuple(shards),
        others=tuple(_title(cell_id, planned.get(cell_id, {})) for cell_id in sorted(others)),
    )


def forget(results: Results, found: Found, say: Callable[[str], None]) -> int:
    """Remove the cells' rows and failures, and the progress of shards that serve them; how many
    rows went.

    Finished shards are gathered first, so that the other cells they serve lose nothing. Raises
    :class:`~orchestrator.storage.lock.Locked` while a run is at work in the folder.
    """
    run_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    with locking.acquire(results.store, run_id, say) as lock:
        results.central.gather(results.journal)
        lock.check()
        removed = remove_cells(results.central, results.journal, found.cells)
        _forget_definitions(results, found.cells)
    return removed


def remove_cells(table: CentralTable, journal: Journal, cells: frozenset[str]) -> int:
    """Remove the rows and failures of cells, and the progress of shards that serve them; how many
    rows went. For the folder's owner, after gathering."""
    begun = journal.begun()
    shards = [shard_id for shard_id, manifest in begun.items() if cells & manifest.columns.keys()]
    return table.forget(cells, shards, journal)


def _forget_definitions(results: Results, cells: frozenset[str]) -> None:
    """From plan.json go the cells that the last run did not ask for; the others are as if they had
    never been run."""
    store, paths = results.store, results.paths
    try:
        value = unseal_json(store.read(paths.plan), store.where(paths.plan))
    except Missing:
        return
    gone = cells - set(value["current"])
    kept = {cell_id: cell for cell_id, cell in value["cells"].items() if cell_id not in gone}
    store.replace(paths.plan, seal_json({**value, "cells": kept}))


def _title(cell_id: str, cell: dict[str, JSON]) -> str:
    return f"{cell.get('method', '?')} T={cell.get('T', '?')} seed={cell.get('seed', '?')} ({cell_id})"
