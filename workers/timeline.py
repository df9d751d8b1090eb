"""The timeline of a stream: ticks, steps and the rows that are expected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from workers.job import Lane, Share, StreamJob
from workers.types import Frozen


class Tick(Frozen):
    """The smallest indivisible piece of a stream.

    ``edit``: positions ``start .. stop`` are edited in one call (and scored directly after, if the
    job says so). ``final``/``checkpoint``: positions ``start .. stop`` are scored on the current
    state. Positions count from the lane's pristine state. ``sizes``: the T of the cells that get
    rows from it (:func:`moments`). ``last`` marks the tick after which the lanes are rolled back.
    """

    wave: int
    kind: Literal["edit", "final", "checkpoint"]
    start: int
    stop: int
    edits_applied: int
    sizes: tuple[int, ...]
    last: bool = False


def moments(job: StreamJob, tick: Tick, share: Share) -> tuple[str, ...]:
    """The kinds of rows a tick gives for each of its requests to one share of a lane of its wave.

    With edits in batches, immediate means after the batch. Where the batch is the whole group (T=1,
    or batch size T), one forward gives both kinds, so that the table has immediate scores for every
    T. A method that can edit only whole groups writes only final rows, at any T: it has no state
    between two edits.
    """
    T = job.T_of(share)
    if T not in tick.sizes or not _reports(job, share, tick.edits_applied - job.batch_size):
        return ()
    if tick.kind != "edit":
        return (tick.kind,)
    # where one call edits a whole group, its own scores are the final ones
    immediate = job.score.immediate and not job.whole_group
    return ("immediate",) * immediate + ("final",) * (job.batch_size == T)


def asked(job: StreamJob, tick: Tick, lane: Lane) -> list[tuple[Share, str]]:
    """The rows that a tick gives for each request of a lane, as (share, moment) pairs."""
    return [(share, scored) for share in lane.shares for scored in moments(job, tick, share)]


def timeline(job: StreamJob) -> list[Tick]:
    """All ticks of a job, in order. A pure function of the job."""
    ticks: list[Tick] = []
    for w in range(len(job.waves)):
        of_wave = list(_wave_ticks(job, w))
        of_wave[-1] = of_wave[-1].model_copy(update={"last": True})
        ticks.extend(of_wave)
    return ticks


def _wave_ticks(job: StreamJob, w: int) -> Iterator[Tick]:
    marks = set(job.score.score_at)
    wave = job.waves[w]
    # with rollback 'group' the lanes of a wave may differ in T; lanes of equal T have equal ticks
    lanes = wave if job.rollback == "group" else wave[:1]
    shares = list(
        {
            (job.T_of(s), job.rollback == "never" and s.group): s for lane in lanes for s in lane.shares
        }.values()
    )
    for start in range(0, job.lane_edits(wave[0]), job.batch_size):
        stop = start + job.batch_size
        # groups that are not reported are edited too, because later edits build on them; their rows
        # are in the table already, or another shard writes them
        reported = tuple(dict.fromkeys(job.T_of(share) for share in shares if _reports(job, share, start)))
        yield Tick(wave=w, kind="edit", start=start, stop=stop, edits_applied=stop, sizes=reported)
        spans: dict[tuple[Literal["final", "checkpoint"], int, int], list[int]] = {}
        for T in reported:
            ends_group = stop % T == 0
            if ends_group and T > job.batch_size:  # otherwise the edit tick's own scores are the final ones
                for low, high in _pieces(job, stop - T, stop):
                    spans.setdefault(("final", low, high), []).append(T)
            # at a group's end the final scores already cover a first group's checkpoint
            if stop in marks and not (ends_group and stop == T):
                for low, high in _pieces(job, 0, stop):
                    spans.setdefault(("checkpoint", low, high), []).append(T)
        for (kind, low, high), sizes in spans.items():
            yield Tick(wave=w, kind=kind, start=low, stop=high, edits_applied=stop, sizes=tuple(sizes))


def _reports(job: StreamJob, share: Share, position: int) -> bool:
    """Return whether the edit at ``position`` of a lane belongs to a group that is reported to
    ``share``."""
    group = position // job.T_of(share)
    return group == 0 if job.rollback == "group" else share.group <= group < share.stop_group


def _pieces(job: StreamJob, start: int, stop: int) -> Iterator[tuple[int, int]]:
    size = job.score.requests_per_tick
    for low in range(start, stop, size):
        yield low, min(low + size, stop)


def cut_steps(job: StreamJob, step_edits: int) -> tuple[int, ...]:
    """Tick indices at which a stream commits, the last one included: about ``step_edits`` edits
    apart.

    Scoring one request counts as 0.2 edits, about its relative cost.
    """
    bounds: list[int] = []
    work = 0.0
    ticks = timeline(job)
    for i, tick in enumerate(ticks):
        wave = job.waves[tick.wave]
        lanes = sum(tick.kind == "edit" or bool(asked(job, tick, lane)) for lane in wave)
        work += lanes * (tick.stop - tick.start) * (1.0 if tick.kind == "edit" else 0.2)
        if work >= step_edits or i == len(ticks) - 1:
            bounds.append(i + 1)
            work = 0.0
    return tuple(bounds)


def expected_rows(job: StreamJob) -> int:
    """Number of rows the job writes if no lane fails."""
    return sum(
        (tick.stop - tick.start) * len(moments(job, tick, share))
        for tick in timeline(job)
        for lane in job.waves[tick.wave]
        for share in lane.shares
    )
