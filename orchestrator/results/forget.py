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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.results.query import Results
from orchestrator.results.select import select
from orchestrator.storage import lock as locking
from orchestrator.storage.base import Missing
from orchestrator.storage.sealed import seal_json, unseal_json
from workers.types import JSON


@dataclass(frozen=True)
class Found:
    """Everything that :func:`forget` would remove: ``cells``, their ``rows`` of the table, and
    unfinished ``shards``. ``others``: further cells that these shards serve."""

    cells: frozenset[str]
    titles: tuple[str, ...]
    rows: int
    shards: tuple[str, ...]
    others: tuple[str, ...]


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
    return Found(
        cells=cells,
        titles=tuple(_title(cell_id, planned[cell_id]) for cell_id in planned if cell_id in cells),
        rows=results.central.count(cells),
        shards=tuple(shards),
        others=tuple(_title(cell_id, planned.get(cell_id, {})) for cell_id in sorted(others)),
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
        begun = results.journal.begun()
        shards = [shard_id for shard_id, manifest in begun.items() if found.cells & manifest.columns.keys()]
        lock.check()
        removed = results.central.forget(found.cells, shards, results.journal)
        _forget_definitions(results, found.cells)
    return removed


def _forget_definitions(results: Results, cells: frozenset[str]) -> None:
    """Remove from plan.json those of ``cells`` that the last run did not ask for. The others stay
    planned, as cells that have not run."""
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
