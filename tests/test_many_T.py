"""One continual stream for many T: the edits are made once, and every cell gets the rows of a
stream of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.planning.work import Task
from tests.engine import RAW, TWELVE, placeless, rows, run, run_in_pieces
from tests.small import GOLDEN, build_inputs, golden_requests, random_model, session, timeless
from workers.artifacts.base import ArtifactData
from workers.job import Lane, ScoreConfig, Share, StreamCell, StreamJob
from workers.methods import get_method
from workers.methods.base import MethodConfig
from workers.model.overlay import pack_states, unpack_states
from workers.stream import StepResult, Stream
from workers.timeline import cut_steps, expected_rows, timeline

REQUESTS = {0: golden_requests(24), 1: golden_requests(48)[24:]}
CONFIGS: dict[str, dict[str, Any]] = {
    "ft": {"layers": [1], "lr": 1e-3, "num_steps": 5},
    "rome": {
        "layer": 0,
        "corpus": str(GOLDEN / "corpus.txt"),
        "samples": 200,
        "v_num_grad_steps": 3,
        "context_template_length_params": [[3, 5]],
    },
    "grace": {"layer": 1, "n_iter": 4},
    "wise": {"layer": 1, "lr": 0.3, "n_iter": 4, "alpha": 0.2, "beta": 0.8, "gamma": 0.4, "save_freq": 5},
}
SIZES = (12, 6, 3, 1)
SCORE = ScoreConfig(score_at=(4, 6, 12), requests_per_tick=4, generated=False)


def continual(
    method: str, config: MethodConfig, inputs: dict[str, ArtifactData], sizes: tuple[int, ...], start: int = 0
) -> StreamJob:
    """Two seeds as lanes, twelve edits each, reported from edit ``start`` on to a cell of every
    size."""
    names = {name: name for name in inputs}
    cells = tuple(
        StreamCell(cell_id=f"T{T}-{seed}", seed=seed, T=T, artifacts=names) for T in sizes for seed in (0, 1)
    )
    lanes = []
    for seed in (0, 1):
        first, *also = (
            Share(cell=2 * n + seed, group=start // T, stop_group=12 // T) for n, T in enumerate(sizes)
        )
        lanes.append(Lane(**first.model_dump(), also=tuple(also)))
    return StreamJob(
        method=method,
        config=config.model_dump(mode="json"),
        cells=cells,
        T=sizes[0],
        rollback="never",
        waves=(tuple(lanes),),
        score=SCORE,
    )


def stream_of(work: StreamJob, inputs: dict[str, ArtifactData]) -> Stream:
    base = random_model("llama")
    return Stream(session(base), work, [REQUESTS[cell.seed] for cell in work.cells], inputs)


def sorted_rows(results: list[StepResult]) -> list[dict[str, Any]]:
    found = timeless([row for result in results for row in result.rows])
    return sorted(
        found, key=lambda r: tuple(r[k] for k in ("cell_id", "group", "position", "scored", "edits_applied"))
    )


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow if m in ("wise", "rome") else ()) for m in sorted(CONFIGS)],
)
def test_rows_are_those_of_streams_of_their_own(method: str) -> None:
    config = get_method(method).Config.model_validate(CONFIGS[method])
    inputs = build_inputs(random_model("llama"), method, config)
    work = continual(method, config, inputs, SIZES)
    whole = list(stream_of(work, inputs).run(cut_steps(work, 1)))
    shared = sorted_rows(whole)
    assert len(shared) == expected_rows(work)
    alone = []
    for T in SIZES:
        own = continual(method, config, inputs, (T,))
        alone += list(stream_of(own, inputs).run(cut_steps(own, 1000)))
    assert shared == sorted_rows(alone)
    assert sum(result.edits for result in whole) == 24
    assert sum(result.edits for result in alone) == 24 * len(SIZES)
    # from any step on, in the middle of groups of every size, resuming gives what was never
    # interrupted
    for done in (5, 11, 16) if method == "ft" else (11,):
        again = list(stream_of(work, inputs).run(cut_steps(work, 1), whole[done].stop, whole[done].state))
        assert sorted_rows(whole[: done + 1] + again) == shared
    later = continual(method, config, inputs, (6, 3, 1), start=6)
    kept = [r for r in shared if r["cell_id"][:3] in ("T6-", "T3-", "T1-") and r["edits_applied"] > 6]
    assert sorted_rows(list(stream_of(later, inputs).run(cut_steps(later, 7)))) == kept


def test_work_that_is_the_same_is_done_once() -> None:
    config = get_method("ft").Config.model_validate(CONFIGS["ft"])
    work = continual("ft", config, {}, SIZES)
    ticks = timeline(work)
    assert len({(t.kind, t.start, t.stop, t.edits_applied) for t in ticks}) == len(ticks)
    # the last four of twelve: scored once for the cells of T=12 and T=6 where their pieces coincide
    ends = [(t.start, t.stop, t.sizes) for t in ticks if t.kind == "final" and t.edits_applied == 12]
    assert ends == [
        (0, 4, (12,)),
        (4, 8, (12,)),
        (8, 12, (12,)),
        (6, 10, (6,)),
        (10, 12, (6,)),
        (9, 12, (3,)),
    ]
    assert [t.sizes for t in ticks if t.kind == "checkpoint" and t.edits_applied == 12] == [(6, 3, 1)] * 3


def test_a_lane_that_diverges_fails_in_every_cell_from_there_on() -> None:
    config = get_method("ft").Config.model_validate(CONFIGS["ft"])
    work = continual("ft", config, {}, SIZES)
    bounds = cut_steps(work, 1)
    whole = list(stream_of(work, {}).run(bounds))
    cut = next(i for i, result in enumerate(whole) if timeline(work)[result.stop - 1].edits_applied == 7)
    states, meta = unpack_states(whole[cut].state or b"")
    name = next(iter(states[1].tensors))
    states[1].tensors[name] = torch.full_like(states[1].tensors[name], float("nan"))
    after = list(stream_of(work, {}).run(bounds, whole[cut].stop, pack_states(states, meta)))
    failed = {(f.cell_id, f.group) for result in after for f in result.failures}
    assert {f.position for result in after for f in result.failures} == {7}
    assert failed == {
        ("T12-1", 0),
        ("T6-1", 1),
        ("T3-1", 2),
        ("T3-1", 3),
        *(("T1-1", g) for g in range(7, 12)),
    }
    assert {r["cell_id"][-2:] for result in after for r in result.rows} == {"-0"}

    def keys(results: list[StepResult]) -> list[tuple[Any, ...]]:
        names = ("cell_id", "group", "position", "scored", "edits_applied")
        return [tuple(r[name] for name in names) for r in sorted_rows(results) if r["cell_id"].endswith("-0")]

    assert keys(whole[: cut + 1] + after) == keys(whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollback": "group"}, "exactly one group"),
        ({"batch_size": 3}, "batch_size 3 does not divide T=1"),
        (
            {
                "waves": (
                    (Lane(cell=0, group=0, stop_group=1, also=(Share(cell=3, group=0, stop_group=2),)),),
                )
            },
            "one seed",
        ),
        (
            {
                "waves": (
                    (Lane(cell=0, group=0, stop_group=1, also=(Share(cell=9, group=0, stop_group=2),)),),
                )
            },
            "cell 9",
        ),
        (
            {"waves": ((Lane(cell=0, group=0, stop_group=1), Lane(cell=3, group=0, stop_group=1)),)},
            "the same groups",
        ),
    ],
)
def test_jobs_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    config = get_method("ft").Config.model_validate(CONFIGS["ft"])
    work = continual("ft", config, {}, SIZES)
    with pytest.raises(ValueError, match=words):
        StreamJob.model_validate({**work.model_dump(), **changes})


@pytest.mark.slow
def test_a_sweep_equals_sweeps_of_one_T_each_and_grows_by_what_is_new(tmp_path: Path) -> None:
    """Killed after every few steps, a sweep of several T gives the table of single ones; a T added
    later runs alone."""
    base: dict[str, Any] = {
        "methods": RAW["methods"][:1],
        "scoring": {"generated": False, "score_at": [2, 4]},
    }

    def grid(*sizes: int) -> dict[str, Any]:
        return {"T": list(sizes), "seeds": [0], "rollback": "never"}

    alone = []
    for T in (1, 2, 6):
        outcome = run(tmp_path / f"T{T}", **base, grid=grid(T))
        assert outcome.plan.edits_left == 6
        alone += rows(tmp_path / f"T{T}")

    outcome, interrupted = run_in_pieces(tmp_path / "r", 1, **base, grid=grid(1, 2, 6))
    assert interrupted > 2
    assert outcome.exit_code == 0
    assert placeless(rows(tmp_path / "r")) == placeless(alone)

    more = run(tmp_path / "r", **base, grid=grid(1, 2, 3, 6))
    assert more.plan.edits_left == 6
    assert {more.plan.group_sizes(shard) for shard in more.plan.shards} == {(3,)}
    assert more.exit_code == 0
    base["dataset"] = TWELVE
    longer = run(tmp_path / "r", **base, grid=grid(1, 2, 3, 6))
    assert longer.plan.edits_left == 12  # one lane of 12 edits serves all four T
    assert {longer.plan.group_sizes(shard) for shard in longer.plan.shards} == {(1, 2, 3, 6)}
    assert sum(Task.of(longer.plan.manifest(s)).edits for s in longer.plan.shards) == 12
    assert longer.exit_code == 0
    run(tmp_path / "T3", **base, grid=grid(3))
    assert placeless([r for r in rows(tmp_path / "r") if r["T"] == 3]) == placeless(rows(tmp_path / "T3"))
