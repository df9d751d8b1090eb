"""The evaluation protocol of lifelong editing: edit, score at the configured moments, roll back.

>>> stream = Stream(session, job, requests=[ordered], artifacts={})
>>> for step in stream.run(bounds=cut_steps(job, 50)):
...     journal(step.rows, step.state)           # the caller stores the step durably

A stream knows nothing of journals, tables or Ray. To resume, pass the state that a step returned
and the tick where it ended; the results are bit-identical to those of an uninterrupted run.
"""

from __future__ import annotations

import math
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from workers.artifacts.base import ArtifactData
from workers.failures import is_transient
from workers.job import Lane, Share, StreamJob, first_request
from workers.methods import get_method
from workers.methods.base import LaneEdit
from workers.model.batch import Encoder
from workers.model.overlay import Overlay, pack_states, unpack_states
from workers.rng import RandomStreams
from workers.scoring.declare import State
from workers.scoring.outputs import kept, outputs_of
from workers.scoring.probes import Item, items_of
from workers.scoring.registry import SCORES, Registry
from workers.scoring.score import Scored, score_answers
from workers.session import Session
from workers.timeline import Tick, asked, moments, timeline
from workers.types import JSON, EditRequest


@dataclass(frozen=True)
class GroupFailure:
    """A group whose lane became non-finite or raised. The group has no complete rows; the other
    lanes continue.

    ``kind`` is ``diverged`` or the exception's class, ``trace`` its traceback.
    """

    cell_id: str
    group: int
    position: int
    kind: str
    message: str
    trace: str = ""


@dataclass(frozen=True)
class TickProgress:
    """Progress of a stream, reported after every tick."""

    tick: int
    ticks: int
    edits: int
    kind: str


@dataclass(frozen=True)
class StepResult:
    """Result of one step: ticks [start, stop), the rows scored in it, and the edit state to
    continue from.

    ``outputs``: what the models wrote, row by row of the table ``outputs``; ``groups``: what was
    measured once per group, for the groups that ended. ``state`` is None at a wave's end, where the
    next wave starts from the pristine model.
    """

    start: int
    stop: int
    rows: list[dict[str, JSON]]
    failures: list[GroupFailure]
    state: bytes | None
    edits: int
    edit_seconds: float
    score_seconds: float
    outputs: list[dict[str, JSON]] = field(default_factory=list)
    groups: list[dict[str, JSON]] = field(default_factory=list)

    def with_tick(self, done: _Done) -> StepResult:
        """The same step with the result of one more tick."""
        for name in ("rows", "failures", "outputs", "groups"):
            getattr(self, name).extend(getattr(done, name))
        return replace(
            self,
            edits=self.edits + done.edits,
            edit_seconds=self.edit_seconds + done.edit_seconds,
            score_seconds=self.score_seconds + done.score_seconds,
        )


_OF_A_STATE = ("lanes", "device", "peak_memory_bytes", "overlay_bytes", "delta_norm")
"""Columns that describe a lane's state, and not a request."""


@dataclass
class _Wave:
    """The lanes being edited now."""

    lanes: tuple[Lane, ...]
    overlay: Overlay
    dead: set[int] = field(default_factory=set)
    raised: dict[int, int] = field(default_factory=dict)
    """Lanes that cannot be edited any more, and the tick at which they raised."""
    log: list[list[dict[str, JSON]]] = field(default_factory=list)
    """Per lane and position: the edit's time and what the method reported."""
    kept: dict[int, dict[int, Any]] = field(default_factory=dict)
    """Per measurement (its index) and number of edits: values that several ticks on one state
    share. Only those of the latest state are kept."""
    scoring: dict[tuple[int, int], float] = field(default_factory=dict)
    """Per lane and share of it: seconds spent on scoring the group at hand."""

    def alive(self) -> list[int]:
        return [i for i in range(len(self.lanes)) if i not in self.dead]


@dataclass
class _Done:
    """Result of one tick."""

    rows: list[dict[str, JSON]] = field(default_factory=list)
    failures: list[GroupFailure] = field(default_factory=list)
    edits: int = 0
    edit_seconds: float = 0.0
    score_seconds: float = 0.0
    outputs: list[dict[str, JSON]] = field(default_factory=list)
    groups: list[dict[str, JSON]] = field(default_factory=list)


