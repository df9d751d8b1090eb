"""With rollback a lane also serves smaller T, whose groups its own begins with, as lanes of their
own would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import RAW, TWELVE, placeless, rows, run, run_in_pieces
from tests.small import build_inputs, golden_requests, random_model, session, timeless
from tests.test_many_T import CONFIGS
from workers.artifacts.base import ArtifactData
from workers.job import Lane, ScoreConfig, Share, StreamCell, StreamJob
from workers.methods import get_method
from workers.model.overlay import pack_states, unpack_states
from workers.scoring.score import score_answers
from workers.stream import StepResult, Stream
from workers.timeline import cut_steps, expected_rows, moments, timeline

REQUESTS = golden_requests(24)
SIZES = (6, 4, 2, 1)


def lane_of(group: int, *served: int, T: int = 6, sizes: tuple[int, ...] = SIZES) -> Lane:
    """A lane that makes a group of T and reports also to the groups of ``served`` that start with
    it."""
    also = tuple(
        Share(cell=sizes.index(t), group=group * T // t, stop_group=group * T // t + 1)
        for t in served
        if t != T
    )
    return Lane(cell=sizes.index(T), group=group, stop_group=group + 1, also=also)


def job_of(
    method: str, inputs: dict[str, ArtifactData], *waves: tuple[Lane, ...], T: int = 6, **score: Any
) -> StreamJob:
    config = get_method(method).Config.model_validate(CONFIGS[method])
    return StreamJob(
        method=method,
        config=config.model_dump(mode="json"),
        cells=tuple(
            StreamCell(cell_id=f"T{t}", seed=0, T=t, artifacts={name: name for name in inputs}) for t in SIZES
        ),
        T=T,
        waves=waves,
        score=ScoreConfig(**{"requests_per_tick": 4, "generated": False, "score_at": (2, 3, 6), **score}),
    )


def stream_of(work: StreamJob, inputs: dict[str, ArtifactData]) -> Stream:
    return Stream(session(random_model("llama")), work, [REQUESTS] * len(work.cells), inputs)


def results_of(work: StreamJob, inputs: dict[str, ArtifactData], step: int = 1) -> list[StepResult]:
    return list(stream_of(work, inputs).run(cut_steps(work, step)))


KEY = ("cell_id", "group", "position", "scored", "edits_applied")


def sorted_rows(results: list[StepResult]) -> list[dict[str, Any]]:
    found = timeless([row for result in results for row in result.rows])
    return sorted(found, key=lambda r: tuple(r[k] for k in KEY))


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_rows_are_those_of_lanes_of_their_own(method: str) -> None:
    config = get_method(method).Config.model_validate(CONFIGS[method])
    inputs = build_inputs(random_model("llama"), method, config)
    work = job_of(method, inputs, (lane_of(0, 4, 2, 1),), (lane_of(1, 2, 1),), (lane_of(2, 1, 4),))
    whole = results_of(work, inputs)
    shared = sorted_rows(whole)
    assert len(shared) == expected_rows(work)
    alone: list[StepResult] = []
    for T, groups in {6: (0, 1, 2), 4: (0, 3), 2: (0, 3), 1: (0, 6, 12)}.items():
        alone += results_of(job_of(method, inputs, *((lane_of(g, T=T),) for g in groups), T=T), inputs, 1000)
    assert shared == sorted_rows(alone)
    assert sum(result.edits for result in whole) == 18
    assert sum(result.edits for result in alone) == 18 + 8 + 4 + 3
    # resumed after any step, before and after the end of a group that is shared
    for done in (0, 2, 5, 8) if method == "ft" else (5,):
        again = list(stream_of(work, inputs).run(cut_steps(work, 1), whole[done].stop, whole[done].state))
        assert sorted_rows(whole[: done + 1] + again) == shared


@pytest.mark.numeric
def test_lanes_of_a_wave_may_serve_different_T() -> None:
    wave = (lane_of(0, 4, 2, 1), lane_of(1, 1), lane_of(2, 4))
    work = job_of("ft", {}, wave)
    whole = results_of(work, {})
    alone = [r for lane in wave for r in results_of(job_of("ft", {}, (lane,)), {})]
    mixed, single = sorted_rows(whole), sorted_rows(alone)
    assert len(mixed) == expected_rows(work)
    assert [[r[k] for k in KEY] for r in mixed] == [[r[k] for k in KEY] for r in single]
    for a, b in zip(mixed, single, strict=True):
        assert (a["lanes"], b["lanes"]) == (3, 1)
        assert a["target_logprob"] == pytest.approx(b["target_logprob"], abs=1e-3)
    # no lane is scored for a T that it does not serve
    ends = {(t.start, t.stop): [i for i, lane in enumerate(wave) if any(moments(work, t, s) for s in lane.shares)]
            for t in timeline(work) if t.kind == "final"}  # fmt: skip
    assert ends == {(0, 2): [0], (0, 4): [0, 1, 2], (4, 6): [0, 1, 2]}


@pytest.mark.parametrize("text", [None, "text.txt"])
def test_what_is_measured_at_a_groups_end_is_measured_at_the_smaller_ones_too(
    tmp_path: Path, text: str | None
) -> None:
    score: dict[str, Any] = {"fluency_tokens": 4, "score_at": ()}
    if text:
        (tmp_path / text).write_text("The quick brown fox jumps over the lazy dog. " * 20)
        score |= {"ability_text": tmp_path / text, "ability_tokens": 64, "ability_window": 32}
    shared = sorted_rows(results_of(job_of("ft", {}, (lane_of(0, 4, 1), lane_of(1, 2)), **score), {}))
    for row in shared:
        at_end = row["scored"] == "final"
        assert (row["fluency"] is not None) == at_end
        assert (row["ability_perplexity"] is not None) == (at_end and text is not None)
    one_lane = sorted_rows(results_of(job_of("ft", {}, (lane_of(0, 4, 1),), **score), {}))
    own = sorted_rows(results_of(job_of("ft", {}, (lane_of(0, T=4),), T=4, **score), {}))
    assert [row for row in one_lane if row["cell_id"] == "T4"] == own


def test_one_forward_serves_every_T_at_once() -> None:
    work = job_of("ft", {}, (lane_of(0, 4, 2, 1),), score_at=())
    ticks = timeline(work)
    assert [(t.kind, t.start, t.stop, t.edits_applied, t.sizes) for t in ticks] == [
        ("edit", 0, 1, 1, (6, 4, 2, 1)),
        ("edit", 1, 2, 2, (6, 4, 2)),
        ("final", 0, 2, 2, (2,)),
        ("edit", 2, 3, 3, (6, 4)),
        ("edit", 3, 4, 4, (6, 4)),
        ("final", 0, 4, 4, (4,)),
        ("edit", 4, 5, 5, (6,)),
        ("edit", 5, 6, 6, (6,)),
        ("final", 0, 4, 6, (6,)),
        ("final", 4, 6, 6, (6,)),
    ]
    (lane,) = work.waves[0]
    assert [moments(work, ticks[0], share) for share in lane.shares] == [
        *[("immediate",)] * 3,
        ("immediate", "final"),  # T=1: one forward, two rows
    ]
    assert expected_rows(work) == 2 * (6 + 4 + 2 + 1)
    final_only = job_of("ft", {}, (lane_of(0, 4, 2, 1),), score_at=(), immediate=False)
    assert expected_rows(final_only) == 6 + 4 + 2 + 1
    batched = StreamJob.model_validate({**work.model_dump(), "batch_size": 2, "waves": ((lane_of(0, 4, 2),),),
                                        "cells": work.cells[:3]})  # fmt: skip
    assert [t.kind for t in timeline(batched)] == ["edit", "edit", "final", "edit", "final", "final"]
    assert expected_rows(batched) == 2 * (6 + 4 + 2)


def test_a_lane_that_diverges_keeps_the_groups_that_were_complete() -> None:
    work = job_of("ft", {}, (lane_of(0, 4, 2, 1), lane_of(1, 2, 1)), score_at=())
    bounds = cut_steps(work, 1)
    whole = results_of(work, {})
    cut = next(i for i, result in enumerate(whole) if timeline(work)[result.stop - 1].edits_applied == 3)
    states, meta = unpack_states(whole[cut].state or b"")
    name = next(iter(states[0].tensors))
    states[0].tensors[name] = torch.full_like(states[0].tensors[name], float("nan"))
    after = list(stream_of(work, {}).run(bounds, whole[cut].stop, pack_states(states, meta)))
    failures = [f for result in after for f in result.failures]
    assert {(f.cell_id, f.group, f.position) for f in failures} == {("T6", 0, 3), ("T4", 0, 3)}
    # the other lane goes on as if nothing had happened
    kept = [
        r
        for r in sorted_rows(whole[: cut + 1] + after)
        if (r["cell_id"], r["group"]) not in {("T6", 0), ("T4", 0)}
    ]
    expected = [r for r in sorted_rows(whole) if (r["cell_id"], r["group"]) not in {("T6", 0), ("T4", 0)}]
    assert [[r[k] for k in KEY] for r in kept] == [[r[k] for k in KEY] for r in expected]
    assert {(r["cell_id"], r["group"]) for r in kept} == {
        ("T2", 0),
        ("T1", 0),
        ("T6", 1),
        ("T2", 3),
        ("T1", 6),
    }


def test_a_lane_that_raises_keeps_the_groups_that_were_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a request of it is scored: the lane is found, whichever place in the wave it
    has."""
    work = job_of("ft", {}, (lane_of(0, 4, 2, 1), lane_of(1, 2, 1)), score_at=())
    whole = results_of(work, {})

    def picky(base: Any, overlay: Any, items: Any, *rest: Any) -> Any:
        if any(item.request is REQUESTS[9] for item in items):
            raise ValueError("not this one")
        return score_answers(base, overlay, items, *rest)

    monkeypatch.setattr("workers.stream.score_answers", picky)
    results = results_of(work, {})
    assert [(f.cell_id, f.group, f.position) for r in results for f in r.failures] == [("T6", 1, 3)]
    kept = [r for r in sorted_rows(results) if (r["cell_id"], r["group"]) != ("T6", 1)]
    assert [[r[k] for k in KEY] for r in kept] == [
        [r[k] for k in KEY] for r in sorted_rows(whole) if (r["cell_id"], r["group"]) != ("T6", 1)
    ]


