"""Columns of the central table, declared as data: type, unit, meaning; and how tables are declared.

The tables beside the central one are declared in :mod:`orchestrator.results.beside`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from workers.scoring.registry import SCORES, Registry
from workers.types import EditSweepError

Kind = Literal["identity", "moment", "score", "cost", "provenance", "text"]
Type = Literal["string", "int32", "int64", "double", "bool", "strings", "probes"]
Source = Literal["stream", "cell", "attempt", "reader"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. ``source`` of its values: the stream (per row), the plan (per cell),
    the attempt, or the reader, who finds them in the seals. ``strings`` is a list of texts,
    ``probes`` a list of questions."""

    name: str
    type: Type
    unit: str
    meaning: str
    kind: Kind
    source: Source = "stream"
    nullable: bool = False


_BEFORE_SCORES: tuple[Column, ...] = (
    Column("sweep", "string", "", "name of the sweep", "identity", "cell"),
    Column("cell_id", "string", "", "hash of everything the cell's numbers depend on", "identity"),
    Column("shard_id", "string", "", "unit of scheduling that produced the row", "identity", "attempt"),
    Column("model", "string", "", "base model as named in the spec", "identity", "cell"),
    Column("dataset", "string", "", "data set as named in the spec", "identity", "cell"),
    Column("method", "string", "", "label of the method variant", "identity", "cell"),
    Column("algorithm", "string", "", "name of the method in the registry", "identity", "cell"),
    Column("hparams_id", "string", "", "hash of the method's hyperparameters", "identity", "cell"),
    Column("T", "int32", "edits", "consecutive edits before final scoring and rollback", "identity", "cell"),
    Column("seed", "int64", "", "seed of the cell", "identity", "cell"),
    Column("batch_size", "int32", "edits", "requests edited in one call", "identity", "cell"),
    Column(
        "rollback", "string", "", "group: after every T edits; never: continual editing", "identity", "cell"
    ),
    Column("group", "int32", "", "index of the group of T requests the request belongs to", "identity"),
    Column("position", "int32", "", "place of the request within its group", "identity"),
    Column("case_id", "string", "", "id of the request in the data set", "identity"),
    Column("edits_applied", "int32", "edits", "edits the state had when the request was scored", "moment"),
    Column(
        "scored",
        "string",
        "",
        "immediate: after the edit; final: at the group's end; checkpoint: at a score_at mark",
        "moment",
    ),
)
_AFTER_SCORES: tuple[Column, ...] = (
    Column("edit_seconds", "double", "s", "wall time of the edit, shared among the active lanes", "cost"),
    Column(
        "score_seconds", "double", "s", "wall time of the scoring, shared among the scored requests", "cost"
    ),
    Column("lanes", "int32", "", "lanes that ran in lockstep", "cost"),
    Column("iterations", "int32", "", "optimisation steps of the edit", "cost"),
    Column("loss", "double", "", "final loss of the edit", "cost", nullable=True),
    Column("device", "string", "", "device the stream ran on", "cost"),
    Column("peak_memory_bytes", "int64", "bytes", "peak memory of the actor so far", "cost", nullable=True),
    Column("overlay_bytes", "int64", "bytes", "size of the lane's overlay", "cost"),
    Column("delta_norm", "double", "", "relative Frobenius norm of the change", "cost", nullable=True),
    Column("details", "string", "JSON", "further figures of the method", "cost", nullable=True),
    Column(
        "score_splits",
        "int32",
        "",
        "times the scoring batch was halved because memory ran out; above 0 scores agree up to rounding only",
        "provenance",
        nullable=True,
    ),
    Column("run_id", "string", "", "call of `editsweep run` that produced the row", "provenance", "attempt"),
    Column("attempt", "int32", "", "attempt of the shard that produced the row", "provenance", "attempt"),
    Column(
        "training_overlap",
        "int32",
        "requests",
        "requests trained on that the sweep edits, with `allow_overlap: true`; null: refused, or nothing "
        "is trained",
        "provenance",
        "cell",
        nullable=True,
    ),
)


def columns(scores: Registry = SCORES) -> tuple[Column, ...]:
    """Every column of a table whose rows hold ``scores``, in order."""
    scored = (
        Column(c.name, c.score.type, c.score.unit, c.meaning, "score", nullable=True) for c in scores.columns
    )
    return (*_BEFORE_SCORES, *scored, *_AFTER_SCORES)


COLUMNS: tuple[Column, ...] = columns()
"""The columns of the central table."""
STREAM_COLUMNS: frozenset[str] = frozenset(c.name for c in COLUMNS if c.source == "stream")
CELL_COLUMNS: frozenset[str] = frozenset(c.name for c in COLUMNS if c.source == "cell")
KEY: tuple[str, ...] = ("cell_id", "group", "scored", "edits_applied", "position")
"""Identifies a row, and orders the rows of a file."""

VARYING: frozenset[str] = frozenset(
    {"edit_seconds", "score_seconds", "peak_memory_bytes", "run_id", "attempt"}
)
"""Columns in which two runs of the same plan may differ; all others are equal bit for bit."""

