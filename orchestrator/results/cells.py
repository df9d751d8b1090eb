"""The cells of a results folder: their definition, and what became of them.

A folder that was handed on explains itself: everything here comes from its own files. Knows nothing
of torch or Ray.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.results.causes import by_cause
from orchestrator.results.code import CellCode
from orchestrator.results.live import Live
from orchestrator.results.table import CentralTable, count_done
from workers.types import JSON


@dataclass(frozen=True, slots=True)
class CellColumn:
    """One column of the view ``cells``. ``type``: DuckDB's."""

    name: str
    type: str
    meaning: str


CELL_VIEW: tuple[CellColumn, ...] = (
    CellColumn("cell_id", "VARCHAR", "hash of everything the cell's numbers depend on"),
    CellColumn("method", "VARCHAR", "label of the method variant"),
    CellColumn("algorithm", "VARCHAR", "name of the method in the registry"),
    CellColumn("version", "INTEGER", "version of the method's numbers"),
    CellColumn("hparams_id", "VARCHAR", "hash of the hyperparameters"),
    CellColumn("hparams", "JSON", "the hyperparameters: `hparams->>'lr'`"),
    CellColumn("T", "INTEGER", "edits of a group"),
    CellColumn("seed", "BIGINT", "seed"),
    CellColumn("rollback", "VARCHAR", "group, or never: continual editing"),
    CellColumn("batch_size", "INTEGER", "requests edited in one call"),
    CellColumn("model", "VARCHAR", "base model as named in the spec"),
    CellColumn("model_fingerprint", "VARCHAR", "hash of its weights"),
    CellColumn("tokenizer_fingerprint", "VARCHAR", "hash of its tokenizer"),
    CellColumn("dataset", "VARCHAR", "data set as named in the spec"),
    CellColumn("dataset_fingerprint", "VARCHAR", "hash of its requests"),
    CellColumn("asked", "INTEGER", "groups that the last plan asked for; 0 if the cell is superseded"),
    CellColumn("done", "INTEGER", "groups whose rows are all in the table, superseded ones too"),
    CellColumn("failed", "INTEGER", "groups that failed and were not run since"),
    CellColumn("cause", "VARCHAR", "the most frequent cause of their failure; null: none failed"),
    CellColumn(
        "code", "VARCHAR", "made by today's code: same, other, mixed (in part), unknown, none (no work yet)"
    ),
    CellColumn("code_files", "VARCHAR", "files of today's code that differ, separated by commas"),
    CellColumn("superseded", "BOOLEAN", "the last plan no longer asks for the cell"),
)


def cells(
    definitions: Mapping[str, Mapping[str, JSON]],
    live: Live,
    table: CentralTable,
    codes: Mapping[str, CellCode],
) -> Iterator[dict[str, JSON]]:
    """Every cell that the folder has ever planned, with the columns :data:`CELL_VIEW`, in the order
    in which they were first planned."""
    shards = table.shards()
    done = table.done(shards)
    causes: dict[str, Counter[str]] = {}
    for failure in table.failed(shards):
        text = f"{failure['kind']}: {failure['message']}".splitlines()[0]
        causes.setdefault(str(failure["cell_id"]), Counter())[text] += 1
    for cell_id, cell in definitions.items():
        groups = int(cell["groups"])
        superseded = not live.counts(cell_id, 0)
        code = codes.get(cell_id, CellCode())
        wrong = by_cause(causes.get(cell_id, {}))
        found = {
            "cell_id": cell_id,
            "hparams": json.dumps(cell["config"], sort_keys=True, ensure_ascii=False),
            "asked": 0 if superseded else groups,
            "done": len(done.get(cell_id, ()))
            if superseded
            else count_done(done.get(cell_id, set()), groups),
            "failed": wrong.total(),
            "cause": wrong.most_common(1)[0][0] if wrong else None,
            "code": code.state,
            "code_files": ", ".join(code.files) or None,
            "superseded": superseded,
        }
        yield {c.name: found[c.name] if c.name in found else cell.get(c.name) for c in CELL_VIEW}


def docs() -> str:
    """The columns as a markdown table."""
    lines = ["| column | type | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{c.name}` | {c.type} | {c.meaning} |" for c in CELL_VIEW]
    return "\n".join(lines) + "\n"


def as_query(found: Iterable[Mapping[str, JSON]]) -> str:
    """Cells as a SQL query. (Arrow imports pandas to make an array of a list.)"""
    casts = ", ".join(f'CAST("{c.name}" AS {c.type}) AS "{c.name}"' for c in CELL_VIEW)
    names = ", ".join(f'"{c.name}"' for c in CELL_VIEW)
    rows = [f"({', '.join(map(_literal, cell.values()))})" for cell in found]
    none = "" if rows else " WHERE false"
    values = ", ".join(rows or [f"({', '.join(['NULL'] * len(CELL_VIEW))})"])
    return f"SELECT {casts} FROM (VALUES {values}) v({names}){none}"


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"
