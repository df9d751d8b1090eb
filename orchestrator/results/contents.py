"""The rows that a job must produce."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from workers.job import StreamJob
from workers.timeline import Tick, moments, timeline
from workers.types import JSON


def complete_rows(table: pa.Table, job: StreamJob, failures: Iterable[Mapping[str, JSON]]) -> pa.Table:
    """``table`` without the rows of failed groups, which a later shard may write completely.

    In continual editing a failure ends the lane. Rows that were scored after the failed group's
    start are left out too.
    """
    keep = None
    T_of = {cell.cell_id: cell.T or job.T for cell in job.cells}
    for cell, group in sorted(_first_failures(job, failures)):
        bad = pc.and_(pc.equal(table["cell_id"], cell), pc.equal(table["group"], group))
        if job.rollback == "never":
            later = pc.or_(
                pc.greater_equal(table["group"], group),
                pc.greater(table["edits_applied"], group * T_of[cell]),
            )
            bad = pc.and_(pc.equal(table["cell_id"], cell), later)
        keep = pc.invert(bad) if keep is None else pc.and_(keep, pc.invert(bad))
    return table if keep is None else table.filter(keep)


def _first_failures(job: StreamJob, failures: Iterable[Mapping[str, JSON]]) -> set[tuple[str, int]]:
    failed = {(str(f["cell_id"]), int(f["group"])) for f in failures}
    if job.rollback == "group":
        return failed
    first: dict[str, int] = {}
    for cell, group in failed:
        first[cell] = min(group, first.get(cell, group))
    return set(first.items())


@dataclass(frozen=True, slots=True)
class Expected:
    """Contents of a finished shard, per cell; ``rows`` are those of ``groups``."""

    groups: dict[str, tuple[int, ...]]
    failed: dict[str, tuple[int, ...]]
    rows: dict[str, int]


def expected_contents(job: StreamJob, failures: Iterable[Mapping[str, JSON]]) -> Expected:
    """Derive :class:`Expected` from the job and from the groups that failed (their lane stopped).
    Does not look at the rows."""
    planned: dict[str, set[int]] = {cell.cell_id: set() for cell in job.cells}
    groups: dict[str, set[int]] = {cell.cell_id: set() for cell in job.cells}
    rows: Counter[str] = Counter({cell.cell_id: 0 for cell in job.cells})
    failed = _first_failures(job, failures)
    ends: dict[str, int] = dict(failed) if job.rollback == "never" else {}
    ticks: dict[int, list[Tick]] = {}
    for tick in timeline(job):
        ticks.setdefault(tick.wave, []).append(tick)
    # Rows of a lane, cached: lanes with the same groups (with rollback: the same T) write equally
    # many.
    counted: dict[tuple[int, int, int, int], int] = {}
    for w, wave in enumerate(job.waves):
        for lane in wave:
            for share in lane.shares:
                cell, T = job.cells[share.cell].cell_id, job.T_of(share)
                planned[cell].update(range(share.group, share.stop_group))
                if job.rollback == "group":
                    end = share.group + ((cell, share.group) not in failed)
                else:
                    end = min(share.stop_group, ends.get(cell, share.stop_group))
                if end > share.group:
                    groups[cell].update(range(share.group, end))
                    key = (w, T, 0, 0) if job.rollback == "group" else (w, T, share.group, end)
                    if key not in counted:
                        counted[key] = sum(
                            (tick.stop - tick.start) * len(moments(job, tick, share))
                            for tick in ticks[w]
                            if job.rollback == "group" or tick.edits_applied <= end * T
                        )
                    rows[cell] += counted[key]
    return Expected(
        groups={cell: tuple(sorted(found)) for cell, found in groups.items()},
        failed={cell: tuple(sorted(planned[cell] - found)) for cell, found in groups.items()},
        rows=dict(rows),
    )