REPEATING = frozenset(c.name for c in COLUMNS if c.type != "double" or c.unit == "0..1")
"""Columns that are dictionary-encoded, because their values repeat: half the time to read, a tenth
less to store. Times and losses hardly ever repeat."""


class TableError(EditSweepError):
    """Rows do not fit the declared columns, or the table was used wrongly."""


@dataclass(frozen=True)
class Declaration:
    """One table: its name, its columns, the columns that identify a row and order the rows, and what
    a row is."""

    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    meaning: str

    def of(self, source: Source) -> frozenset[str]:
        """Names of the columns whose values come from ``source``."""
        return frozenset(c.name for c in self.columns if c.source == source)


EDITS = Declaration("edits", COLUMNS, KEY, "One row per scored request and moment.")
"""The central table."""


def schema(declared: Sequence[Column] = COLUMNS) -> pa.Schema:
    """The Arrow schema of a table."""
    probe = {"probe": pa.string(), "number": pa.int32(), "prompt": pa.string(), "target": pa.string()}
    more = {"aliases": pa.list_(pa.string()), "probe_group": pa.string()}
    types: dict[Type, pa.DataType] = {
        "string": pa.string(),
        "int32": pa.int32(),
        "int64": pa.int64(),
        "double": pa.float64(),
        "bool": pa.bool_(),
        "strings": pa.list_(pa.string()),
        "probes": pa.list_(pa.struct({**probe, **more})),
    }
    return pa.schema([pa.field(c.name, types[c.type], nullable=c.nullable) for c in declared])


def no_rows(of: Declaration = EDITS) -> pa.Table:
    """A table without rows. (Arrow's own ``empty_table`` imports pandas, which takes longer than
    most queries.)"""
    found = schema(of.columns)
    return pa.Table.from_arrays([pa.nulls(0, field.type) for field in found], schema=found)


def docs(declared: Sequence[Column] = COLUMNS) -> str:
    """The columns as a markdown table."""
    lines = [
        "| column | type | unit | kind | may be null | meaning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in declared:
        lines.append(
            f"| `{c.name}` | {c.type} | {c.unit} | {c.kind} | {'yes' if c.nullable else ''} | {c.meaning} |"
        )
    return "\n".join(lines) + "\n"


def rows_to_table(rows: Sequence[Mapping[str, Any]], declared: Sequence[Column] = COLUMNS) -> pa.Table:
    """Rows as dicts -> Arrow table. ``details`` may be a dict; it becomes JSON.

    Raises :class:`TableError` for an unknown or missing column, a null that is not allowed, or a
    value of another type. Arrow alone would turn a missing column into nulls without an error.
    """
    names = {c.name for c in declared}
    for number, row in enumerate(rows):
        if row.keys() != names:
            unknown, missing = sorted(row.keys() - names), sorted(names - row.keys())
            raise TableError(f"row {number}: unknown columns {unknown}, missing columns {missing}")
    none = type(None)
    accepted: dict[str, set[type]] = {
        "string": {str, none},
        "int32": {int, none},
        "int64": {int, none},
        "double": {float, int, none},
        "bool": {bool, none},
    }
    arrays = []
    for field in schema(declared):
        values = [row[field.name] for row in rows]
        if field.name == "details":
            values = [
                None if v is None else v if isinstance(v, str) else json.dumps(v, sort_keys=True)
                for v in values
            ]
        strange = {type(v) for v in values} - accepted.get(str(field.type), {list})
        if strange:
            raise TableError(
                f"column {field.name} ({field.type}): a value of type {min(t.__name__ for t in strange)}"
            )
        try:
            array = pa.array(values, field.type)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise TableError(f"column {field.name} ({field.type}): {error}") from error
        if array.null_count and not field.nullable:
            raise TableError(f"column {field.name} must not be null")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema(declared))


def sort_rows(table: pa.Table, key: Sequence[str] = KEY) -> pa.Table:
    """The rows ordered by their key."""
    return table.take(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in key]))


def has_duplicates(ordered: pa.Table, key: Sequence[str] = KEY) -> bool:
    """Return whether two rows of a table ordered by ``key`` share a key."""
    same = None
    for name in key:
        column = ordered.column(name)
        equal = pc.equal(column.slice(1), column.slice(0, max(len(column) - 1, 0)))
        same = equal if same is None else pc.and_(same, equal)
    return bool(pc.any(same).as_py())


def check_columns(columns: Sequence[str] | None, of: Declaration = EDITS) -> None:
    """Raises :class:`TableError` with the valid names for an unknown column."""
    if isinstance(columns, str):
        raise TableError(f"columns: expected a list of names, as in [{columns!r}], found {columns!r}")
    names = [c.name for c in of.columns]
    unknown = [c for c in columns or () if c not in names]
    if unknown:
        raise TableError(f"unknown columns {unknown}; valid are: {', '.join(names)}")