def share(T: int, group: int, stop: int | None = None) -> Share:
    return Share(cell=SIZES.index(T), group=group, stop_group=group + 1 if stop is None else stop)


@pytest.mark.parametrize(
    ("lane", "words"),
    [
        (Lane(cell=0, group=1, stop_group=2, also=(share(4, 1),)), "start where its own does"),
        (Lane(cell=0, group=1, stop_group=2, also=(share(2, 0),)), "start where its own does"),
        (Lane(cell=0, group=0, stop_group=1, also=(share(2, 0, 2),)), "exactly one group"),
        (Lane(cell=0, group=0, stop_group=2), "exactly one group"),
        (Lane(cell=0, group=0, stop_group=1, also=(share(2, 0), share(2, 0))), "to each once"),
        (Lane(cell=0, group=0, stop_group=1, also=(share(6, 0),)), "smaller T"),
        (Lane(cell=1, group=0, stop_group=1, also=(share(2, 0),)), "the job's T=6"),
        (Lane(cell=0, group=0, stop_group=1, also=(Share(cell=9, group=0, stop_group=1),)), "cell 9"),
    ],
)
def test_shares_that_cannot_be(lane: Lane, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        job_of("ft", {}, (lane,))


def test_what_else_cannot_be_shared() -> None:
    work = job_of("ft", {}, (lane_of(0, 4),))
    other = work.cells[1].model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match="one seed"):
        StreamJob.model_validate({**work.model_dump(), "cells": (work.cells[0], other, *work.cells[2:])})
    with pytest.raises(ValueError, match="whole groups"):
        StreamJob.model_validate({**work.model_dump(), "batch_size": 1, "whole_group": True})
    with pytest.raises(ValueError, match="does not divide"):
        StreamJob.model_validate({**work.model_dump(), "batch_size": 3})


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.slow
def test_a_sweep_that_shares_gives_the_table_of_one_that_does_not(tmp_path: Path, across: bool) -> None:
    """One lane each (or one per seed): the same bits, killed after every few steps, and with a T
    and edits added later."""
    seeds = [0, 1] if across else [0]
    engine = {"shard_edits": 6, "step_edits": 2, "max_failures": 1, "lanes_across_seeds": across}
    engine["lanes"] = 2 if across else 1
    base: dict[str, Any] = {"methods": RAW["methods"][:1], "scoring": {"generated": False, "score_at": [2]}}

    def grid(*sizes: int) -> dict[str, Any]:
        return {"T": list(sizes), "seeds": seeds}

    plain = run(tmp_path / "plain", **base, grid=grid(1, 2, 3, 6), engine={**engine, "share_prefixes": False})
    assert (plain.plan.edits_left, plain.plan.edits_shared) == (24 * len(seeds), 0)

    pieces = 2
    outcome, interrupted = run_in_pieces(
        tmp_path / "shared", pieces, **base, grid=grid(1, 2, 3, 6), engine=engine
    )
    assert interrupted > 3
    assert outcome.exit_code == 0
    assert placeless(rows(tmp_path / "shared")) == placeless(rows(tmp_path / "plain"))

    first = run(tmp_path / "grown", **base, grid=grid(1, 3), engine=engine)
    assert (first.plan.edits_left, first.plan.edits_shared) == (len(seeds) * (6 + 4), len(seeds) * 2)
    more = run(tmp_path / "grown", **base, grid=grid(1, 2, 3, 6), engine=engine)
    assert (more.plan.edits_left, more.plan.edits_shared) == (len(seeds) * (6 + 4), len(seeds) * 2)
    assert more.exit_code == 0
    assert placeless(rows(tmp_path / "grown")) == placeless(rows(tmp_path / "plain"))
    base["dataset"] = TWELVE
    last = run(tmp_path / "grown", **base, grid=grid(1, 2, 3, 6), engine=engine)
    # T=6's second group takes T=3's third, T=2's fourth and T=1's seventh along, T=3's and T=2's
    # others T=1's
    assert last.plan.edits_left == len(seeds) * (6 + 3 + 4 + (6 - 4))
    assert last.exit_code == 0
    run(tmp_path / "long", **base, grid=grid(1, 2, 3, 6), engine={**engine, "share_prefixes": False})
    assert placeless(rows(tmp_path / "grown")) == placeless(rows(tmp_path / "long"))
