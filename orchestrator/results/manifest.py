"""A shard's manifest: everything an actor needs to run it, as JSON."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from orchestrator.results.columns import CELL_COLUMNS
from workers.job import StreamJob
from workers.timeline import timeline
from workers.types import Frozen


class ShardManifest(Frozen):
    """Composition of a shard; written once, before its first attempt, and never changed.

    ``bounds``: ticks at which it commits, the last one included
    (:func:`workers.timeline.cut_steps`). ``columns``: cell id -> values of the columns
    :data:`~orchestrator.results.columns.CELL_COLUMNS`, which are the same in all rows of the cell.
    ``task``: further inputs of the worker (model, data set, artifacts), which the journal does not
    read.
    """

    shard_id: str
    job: StreamJob
    bounds: tuple[int, ...]
    columns: dict[str, dict[str, Any]]
    task: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        ticks = len(timeline(self.job))
        if (
            list(self.bounds) != sorted(set(self.bounds))
            or not self.bounds
            or self.bounds[0] < 1
            or self.bounds[-1] != ticks
        ):
            raise ValueError(f"bounds must ascend and end with the job's last tick, {ticks}")
        if self.columns.keys() != {cell.cell_id for cell in self.job.cells}:
            raise ValueError("columns must name exactly the cells of the job")
        for cell, columns in self.columns.items():
            if columns.keys() != CELL_COLUMNS:
                raise ValueError(f"columns of cell {cell} must be exactly {sorted(CELL_COLUMNS)}")
        return self
