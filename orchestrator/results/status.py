"""State of a results folder: progress, failures, and the driver that runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.types import JSON

if TYPE_CHECKING:
    from orchestrator.results.query import Results


def read_status(folder: str) -> dict[str, JSON]:
    """Return the state of a results folder, as `status --json` prints it."""
    from orchestrator.results.artifact_store import ArtifactStore
    from orchestrator.results.code import CellCode, cell_codes, say_outdated, say_unknown
    from orchestrator.results.query import open_results
    from orchestrator.results.records import identity
    from orchestrator.results.table import count_done
    from orchestrator.storage import lock
    from orchestrator.storage.base import Missing

    results = open_results(folder)
    store, paths = results.store, results.paths
    found = identity(store, paths)
    name = found.name if found else None
    planned, current = results.plan()
    shards = []
    begun = results.journal.begun()
    for shard_id, manifest in begun.items():
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
                "last_error": progress.error,
            }
        )
    listed = results.central.shards()
    for shard_id in results.journal.shard_ids():
        if shard_id not in begun and shard_id not in listed:
            results.journal.tell_if_lost(shard_id)
    done = results.central.done(listed)
    failed = results.central.failed(listed)
    failed_groups = Counter(str(failure["cell_id"]) for failure in failed)
    failures = _failures_of_cells(results, shards, failed)
    codes = cell_codes(results)
    cells = []
    for cell_id in current:
        cell = planned[cell_id]
        code = codes.get(cell_id, CellCode())
        cells.append(
            {
                "cell_id": cell_id,
                **{key: cell[key] for key in ("method", "algorithm", "T", "seed", "groups")},
                "done": count_done(done.get(cell_id, set()), cell["groups"]),
                "failed": failed_groups[cell_id],
                "code": code.state,
                "code_differs": list(code.files),
                "groups_by_other_code": code.other,
                "unresolved": [s for s in cell.get("statistics", ()) if not s["resolved"]],
            }
        )
    holder = lock.owner(store, paths)
    keys = ("cell_id", "method", "T", "seed")
    wrong = [
        {**{key: cell[key] for key in keys}, "failures": failures[cell["cell_id"]]}
        for cell in cells
        if cell["done"] < cell["groups"] and cell["cell_id"] in failures
    ]
    return {
        "sweep": name,
        "running": str(holder) if holder else None,
        "finished": sum(cell["done"] == cell["groups"] for cell in cells),
        "cells": cells,
        "code": {
            "outdated": say_outdated(codes, current),
            "unknown": say_unknown(codes, current),
        },
        "artifacts": ArtifactStore(store, paths).unfinished(),
        "shards": shards,
        "failures": failed,
        "failed_cells": wrong,
    }


def _failures_of_cells(
    results: Results, shards: Sequence[dict[str, JSON]], failed: Sequence[dict[str, JSON]]
) -> dict[str, list[dict[str, JSON]]]:
    """Cell id -> its failures: failed groups, and unfinished shards whose last attempt raised."""
    store, paths = results.store, results.paths
    logs: dict[str, str] = {}
    for entry in store.list(paths.logs):
        of_shard = paths.log_of_shard(entry.name)
        if of_shard is not None:
            logs[of_shard[0]] = store.where(entry.key)  # listed by name: the newest attempt's log comes last
    found: dict[str, list[dict[str, JSON]]] = {}
    for failure in sorted(failed, key=lambda failure: int(failure["group"])):
        found.setdefault(str(failure["cell_id"]), []).append(
            {
                "shard_id": failure["shard_id"],
                "group": failure["group"],
                "attempts": failure["attempts"],
                "step": f"group {failure['group']}, edit {failure['position']}",
                "kind": failure["kind"],
                "message": failure["message"],
                "log": logs.get(str(failure["shard_id"])),
            }
        )
    for shard in shards:
        error = shard["last_error"]
        for cell_id in shard["cells"] if error else ():
            found.setdefault(str(cell_id), []).append(
                {
                    "shard_id": shard["shard_id"],
                    "attempts": shard["attempts"],
                    "step": f"tick {shard['committed']} of {shard['ticks']}",
                    "kind": error.get("kind"),
                    "message": error.get("message"),
                    "log": logs.get(str(shard["shard_id"])),
                }
            )
    return found
