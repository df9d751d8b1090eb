"""The difference between two results folders: did a change alter anything?

    found = compare(open_results("before"), open_results("after"))
    found.same, found.columns["reliability_exact"].rows

Of both folders the rows that count are compared, by key, bit for bit. Columns in which two runs of
one plan may differ (times, memory, run and attempt) are left out, and those that are named. Knows
nothing of torch or Ray.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.results.columns import COLUMNS, KEY, VARYING, check_columns
from workers.types import JSON

if TYPE_CHECKING:
    from orchestrator.results.query import Results

_SCORES = tuple(c.name for c in COLUMNS if c.kind == "score")


@dataclass(frozen=True, slots=True)
class ColumnDifference:
    """``rows`` that differ, and the ``largest`` difference of two finite numbers; None for text, or
    where a number stands beside none."""

    rows: int
    largest: float | None


@dataclass(frozen=True)
class Difference:
    """All that differs. ``only``: ids of cells that one folder alone has, first and second;
    ``definitions``: per cell that both have, the parts of its definition that differ;
    ``rows_only``: rows whose key the other folder lacks; ``columns``: those of the ``compared``
    ones that differ among the ``rows`` that both have; ``means``: method, T, score -> the final
    means of first and second, where they differ."""

    only: tuple[tuple[str, ...], tuple[str, ...]]
    definitions: Mapping[str, tuple[str, ...]]
    rows_only: tuple[int, int]
    rows: int
    compared: tuple[str, ...]
    columns: Mapping[str, ColumnDifference]
    means: Mapping[tuple[str, int, str], tuple[float | None, float | None]]

    @property
    def same(self) -> bool:
        return not (any(self.only) or self.definitions or any(self.rows_only) or self.columns)


def compare(first: Results, second: Results, ignore: Collection[str] = ()) -> Difference:
    """Compare two folders; the columns ``ignore`` may differ. Raises
    :class:`~orchestrator.results.columns.TableError` for an unknown one."""
    check_columns(list(ignore))
    (defined, asked), (defined_too, asked_too) = first.plan(), second.plan()
    both = [cell_id for cell_id in asked if cell_id in set(asked_too)]
    definitions = {
        cell_id: changed for cell_id in both if (changed := _changed(defined[cell_id], defined_too[cell_id]))
    }
    compared = [
        c.name for c in COLUMNS if c.name not in VARYING and c.name not in ignore and c.name not in KEY
    ]
    tables = tuple(_keyed(results.table([*KEY, *compared])) for results in (first, second))
    joined = (
        tables[0]
        .select(["key", "row"])
        .join(tables[1].select(["key", "row"]), "key", join_type="inner", right_suffix="_too")
    )
    one, two = tables[0].take(joined["row"]), tables[1].take(joined["row_too"])
    columns = {}
    for name in compared:
        found = _difference(one[name], two[name])
        if found.rows:
            columns[name] = found
    return Difference(
        only=(_without(asked, asked_too), _without(asked_too, asked)),
        definitions=definitions,
        rows_only=(tables[0].num_rows - one.num_rows, tables[1].num_rows - two.num_rows),
        rows=one.num_rows,
        compared=tuple(compared),
        columns=columns,
        means=_means(first, second),
    )


_NOTED = frozenset({"code", "statistics"})
"""Parts of a cell in plan.json that say how it was made, not what it is."""


def _changed(one: Mapping[str, JSON], two: Mapping[str, JSON]) -> tuple[str, ...]:
    keys = dict.fromkeys(key for key in (*one, *two) if key not in _NOTED)
    return tuple(key for key in keys if one.get(key) != two.get(key))


def _without(ids: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    known = set(others)
    return tuple(cell_id for cell_id in ids if cell_id not in known)


def _keyed(table: pa.Table) -> pa.Table:
    """With a text made of :data:`KEY` and the row's number."""
    texts = [pc.cast(table[name], pa.string()) for name in KEY]
    key = pc.binary_join_element_wise(*texts, "\x1f")
    return table.append_column("key", key).append_column("row", pa.array(range(table.num_rows), pa.int64()))


def _difference(one: pa.ChunkedArray, two: pa.ChunkedArray) -> ColumnDifference:
    numeric = pa.types.is_floating(one.type) or pa.types.is_integer(one.type)
    same = pc.fill_null(pc.equal(one, two), False)
    same = pc.or_(same, pc.and_(pc.is_null(one), pc.is_null(two)))
    if pa.types.is_floating(one.type):
        both_nan = pc.and_(pc.is_nan(one), pc.is_nan(two))
        same = pc.or_(same, pc.fill_null(both_nan, False))
    differ = pc.invert(same)
    rows = pc.sum(differ).as_py() or 0
    if not rows or not numeric:
        return ColumnDifference(rows, None)
    apart = pc.abs(
        pc.subtract(pc.cast(one.filter(differ), pa.float64()), pc.cast(two.filter(differ), pa.float64()))
    )
    finite = apart.filter(pc.fill_null(pc.is_finite(apart), False))
    return ColumnDifference(rows, pc.max(finite).as_py())


def _means(first: Results, second: Results) -> dict[tuple[str, int, str], tuple[float | None, float | None]]:
    question = (
        "SELECT method, T, "
        + ", ".join(f"avg({name})::DOUBLE AS {name}" for name in _SCORES)
        + " FROM edits WHERE scored = 'final' GROUP BY ALL ORDER BY ALL"
    )
    sides: list[dict[tuple[str, int, str], float | None]] = []
    for results in (first, second):
        rows = results.sql(question).to_pylist()
        sides.append({(row["method"], row["T"], name): row[name] for row in rows for name in _SCORES})
    pairs = {key: (sides[0].get(key), sides[1].get(key)) for key in (*sides[0], *sides[1])}
    return {key: pair for key, pair in pairs.items() if not _same_mean(*pair)}


def _same_mean(one: float | None, two: float | None) -> bool:
    """Return whether two means are equal but for the order in which their rows were summed."""
    return one == two or (one is not None and two is not None and math.isclose(one, two, rel_tol=1e-12))


def to_json(found: Difference) -> dict[str, JSON]:
    """For programs."""
    return {
        "same": found.same,
        "cells_only": [list(cell_ids) for cell_ids in found.only],
        "definitions": {cell_id: list(parts) for cell_id, parts in found.definitions.items()},
        "rows_only": list(found.rows_only),
        "rows": found.rows,
        "columns": {
            name: {"rows": column.rows, "largest": column.largest} for name, column in found.columns.items()
        },
        "means": [
            {"method": method, "T": T, "score": score, "first": one, "second": two}
            for (method, T, score), (one, two) in found.means.items()
        ],
    }
