"""The rows that count: one rule for every reader of a results folder.

    live = Live.of_plan(definitions, current)
    live.rows(table)                    # without what later plans no longer ask for
    live.superseded(table)              # the others, as a mask

A results folder keeps every row it was ever given. A row counts if the last plan asked for it: its
cell is one of the plan's, and its group one of the cell's. Rows of an earlier definition (a
hyperparameter or the data set has changed since), of a seed or T that was taken out, and of edits
beyond a smaller N are *superseded*: a mean over both would be of neither. Knows nothing of torch or
Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from workers.types import JSON

NEEDED = ("cell_id", "group")
"""Columns that tell whether a row counts; of a request, its data set does."""


@dataclass(frozen=True)
class Live:
    """Groups that the last plan asked for, by cell; None if the folder has no plan: then every row
    counts."""

    groups: Mapping[str, int] | None
    datasets: frozenset[str] = frozenset()
    """Fingerprints of the data sets of these cells."""

    @classmethod
    def of_plan(cls, definitions: Mapping[str, Mapping[str, JSON]], current: Sequence[str]) -> Live:
        """From the definitions of all cells and the ids of those that the last plan asked for."""
        if not definitions:
            return cls(None)
        return cls(
            {cell_id: int(definitions[cell_id]["groups"]) for cell_id in current},
            frozenset(str(definitions[cell_id].get("dataset_fingerprint")) for cell_id in current),
        )

    def limit(self, cell_id: str) -> float:
        """The first group of a cell that does not count."""
        return float("inf") if self.groups is None else self.groups.get(cell_id, 0)

    def counts(self, cell_id: str, group: int) -> bool:
        return group < self.limit(cell_id)

    def cover(self, ends: Iterable[tuple[str, int]]) -> bool:
        """Return whether every row counts of cells whose groups end at ``ends``."""
        return all(end <= self.limit(cell_id) for cell_id, end in ends)

    def superseded(self, rows: pa.Table) -> pa.ChunkedArray:
        """Return a mask of the rows that do not count. ``rows`` has the columns
        :data:`NEEDED`; those of requests have no cell but a data set."""
        if self.groups is None:
            return pa.chunked_array([pa.repeat(False, rows.num_rows)])
        if "cell_id" not in rows.column_names:
            asked = pa.array(sorted(self.datasets), pa.string())
            return pc.invert(pc.is_in(rows["dataset_fingerprint"], asked))
        limits = pa.array([*self.groups.values(), 0], pa.int64())
        at = pc.index_in(rows["cell_id"], pa.array(list(self.groups), pa.string()))
        limit = pc.take(limits, pc.fill_null(at, len(self.groups)))
        return pc.greater_equal(rows["group"], limit)

    def rows(self, rows: pa.Table) -> pa.Table:
        """The rows that count."""
        return rows if self.groups is None else rows.filter(pc.invert(self.superseded(rows)))

    def limits(self) -> list[tuple[str, int]]:
        """Cells and the number of their groups; one that cannot be, where the plan has none."""
        return list((self.groups or {"": 0}).items())