class Stream:
    """Runs one :class:`~workers.job.StreamJob` on a session's model.

    ``requests`` holds, for each of the job's cells, its requests in the order of that cell's seed;
    ``artifacts``: the artifacts that the cells name, by key. ``scores``: the scores that a row
    holds.
    """

    def __init__(
        self,
        session: Session,
        job: StreamJob,
        requests: Sequence[Sequence[EditRequest]],
        artifacts: Mapping[str, ArtifactData],
        scores: Registry = SCORES,
    ) -> None:
        self.session = session
        self.job = job
        self.requests = requests
        self.ticks = timeline(job)
        base = session.base
        if job.chat_template:
            base = base.with_encoder(Encoder(base.tokenizer, chat_template=True, template=job.template))
        self.base = base
        method = get_method(job.method)
        self.config = method.Config.model_validate(job.config).located(job.places)
        self._config_json = self.config.model_dump(mode="json")
        self._inputs = [{name: artifacts[key] for name, key in cell.artifacts.items()} for cell in job.cells]
        self.method = method.prepare(base, self.config, self._inputs[0])
        scores.settings(job.score)  # raises for a setting that no score declares
        self.scores = scores
        self._group_end = [(kind, kind.read(job.score)) for kind in scores.group_end]
        self._group_end_columns = [column for kind, _ in self._group_end for column in kind.columns]
        self._measures = [
            (kind, kind.begin(base, job.score, settings)) for kind, settings in self._group_end if settings.on
        ]

    def run(
        self,
        bounds: Sequence[int],
        start: int = 0,
        state: bytes | None = None,
        on_tick: Callable[[TickProgress], None] | None = None,
    ) -> Iterator[StepResult]:
        """Yield one result per step. ``start`` is 0 or one of ``bounds``; ``state`` is the state of
        the step that ended there.

        If a lane makes the method raise, only this lane fails; the others continue from their state
        before the tick. Only transient errors are raised (:func:`workers.failures.is_transient`), for
        example out of memory in an edit. Results yielded before stay valid.
        """
        if start not in (0, *bounds):
            raise ValueError(f"start {start} is not a step boundary of {list(bounds)}")
        wave = None if state is None else self._restore(state, start)
        low = start
        for high in (b for b in bounds if b > start):
            step = StepResult(low, high, [], [], None, 0, 0.0, 0.0)
            for index in range(low, high):
                tick = self.ticks[index]
                if wave is None:
                    wave = self._begin(tick)
                done: _Done | None = None
                while done is None:
                    try:
                        done = self._do(wave, tick)
                    except Exception as error:
                        if is_transient(error):
                            raise
                        wave, found = self._without_failing_lanes(wave, index, error)
                        step.failures.extend(found)
                step = step.with_tick(done)
                if tick.last:
                    wave = None  # rollback: the overlay is dropped, the base was never touched
                if on_tick is not None:
                    on_tick(TickProgress(index + 1, len(self.ticks), step.edits, tick.kind))
            yield replace(step, state=self._save(wave))
            low = high

    # --- begin, edit, score ---

    def _begin(self, tick: Tick) -> _Wave:
        lanes = self.job.waves[tick.wave]
        return _Wave(lanes, self.method.new_overlay(len(lanes)), log=[[] for _ in lanes])

    def _do(self, wave: _Wave, tick: Tick) -> _Done:
        done = _Done()
        clock = self._now()
        if tick.kind == "edit":
            done.edits = self._edit(wave, tick, done.failures)
            done.edit_seconds = self._now() - clock
            clock = self._now()
        self._score(wave, tick, done)
        done.score_seconds = self._now() - clock
        return done

    def _edit(self, wave: _Wave, tick: Tick, failures: list[GroupFailure]) -> int:
        """Edit positions ``start .. stop`` of every lane; return the number of edits of lanes that
        have not failed.

        The batch keeps its size: a lane with non-finite numbers stays in it, and a lane that raised
        is replaced by the requests of another lane.
        """
        alive = wave.alive()
        if not alive:
            return 0
        clock = self._now()
        lanes = [wave.lanes[alive[0]] if i in wave.raised else lane for i, lane in enumerate(wave.lanes)]
        outcomes = self.method.edit(wave.overlay, [self._lane_edit(lane, tick) for lane in lanes])
        size = tick.stop - tick.start
        seconds = (self._now() - clock) / (size * len(alive))
        for i in alive:
            out = outcomes[i]
            entry: dict[str, JSON] = {
                "edit_seconds": seconds,
                "iterations": out.iterations,
                "loss": out.loss,
                "details": out.details or None,
            }
            wave.log[i] += [entry] * size
            if out.loss is not None and not math.isfinite(out.loss):
                failures += self._fail(wave, i, tick, "diverged", f"loss became {out.loss}")
            elif not wave.overlay.finite(i):
                failures += self._fail(wave, i, tick, "diverged", "a weight became non-finite")
        return size * len(wave.alive())

    def _score(self, wave: _Wave, tick: Tick, done: _Done) -> None:
        """Score one tick: for an edit, immediate rows (and final ones where the edit ends its
        group)."""
        job = self.job
        reported = {i: asked(job, tick, wave.lanes[i]) for i in wave.alive()}
        alive = [i for i in reported if reported[i]]
        if not alive:
            return
        clock = self._now()
        items = items_of(job, tick, self.requests, {i: wave.lanes[i] for i in alive})
        session = self.session
        found = score_answers(
            self.base, wave.overlay, items, job.score, session.base_answers, session.prefixes, self.scores
        )
        group_end = self._group_end_scores(
            wave, tick, items, {i: {scored for _, scored in reported[i]} for i in alive}
        )
        seconds = (self._now() - clock) / len(items)
        of_lane = {
            i: {
                "lanes": len(wave.lanes),
                "device": self.base.device.type,
                "peak_memory_bytes": self._peak_memory(),
                "overlay_bytes": wave.overlay.lane_bytes(i),
                "delta_norm": wave.overlay.delta_norm(i),
            }
            for i in alive
        }
        size = tick.stop - tick.start
        for k, (item, scored_item) in enumerate(zip(items, found, strict=True)):
            i, position = item.lane, tick.start + k % size
            row: dict[str, JSON] = {
                **scored_item.values,
                **wave.log[i][position],
                "score_seconds": seconds,
                **of_lane[i],
            }
            for share, scored in reported[i]:
                place = {**self._place(share, position), "case_id": item.request.case_id}
                place |= {"edits_applied": tick.edits_applied, "scored": scored}
                measured = {
                    column.name: group_end[k].get(column.name) if column.held_by(scored) else None
                    for column in self._group_end_columns
                }
                done.rows.append({**place, **row, **measured})
            done.outputs += self._outputs(tick, position, reported[i], scored_item, item.request.case_id)
        last = {item.lane: values for item, values in zip(items, group_end, strict=True)}
        for i in alive:
            done.groups += self._groups(wave, tick, i, seconds * size, {**last[i], **of_lane[i]})

    def _place(self, share: Share, position: int) -> dict[str, JSON]:
        """The cell, group and position of a lane's request ``position``."""
        T = self.job.T_of(share)
        return {
            "cell_id": self.job.cells[share.cell].cell_id,
            "group": share.group if self.job.rollback == "group" else position // T,
            "position": position % T,
        }

    def _outputs(
        self, tick: Tick, position: int, reported: Sequence[tuple[Share, str]], found: Scored, case_id: str
    ) -> list[dict[str, JSON]]:
        """What the models wrote for one request of a lane, once for every row that keeps it."""
        places = [
            {**place, "case_id": case_id, "edits_applied": tick.edits_applied, "scored": scored}
            for share, scored in reported
            for place in [self._place(share, position)]
            if kept(self.job.score, scored, place["group"] * self.job.T_of(share) + place["position"])
        ]
        if not places:
            return []
        written = outputs_of(found.asked, self.job.score, self.base.tokenizer.decode)
        return [{**place, **row} for place in places for row in written]

    def _groups(
        self, wave: _Wave, tick: Tick, i: int, seconds: float, measured: Mapping[str, JSON]
    ) -> list[dict[str, JSON]]:
        """The groups of lane ``i`` that end with this tick, which took ``seconds`` of scoring."""
        rows = []
        for number, share in enumerate(wave.lanes[i].shares):
            scored = moments(self.job, tick, share)
            if not scored:
                continue
            spent = wave.scoring.pop((i, number), 0.0) + seconds
            # the requests of a group may be scored in several ticks: the last one ends where the edits do
            if "final" not in scored or tick.stop < tick.edits_applied:
                wave.scoring[i, number] = spent
                continue
            T = self.job.T_of(share)
            edits = wave.log[i][tick.edits_applied - T : tick.edits_applied]
            place = self._place(share, tick.stop - 1)
            rows.append(
                {
                    "cell_id": place["cell_id"],
                    "group": place["group"],
                    "edits_applied": tick.edits_applied,
                    "edit_seconds": sum(edit["edit_seconds"] for edit in edits),
                    "score_seconds": spent,
                    "iterations": sum(edit["iterations"] for edit in edits),
                    **{name: measured[name] for name in _OF_A_STATE},
                    **{
                        column.name: measured.get(column.name)
                        for column in self._group_end_columns
                        if column.score.per_group
                    },
                }
            )
        return rows

    def _group_end_scores(
        self, wave: _Wave, tick: Tick, items: Sequence[Item], reported: Mapping[int, set[str]]
    ) -> list[dict[str, float | None]]:
        """Per item, the group-end scores of its lane's state. ``told``: the moments of each lane's
        rows."""
        session = self.session
        out: list[dict[str, float | None]] = [{} for _ in items]
        for place, (kind, measure) in enumerate(self._measures):
            lanes = {
                i for i, moments in reported.items() if any(kind.wanted_at(scored) for scored in moments)
            }
            chosen = [k for k, item in enumerate(items) if item.lane in lanes]
            if not chosen:
                continue
            state = State(
                base=self.base,
                overlay=wave.overlay,
                edits=tick.edits_applied,
                lanes=wave.alive(),
                items=[items[k] for k in chosen],
                answers=session.base_answers,
                prefixes=session.prefixes,
                kept=wave.kept.setdefault(place, {}),
            )
            for k, values in zip(chosen, measure(state), strict=True):
                out[k].update(values)
        return out

    def _fail(
        self, wave: _Wave, i: int, tick: Tick, kind: str, message: str, trace: str = ""
    ) -> Iterator[GroupFailure]:
        """Take lane ``i`` out: reset it to the pristine state and report no more rows of it."""
        wave.dead.add(i)
        wave.overlay.load_state(i, self.method.new_overlay(1).state(0))
        for share in wave.lanes[i].shares:
            cell = self.job.cells[share.cell].cell_id
            reached = (tick.edits_applied - 1) // self.job.T_of(share)
            if self.job.rollback == "group":
                reached += share.group  # the pristine state is its group's start
            for group in range(max(share.group, reached), share.stop_group):
                yield GroupFailure(cell, group, tick.start, kind, message, trace)

    def _without_failing_lanes(
        self, wave: _Wave, index: int, error: Exception
    ) -> tuple[_Wave, list[GroupFailure]]:
        """The wave before tick ``index``, which raised ``error``, without the lanes that caused it.

        An exception does not say which lane caused it, and the overlay may be partly edited. So the
        wave is edited again from the pristine model up to this tick, then every lane runs the tick
        alone. The lanes that raise alone fail; if none does, all lanes fail.
        """
        tick, failures = self.ticks[index], list[GroupFailure]()
        again = self._begin(tick)
        again.scoring = wave.scoring
        for i in range(index):
            if self.ticks[i].wave == tick.wave:
                self._mark_raised(again, wave, i)
                if self.ticks[i].kind == "edit":
                    self._edit(again, self.ticks[i], [])
        self._mark_raised(again, wave, index)
        causes: dict[int, Exception] = {}
        for i, lane in enumerate(again.lanes):
            if i in again.raised:
                continue
            alone = _Wave((lane,), self.method.new_overlay(1), log=[list(again.log[i])])
            alone.overlay.load_state(0, again.overlay.state(i))
            try:
                self._do(alone, tick)
            except Exception as cause:
                if is_transient(cause):
                    raise
                causes[i] = cause
        for i in causes or again.alive():
            why = causes.get(i, error)
            again.raised[i] = index
            if i not in again.dead:
                trace = "".join(traceback.format_exception(why))
                failures += self._fail(again, i, tick, type(why).__name__, str(why)[:1000], trace)
        return again, failures

    def _mark_raised(self, again: _Wave, wave: _Wave, index: int) -> None:
        """Take the lanes of ``wave`` that raised at tick ``index`` out of ``again``, too."""
        for i in (i for i, at in wave.raised.items() if at == index):
            again.raised[i] = index
            if i not in again.dead:
                list(self._fail(again, i, self.ticks[index], "", ""))  # already reported

    # --- requests and random numbers of a lane ---

    def _lane_edit(self, lane: Lane, tick: Tick) -> LaneEdit:
        seed, first = self.job.cells[lane.cell].seed, first_request(self.job, lane)
        return LaneEdit(
            tuple(self.requests[lane.cell][first + tick.start : first + tick.stop]),
            RandomStreams(self.job.method, self._config_json, seed, first, tick.start),
            self._inputs[lane.cell],
        )

    # --- state ---

    def _save(self, wave: _Wave | None) -> bytes | None:
        if wave is None:
            return None
        states = [wave.overlay.state(i) for i in range(len(wave.lanes))]
        raised: list[JSON] = [[i, at] for i, at in sorted(wave.raised.items())]
        scoring: list[JSON] = [[*key, seconds] for key, seconds in sorted(wave.scoring.items())]
        meta = {"dead": sorted(wave.dead), "log": wave.log, "raised": raised, "scoring": scoring}
        return pack_states(states, meta)

    def _restore(self, blob: bytes, start: int) -> _Wave:
        states, meta = unpack_states(blob)
        wave = self._begin(self.ticks[start])
        for i, state in enumerate(states):
            wave.overlay.load_state(i, state)
        wave.dead = set(meta["dead"])
        wave.log = meta["log"]
        wave.raised = {int(i): int(at) for i, at in meta.get("raised", ())}  # absent in early checkpoints
        wave.scoring = {(int(i), int(n)): float(seconds) for i, n, seconds in meta.get("scoring", ())}
        return wave

    # --- measuring ---

    def _now(self) -> float:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak_memory(self) -> int:
        if self.base.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
