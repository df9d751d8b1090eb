"""What a stream is asked to do, as frozen data, and the timeline of ticks that follows from it. Free of torch.

The planner writes a :class:`StreamJob` into a shard's manifest; a stream executes it tick by tick. Everything that
decides a bit of the result stands here (lanes, batch composition, scoring batches), so that a shard resumed elsewhere
repeats exactly the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Rollback = Literal["group", "never"]


class Frozen(BaseModel):
    """Immutable, refuses unknown keys, survives a round trip through JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScoreConfig(Frozen):
    """Which moments are scored, and how scoring work is cut into frozen batches."""

    immediate: bool = Field(True, description="score every edit right after it is made")
    generated: bool = Field(True, description="fill the *_generated columns by greedy generation")
    score_at: tuple[int, ...] = Field((), description="edit counts at which everything edited so far is scored too")
    rows_per_batch: int = Field(256, ge=1, description="sequences of one scoring forward, at most")
    tokens_per_batch: int = Field(4096, ge=1, description="tokens of one scoring forward, padding included, at most")
    requests_per_tick: int = Field(25, ge=1, description="requests a lane has scored between two possible commits")
    extra_tokens: int = Field(
        4, ge=1, description="tokens greedy generation may run beyond the target before it is cut"
    )


class StreamCell(Frozen):
    """The part of a cell that differs between the lanes of one stream."""

    cell_id: str
    seed: int
    artifacts: dict[str, str] = Field(default_factory=dict, description="what the method calls it -> artifact key")


class Lane(Frozen):
    """One lane of one wave: groups ``group .. stop_group`` (exclusive) of ``cells[cell]``.

    With ``rollback: group`` a lane holds exactly one group. With ``rollback: never`` it edits from the very first
    request up to ``stop_group * T`` and reports only the groups asked for.
    """

    cell: int = 0
    group: int
    stop_group: int


class StreamJob(Frozen):
    """One shard's work. Lanes of a wave run in lockstep; waves run one after another, each from the pristine model."""

    method: str
    config: dict[str, Any]
    cells: tuple[StreamCell, ...]
    T: int = Field(ge=1)
    batch_size: int = Field(1, ge=1)
    rollback: Rollback = "group"
    waves: tuple[tuple[Lane, ...], ...]
    score: ScoreConfig = ScoreConfig()
    chat_template: bool = False

    @model_validator(mode="after")
    def _lockstep(self) -> Self:
        if self.T % self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide T={self.T}: batches never cross a group border"
            )
        for wave in self.waves:
            if not wave:
                raise ValueError("a wave needs at least one lane")
            for lane in wave:
                if not 0 <= lane.cell < len(self.cells):
                    raise ValueError(f"lane refers to cell {lane.cell} of {len(self.cells)}")
                if self.rollback == "group" and lane.stop_group != lane.group + 1:
                    raise ValueError("with rollback 'group' a lane holds exactly one group")
                if self.rollback == "never" and (lane.group, lane.stop_group) != (wave[0].group, wave[0].stop_group):
                    raise ValueError("with rollback 'never' the lanes of a wave cover the same groups")
        return self


class Tick(Frozen):
    """The smallest indivisible piece of a stream.

    ``edit``: positions ``start .. stop`` are edited in one call (and scored at once if asked).
    ``final``/``checkpoint``: positions ``start .. stop`` are scored on the present state.
    Positions count from the lane's pristine state. ``last`` marks the tick after which the lanes are rolled back.
    """

    wave: int
    kind: Literal["edit", "final", "checkpoint"]
    start: int
    stop: int
    edits_applied: int
    last: bool = False


def timeline(job: StreamJob) -> list[Tick]:
    """All ticks of a job, in order. A pure function of the job."""
    ticks: list[Tick] = []
    for w, wave in enumerate(job.waves):
        of_wave = list(_wave_ticks(job, w, wave[0]))
        of_wave[-1] = of_wave[-1].model_copy(update={"last": True})
        ticks.extend(of_wave)
    return ticks


def _wave_ticks(job: StreamJob, w: int, lane: Lane) -> Iterator[Tick]:
    edits = job.T if job.rollback == "group" else lane.stop_group * job.T
    marks = set(job.score.score_at)
    for start in range(0, edits, job.batch_size):
        stop = start + job.batch_size
        yield Tick(wave=w, kind="edit", start=start, stop=stop, edits_applied=stop)
        ends_group = stop % job.T == 0
        if job.rollback == "never" and start // job.T < lane.group:
            continue  # an earlier group of a continued lane: edited again, but its rows are in the table already
        if ends_group and job.T > job.batch_size:  # otherwise the edit tick's own scores are the final ones
            yield from _scoring(job, w, "final", stop - job.T, stop, stop)
        # at a group's end the final scores already cover a first group's checkpoint
        if stop in marks and not (ends_group and stop == job.T):
            yield from _scoring(job, w, "checkpoint", 0, stop, stop)


def _scoring(
    job: StreamJob, w: int, kind: Literal["final", "checkpoint"], start: int, stop: int, applied: int
) -> Iterator[Tick]:
    size = job.score.requests_per_tick
    for low in range(start, stop, size):
        yield Tick(wave=w, kind=kind, start=low, stop=min(low + size, stop), edits_applied=applied)


def cut_steps(job: StreamJob, step_edits: int) -> tuple[int, ...]:
    """Tick indices at which a stream commits, the last one included: about ``step_edits`` edits apart.

    Scoring counts a fifth of an edit per request, which is about what it costs.
    """
    bounds: list[int] = []
    work = 0.0
    ticks = timeline(job)
    for i, tick in enumerate(ticks):
        lanes = len(job.waves[tick.wave])
        work += lanes * (tick.stop - tick.start) * (1.0 if tick.kind == "edit" else 0.2)
        if work >= step_edits or i == len(ticks) - 1:
            bounds.append(i + 1)
            work = 0.0
    return tuple(bounds)


def expected_rows(job: StreamJob) -> int:
    """Rows the job writes if no lane fails."""
    total = 0
    for tick in timeline(job):
        wave = job.waves[tick.wave]
        size = len(wave) * (tick.stop - tick.start)
        if tick.kind != "edit":
            total += size
        elif job.rollback == "group" or tick.start // job.T >= wave[0].group:
            total += size * (int(job.score.immediate) + int(job.T == job.batch_size))
    return total
