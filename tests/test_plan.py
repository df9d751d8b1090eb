"""Cells, shards and steps: identities that may never change by accident, and arithmetic that must
add up."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planning.inputs import read_inputs
from orchestrator.planning.makespan import simulate
from orchestrator.planning.memory import CPU_MEMORY_GB, GIB, MOST_LANES, USABLE
from orchestrator.planning.plan import Plan, Planner, Progress, Spent, make_plan
from orchestrator.planning.spec import SweepSpec, load_spec, parse_spec
from orchestrator.planning.work import Task
from orchestrator.results.manifest import ShardManifest
from workers.artifacts import stats
from workers.data import load_dataset, requests_of
from workers.data.tinyworld import assets_dir
from workers.job import Lane
from workers.methods import get_method
from workers.timeline import cut_steps, expected_rows, moments, timeline
from workers.types import Dataset, EditSweepError, SpecError

ROOT = Path(__file__).resolve().parent.parent


@cache
def tinyworld() -> Dataset:
    return load_dataset("tinyworld")


@pytest.fixture
def dataset() -> Dataset:
    return tinyworld()


def spec_of(**changes: Any) -> SweepSpec:
    raw: dict[str, Any] = {
        "name": "p",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": 50},
        "grid": {"T": [1, 10, 50], "seeds": [0, 1]},
        "methods": ["ft", "grace"],
        "engine": {"lanes": 4, "shard_edits": 100, "step_edits": 20},
    }
    for path, value in changes.items():
        here = raw
        *parents, last = path.split("__")
        for key in parents:
            here = here.setdefault(key, {})
        here[last] = value
    return parse_spec(yaml.safe_dump(raw), "p.yaml", Path("/"))


def lanes_of(manifests: Iterable[ShardManifest]) -> Counter[tuple[str, int]]:
    return Counter(
        (manifest.job.cells[share.cell].cell_id, group)
        for manifest in manifests
        for wave in manifest.job.waves
        for lane in wave
        for share in lane.shares
        for group in range(share.group, share.stop_group)
    )


def groups_of(plan: Plan) -> Counter[tuple[str, int]]:
    return Counter((cell.cell_id, group) for cell in plan.cells for group in range(cell.groups))


def by_name(plan: Plan) -> dict[tuple[str, int, int], str]:
    return {(plan.variants[c.variant].label, c.T, c.seed): c.cell_id for c in plan.cells}


def test_every_group_is_planned_once(dataset: Dataset) -> None:
    plan = make_plan(spec_of(), dataset=dataset)
    manifests = [plan.manifest(shard) for shard in plan.shards]
    assert lanes_of(manifests) == groups_of(plan)
    assert len({shard.shard_id for shard in plan.shards}) == len(plan.shards)
    assert plan.edits == plan.edits_left + plan.edits_shared == 2 * 3 * 2 * 50
    assert plan.edits_shared == 2 * 2 * (10 + 5)  # T=10's first group, and T=1's wherever a larger one starts
    for shard, manifest in zip(plan.shards, manifests, strict=True):
        task = Task.of(manifest)
        assert manifest.bounds == cut_steps(manifest.job, 20)
        assert task.expected_rows == expected_rows(manifest.job)
        assert task.edits == shard.edits == sum(manifest.job.T * len(wave) for wave in manifest.job.waves)
        assert shard.lanes == max(map(len, manifest.job.waves)) <= 4
        assert shard.edits <= max(100, shard.T * shard.lanes)
        assert ShardManifest.model_validate_json(manifest.model_dump_json()) == manifest
    costs = [shard.cost for shard in plan.shards]
    assert costs == sorted(costs, reverse=True)


@settings(max_examples=20)
@given(
    lanes=st.integers(1, 12),
    shard_edits=st.integers(1, 200),
    T=st.sampled_from([1, 2, 5, 10, 25, 50]),
    seeds=st.integers(1, 4),
    rollback=st.sampled_from(["group", "never"]),
    done=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 49)), max_size=40),
)
def test_any_cut_covers_what_is_left(
    lanes: int, shard_edits: int, T: int, seeds: int, rollback: str, done: set[tuple[int, int]]
) -> None:
    spec = spec_of(
        methods=["ft"],
        grid={"T": [T], "seeds": list(range(seeds)), "rollback": rollback},
        engine={"lanes": lanes, "shard_edits": shard_edits},
    )
    planner = _planner(spec)
    ids = [cell.cell_id for cell in planner.cells]
    finished: dict[str, set[int]] = {}
    for cell, group in done:
        if cell < len(ids):
            finished.setdefault(ids[cell], set()).add(group)
    plan = planner.plan(Progress(done=finished))
    left = Counter(key for key in groups_of(plan) if key[1] not in finished.get(key[0], ()))
    manifests = [plan.manifest(shard) for shard in plan.shards]
    assert lanes_of(manifests) == left
    for manifest in manifests:
        assert max(map(len, manifest.job.waves)) <= lanes
    if rollback == "group":
        for manifest in manifests:
            assert len(manifest.job.waves) == 1 or T * sum(map(len, manifest.job.waves)) <= shard_edits
        assert all(seeds_of(manifest, wave) == 1 for manifest in manifests for wave in manifest.job.waves)


def seeds_of(manifest: ShardManifest, wave: tuple[Lane, ...]) -> int:
    return len({manifest.job.cells[lane.cell].seed for lane in wave})


def waves_of(plan: Plan) -> Counter[tuple[tuple[str, int, int], ...]]:
    """Every wave as its lanes in order: what decides the bits of their rows."""
    return Counter(
        tuple(
            (manifest.job.cells[share.cell].cell_id, share.group, share.stop_group)
            for lane in wave
            for share in lane.shares
        )
        for manifest in map(plan.manifest, plan.shards)
        for wave in manifest.job.waves
    )


@settings(max_examples=10)
@given(
    lanes=st.integers(1, 12),
    T=st.lists(st.sampled_from([1, 2, 5, 10, 25, 50]), min_size=1, max_size=3, unique=True),
    seeds=st.integers(1, 5),
    across=st.booleans(),
    rollback=st.sampled_from(["group", "never"]),
    cuts=st.tuples(st.integers(1, 200), st.integers(1, 60), st.none() | st.integers(1, 9)),
    data=st.data(),
)
def test_waves_follow_from_the_spec_whatever_cuts_clocks_and_interruptions_do(
    lanes: int, T: list[int], seeds: int, across: bool, rollback: str, cuts: Any, data: st.DataObject
) -> None:
    """Shards are cut between waves, and running some of them first leaves the waves of the others
    as they were."""

    def planner(shard_edits: int = 100, step_edits: int = 20, max_actors: int | None = None) -> Planner:
        engine = {"lanes": lanes, "lanes_across_seeds": across, "shard_edits": shard_edits}
        return _planner(
            spec_of(
                methods=["ft", "rome"],
                grid={"T": T, "seeds": list(range(seeds)), "rollback": rollback},
                engine={**engine, "step_edits": step_edits, "max_actors": max_actors},
            )
        )

    first = planner().plan(Progress())
    assert waves_of(first) == waves_of(planner(*cuts).plan(Progress()))
    gone = [shard for shard in first.shards if data.draw(st.booleans())]
    begun = [first.manifest(shard) for shard in gone if data.draw(st.booleans())]
    finished: dict[str, set[int]] = {}
    for shard in gone:
        for cell, group in lanes_of([first.manifest(shard)]):
            finished.setdefault(cell, set()).add(group)
    spent = [
        Spent(shard.shard_id, first.cell_ids(shard), shard.edits, data.draw(st.floats(0.1, 1e4)))
        for shard in gone
    ]
    again = planner(*cuts).plan(Progress(done=finished, spent=spent, used={s.shard_id for s in gone}))
    assert waves_of(again) <= waves_of(first)
    assert lanes_of(map(again.manifest, again.shards)) + lanes_of(map(first.manifest, gone)) == groups_of(
        first
    )
    # timings order the shards and are nowhere else
    plain = planner(*cuts).plan(Progress(done=finished, used={s.shard_id for s in gone}))
    assert {s.shard_id for s in again.shards} == {s.shard_id for s in plain.shards}
    assert [s.cost for s in again.shards] == sorted((s.cost for s in again.shards), reverse=True)
    resumed = planner().plan(Progress(begun=begun, spent=spent))
    assert waves_of(resumed) == waves_of(first)


def starts_of(plan: Plan) -> Counter[tuple[int, int, int, int]]:
    """Per lane of a plan its variant, seed, first request and T."""
    cells = {cell.cell_id: cell for cell in plan.cells}
    found: Counter[tuple[int, int, int, int]] = Counter()
    for job in (plan.manifest(shard).job for shard in plan.shards):
        for lane in (lane for wave in job.waves for lane in wave):
            cell = cells[job.cells[lane.cell].cell_id]
            found[cell.variant, cell.seed, lane.group * cell.T, cell.T] += 1
    return found


def assert_full(plan: Plan, lanes: int) -> None:
    """Every wave of a cell (or of seeds together) is as wide as it may be, except its last one."""
    widths: dict[tuple[int, ...], list[int]] = {}
    for job in (plan.manifest(shard).job for shard in plan.shards):
        for wave in job.waves:
            team = tuple(dict.fromkeys(job.cells[lane.cell].cell_id for lane in wave))
            widths.setdefault((job.T, *team), []).append(len(wave))
    for (_, *team), found in widths.items():
        full = len(team) * max(1, lanes // len(team))
        assert sum(width < full for width in found) <= 1, (team, found)


def test_the_standard_grid_makes_the_edits_that_T_have_in_common_once(dataset: Dataset) -> None:
    def plan_of(seeds: int, **engine: Any) -> Plan:
        spec = spec_of(
            dataset__edits=1000,
            methods=["ft", "rome"],
            grid={"T": [1, 10, 100, 1000], "seeds": list(range(seeds))},
            engine={"lanes": 10, **engine},
        )
        return make_plan(spec, dataset=dataset)

    for plan in (plan_of(1), plan_of(3, lanes_across_seeds=True)):
        cells = len(plan.cells) // 4
        assert (plan.edits, plan.edits_left, plan.edits_shared) == (cells * 4000, cells * 3700, cells * 300)
        manifests = [plan.manifest(shard) for shard in plan.shards]
        assert lanes_of(manifests) == groups_of(plan)
        assert sum(Task.of(manifest).edits for manifest in manifests) == plan.edits_left
        assert Counter(T for *_, T in starts_of(plan)) == {
            1: cells * 900,
            10: cells * 90,
            100: cells * 9,
            1000: cells,
        }
        assert {plan.group_sizes(shard) for shard in plan.shards} == {
            (1,),
            (1, 10),
            (1, 10, 100),
            (1, 10, 100, 1000),
        }
        assert_full(plan, 10)
        # a row of every moment for every T: nothing is lost by sharing
        assert sum(Task.of(manifest).expected_rows for manifest in manifests) == cells * 2 * 4000
    apart = plan_of(1, share_prefixes=False)
    assert (apart.edits_left, apart.edits_shared) == (8000, 0)
    assert {plan.group_sizes(shard) for plan in (apart,) for shard in plan.shards} == {
        (1,),
        (10,),
        (100,),
        (1000,),
    }
    assert not any(lane.also for s in apart.shards for wave in apart.manifest(s).job.waves for lane in wave)
    whole, parts = plan_of(1), apart
    assert by_name(whole) == by_name(parts)
    # less work together, a little more in the longest shard, which goes first
    assert sum(s.cost for s in whole.shards) < 0.95 * sum(s.cost for s in parts.shards)
    assert parts.shards[0].cost < whole.shards[0].cost < 1.02 * parts.shards[0].cost
    assert whole.shards[0].T == 1000


def test_what_is_added_later_shares_what_is_still_to_be_done(dataset: Dataset) -> None:
    def plan_of(Ts: list[int], edits: int = 100, progress: Progress | None = None) -> Plan:
        spec = spec_of(
            dataset__edits=edits, methods=["ft"], grid={"T": Ts, "seeds": [0]}, engine={"lanes": 4}
        )
        return make_plan(spec, progress, dataset)

    def check(plan: Plan, left: int, shared: int) -> None:
        assert (plan.edits_left, plan.edits_shared) == (left, shared)
        assert_full(plan, 4)

    first = plan_of([1, 10])
    check(first, 100 + 90, 10)
    done: dict[str, set[int]] = {cell.cell_id: set(range(cell.groups)) for cell in first.cells}
    more = plan_of(
        [1, 10, 5, 50], progress=Progress(done=done)
    )  # T=5 rides with T=50, the others are complete
    check(more, 100 + 90, 10)
    done |= {cell.cell_id: set(range(cell.groups)) for cell in more.cells}
    longer = plan_of([1, 10, 5, 50], 200, Progress(done=done))
    check(longer, 100 + 80 + 50 + 80, 20 + 50 + 20)
    assert lanes_of(map(longer.manifest, longer.shards)) == groups_of(longer) - groups_of(more)
    # half of T=10 is done or begun: T=50 takes along what is not
    begun = [first.manifest(next(s for s in first.shards if s.T == 10))]
    gone = lanes_of(begun)
    mixed = plan_of([1, 10, 50], progress=Progress(begun=begun))
    new = [shard for shard in mixed.shards if not shard.begun]
    assert lanes_of(map(mixed.manifest, new)) == groups_of(mixed) - gone
    assert begun[0] in map(mixed.manifest, mixed.shards)
    ids = by_name(mixed)
    taken = {g for cell, g in gone if cell == ids["ft", 10, 0]}
    (lanes,) = [job.waves[0] for job in (mixed.manifest(s).job for s in new) if job.T == 50]
    assert [len(lane.also) for lane in lanes] == [2 if group not in taken else 0 for group in (0, 5)]
    # a single T asked for shares nothing with what is left out
    planner = _planner(spec_of(methods=["ft"], grid={"T": [1, 10], "seeds": [0]}))
    (only,) = [cell.cell_id for cell in planner.cells if cell.T == 1]
    assert planner.plan(Progress(), {only}).edits_left == 50


def test_failed_groups_and_gaps_still_fill_waves(dataset: Dataset) -> None:
    spec = spec_of(methods=["ft"], grid={"T": [1], "seeds": [0]}, engine={"lanes": 4})
    (cell,) = make_plan(spec, dataset=dataset).cells
    plan = make_plan(spec, Progress(done={cell.cell_id: set(range(0, 50, 3))}), dataset)
    assert sum(len(plan.manifest(shard).job.waves) for shard in plan.shards) == 9  # of 33 groups
    assert_full(plan, 4)


@settings(max_examples=25)
@given(
    lanes=st.integers(1, 9),
    T=st.lists(
        st.sampled_from([1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60]), min_size=2, max_size=4, unique=True
    ),
    seeds=st.integers(1, 3),
    across=st.booleans(),
    batch_size=st.sampled_from([1, 1, 2]),
    shard_edits=st.integers(1, 200),
    data=st.data(),
)
def test_any_grid_is_covered_once_by_full_waves_that_share_what_they_can(
    lanes: int, T: list[int], seeds: int, across: bool, batch_size: int, shard_edits: int, data: st.DataObject
) -> None:
    planner = _planner(
        spec_of(
            dataset__edits=60,
            methods=["ft"],
            grid={"T": [t * batch_size for t in T if 60 % (t * batch_size) == 0] or [60], "seeds": list(range(seeds)),
                  "batch_size": batch_size},
            engine={"lanes": lanes, "lanes_across_seeds": across, "shard_edits": shard_edits},
        )
    )  # fmt: skip
    done: dict[str, set[int]] = {}
    for cell in planner.cells:
        if data.draw(st.booleans()):
            done[cell.cell_id] = data.draw(st.sets(st.integers(0, cell.groups - 1), max_size=6))
    plan = planner.plan(Progress(done=done))
    left = Counter(key for key in groups_of(plan) if key[1] not in done.get(key[0], ()))
    manifests = [plan.manifest(shard) for shard in plan.shards]
    assert lanes_of(manifests) == left
    # one lane for all groups that start at one request, of the largest T
    cells = {cell.cell_id: cell for cell in plan.cells}
    largest: dict[tuple[int, int, int], int] = {}
    for cell_id, group in left:
        cell = cells[cell_id]
        key = (cell.variant, cell.seed, group * cell.T)
        largest[key] = max(cell.T, largest.get(key, 0))
    assert starts_of(plan) == Counter((*key, t) for key, t in largest.items())
    assert plan.edits_left == sum(largest.values())
    assert plan.edits_left + plan.edits_shared == sum(cells[cell_id].T for cell_id, _ in left)
    assert_full(plan, lanes)
    for shard, manifest in zip(plan.shards, manifests, strict=True):
        assert shard.lanes == max(map(len, manifest.job.waves)) <= lanes
        assert (
            shard.edits
            == Task.of(manifest).edits
            == sum(manifest.job.T * len(wave) for wave in manifest.job.waves)
        )
        assert ShardManifest.model_validate_json(manifest.model_dump_json()) == manifest
    # half of it begun: those shards stay as they are, and the others are what they were
    begun = [manifest for manifest in manifests if data.draw(st.booleans())]
    again = planner.plan(Progress(done=done, begun=begun))
    assert waves_of(again) == waves_of(plan)
    assert {shard.shard_id for shard in again.shards if shard.begun} == {
        manifest.shard_id for manifest in begun
    }
    assert (again.edits_left, again.edits_shared) == (plan.edits_left, plan.edits_shared)


def test_seeds_share_waves_only_where_the_spec_says_so(dataset: Dataset) -> None:
    def waves(T: int, across: bool, **engine: Any) -> list[list[tuple[int, int]]]:
        spec = spec_of(
            methods=["ft"],
            grid={"T": [T], "seeds": [0, 1, 2]},
            engine={"lanes": 4, "lanes_across_seeds": across, **engine},
        )
        plan = make_plan(spec, dataset=dataset)
        return [
            [(manifest.job.cells[lane.cell].seed, lane.group) for lane in wave]
            for manifest in map(plan.manifest, plan.shards)
            for wave in manifest.job.waves
        ]

    assert waves(50, False) == [[(0, 0)], [(1, 0)], [(2, 0)]]
    assert waves(50, True) == [[(0, 0), (1, 0), (2, 0)]]
    assert waves(50, True, lanes=2) == [[(0, 0), (1, 0)], [(2, 0)]]
    assert sorted(waves(10, False)) == sorted(
        [(s, g) for g in groups] for s in range(3) for groups in (range(4), [4])
    )
    assert sorted(waves(10, True)) == [[(s, g) for s in range(3)] for g in range(5)]
    assert sorted(waves(10, True, lanes=6))[0] == [(s, g) for g in range(2) for s in range(3)]


def test_long_shards_start_first_and_short_cells_fill_the_gaps(dataset: Dataset) -> None:
    """At any number of seeds, one launch order serves: little idles at the end, and time measured
    decides the order."""
    for seeds, actors in ((1, 4), (4, 16), (12, 24), (40, 64)):
        spec = spec_of(
            dataset__edits=1000,
            methods=["ft", "rome", "grace", "wise"],
            grid={"T": [1, 10, 100, 1000], "seeds": list(range(seeds))},
            engine={"lanes": 10, "max_actors": actors},
        )
        plan = make_plan(spec, dataset=dataset)
        found = plan.simulate(actors).ratio
        assert found <= 1.1, (seeds, actors)
    # the reverse order is far from that where neither a single shard nor the total decides alone
    assert simulate([s.seconds_left for s in reversed(plan.shards)], actors).ratio > found + 0.05


def test_measured_seconds_decide_the_order_of_launch(dataset: Dataset) -> None:
    spec = spec_of(methods=["ft", "wise"], grid={"T": [10], "seeds": [0, 1]}, engine={"lanes": 1})
    first = make_plan(spec, dataset=dataset)
    assert first.variants[first.shards[0].variant].label == "wise"  # it is dearer by its relative cost
    gone = [next(s for s in first.shards if s.variant == v) for v in (0, 1)]
    done: dict[str, set[int]] = {}
    for cell, group in lanes_of(map(first.manifest, gone)):
        done.setdefault(cell, set()).add(group)
    spent = [Spent(s.shard_id, first.cell_ids(s), s.edits, 400.0 if s.variant == 0 else 3.0) for s in gone]
    again = make_plan(spec, Progress(done=done, spent=spent, used={s.shard_id for s in gone}), dataset)
    assert [s.variant for s in again.shards] == sorted(s.variant for s in again.shards)
    ft = next(s for s in again.shards if s.variant == 0)
    assert ft.cost == pytest.approx(400.0 * ft.edits / gone[0].edits)


def test_what_a_begun_shard_has_done_is_not_counted_again(dataset: Dataset) -> None:
    first = make_plan(spec_of(), dataset=dataset)
    shard = first.shards[0]
    spent = [Spent(shard.shard_id, first.cell_ids(shard), shard.edits // 2, 30.0)]
    again = make_plan(spec_of(), Progress(begun=[first.manifest(shard)], spent=spent), dataset)
    assert (again.shards[0].shard_id, again.shards[0].begun, again.shards[0].committed) == (
        shard.shard_id,
        True,
        0.5,
    )
    assert again.shards[0].seconds_left == pytest.approx(30.0)
    assert again.shards[0].cost == pytest.approx(60.0)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that give `wise_table2.yaml` a model of LLaMA-2-7B's geometry, without weights, and
    a thousand requests."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("geometry")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(
        folder
    )  # its defaults are LLaMA-2-7B's sizes
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    for file in (ROOT / "tests/golden/models/tiny-llama").glob("*token*"):
        shutil.copy(file, folder)
    records = [
        {
            "subject": f"Person {i}",
            "src": f"Where was Person {i} born?",
            "pred": "",
            "rephrase": f"What is the birthplace of Person {i}?",
            "alt": "Paris",
            "answers": ["Rome"],
            "loc": f"nq question: who sang song {i}",
            "loc_ans": "Somebody",
            "cond": "",
        }
        for i in range(1000)
    ]
    (folder / "zsre.json").write_text(json.dumps(records))
    return (
        f"model.name={folder}",
        f"dataset.path={folder / 'zsre.json'}",
        f"dataset.train_path={folder / 'zsre.json'}",
    )


def table2(overrides: Iterable[str]) -> SweepSpec:
    return load_spec(ROOT / "sweeps" / "wise_table2.yaml", tuple(overrides))


@pytest.mark.parametrize("seeds", [1, 3, 10, 13, 30])
def test_wise_table_2_on_64_actors_ends_within_a_tenth_of_the_bound(
    seven_billion: tuple[str, ...], seeds: int
) -> None:
    plan = make_plan(table2((*seven_billion, f"grid.seeds={list(range(seeds))}")))
    found = plan.simulate(64)
    assert found.bound <= found.makespan <= 1.1 * found.bound, found
    assert plan.edits == 5 * 4 * seeds * 1000
    assert plan.edits_left == 5 * 3700 * seeds
    if (
        seeds == 3
    ):  # as it ships, the streams of a thousand edits are the critical path: all of them start at once
        assert {shard.T for shard in plan.shards[:6]} == {1000}
        assert found.longest > found.total / 64


def test_auto_lanes_follow_the_declared_memory(seven_billion: tuple[str, ...]) -> None:
    large = make_plan(table2(seven_billion))
    assert 12.4 < large.weight_bytes / GIB < 12.7
    small = make_plan(table2((*seven_billion, "engine.gpu_memory_gb=24")))
    for key, need in large.memory.items():
        assert 1 <= small.widths[key] <= large.widths[key] <= MOST_LANES
        assert need.peak(large.widths[key]) <= 80 * GIB
        assert small.memory[key].peak(small.widths[key]) <= 24 * GIB
    assert small.widths != large.widths
    wise = next(v for v, variant in enumerate(large.variants) if variant.label == "wise-retrieve")
    assert small.widths[wise, 1000] < small.widths[wise, 1]  # saved memories take room
    assert [c.cell_id for c in small.cells] == [c.cell_id for c in large.cells]
    manifest = small.manifest(small.shards[0])
    assert Task.of(manifest).gpu_memory_gb == 24
    halves = make_plan(table2((*seven_billion, "engine.gpu_memory_gb=48", "engine.resources.gpu=0.5")))
    assert halves.widths == small.widths
    with pytest.raises(SpecError) as caught:
        make_plan(table2((*seven_billion, "engine.gpu_memory_gb=14")))
    for word in ("engine.gpu_memory_gb", "14 GiB", "ft-l at T=1", "12.6 of weights", "engine.lanes: 1"):
        assert word in str(caught.value)


def test_auto_lanes_on_the_cpu_count_on_what_is_declared_or_a_modest_default(dataset: Dataset) -> None:
    plan = make_plan(spec_of(engine={"lanes": "auto"}), dataset=dataset)
    assert set(plan.widths.values()) == {MOST_LANES}
    assert max(need.peak(MOST_LANES) for need in plan.memory.values()) < USABLE * CPU_MEMORY_GB * GIB
    tight = make_plan(spec_of(engine={"lanes": "auto", "resources": {"memory_gb": 0.4}}), dataset=dataset)
    assert all(1 <= lanes < MOST_LANES for lanes in tight.widths.values())
    assert Task.of(tight.manifest(tight.shards[0])).gpu_memory_gb is None
    with pytest.raises(
        SpecError, match=r"engine\.resources\.memory_gb: an actor has 0\.01 GiB, but ft at T=1"
    ):
        make_plan(spec_of(engine={"lanes": "auto", "resources": {"memory_gb": 0.01}}), dataset=dataset)


def test_wise_table_2_says_what_is_missing() -> None:
    with pytest.raises(EditSweepError, match=r"zsre_mend_eval\.json"):
        make_plan(table2(()))
    with pytest.raises(EditSweepError, match="/nowhere/llama"):
        make_plan(table2(("model.name=/nowhere/llama", "dataset={kind: tinyworld, edits: 1000}")))


def _planner(spec: SweepSpec) -> Planner:
    return Planner(read_inputs(spec, tinyworld()))


def test_cell_ids_depend_on_what_decides_the_numbers(dataset: Dataset) -> None:
    base = by_name(make_plan(spec_of(), dataset=dataset))
    same = [
        spec_of(dataset__edits=100),
        spec_of(engine__lanes=9, engine__threads=2, engine__shard_edits=7),
        spec_of(scoring={"generated": False}),
        spec_of(name="other"),
        spec_of(methods=["grace", "ft", {"method": "ft", "label": "x", "hparams": {"num_steps": 3}}]),
    ]
    for spec in same:
        found = by_name(make_plan(spec, dataset=dataset))
        assert {key: found[key] for key in base} == base
    other = [
        spec_of(dataset__order="file"),
        spec_of(model__dtype="float64"),
        spec_of(grid__rollback="never"),
    ]
    for spec in other:
        assert not set(by_name(make_plan(spec, dataset=dataset)).values()) & set(base.values())
    steps = by_name(
        make_plan(spec_of(methods=[{"method": "ft", "hparams": {"num_steps": 3}}]), dataset=dataset)
    )
    assert not set(steps.values()) & set(base.values())
    labelled = make_plan(spec_of(methods=[{"method": "ft", "label": "FT"}]), dataset=dataset)
    assert {c.cell_id for c in labelled.cells} == {v for k, v in base.items() if k[0] == "ft"}


def test_a_chat_template_makes_other_cells(dataset: Dataset, tmp_path: Path) -> None:
    for file in assets_dir().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    methods = [{"method": "ft", "hparams": {"layers": [1]}}]
    plain, chat = (
        by_name(
            make_plan(
                spec_of(model__name=str(tmp_path), methods=methods, chat_template=chat), dataset=dataset
            )
        )
        for chat in (False, True)
    )
    assert plain.keys() == chat.keys()
    assert not set(plain.values()) & set(chat.values())


RECORDED = {
    ("ft", 1, 0): "33d4fdeb4b051527",
    ("ft", 50, 1): "47833a57e23135c3",
    ("rome", 10, 0): "7d180c924c9197d3",
    ("grace", 1, 1): "9c6dee9e5810a1a0",
    ("wise-merge", 50, 0): "7b23a8e27531bd32",
    ("wise-retrieve", 10, 1): "044e20d0d11e96d5",
}
"""Cells of ``sweeps/demo.yaml`` as tables in the world name them."""


def test_the_demo_keeps_the_cells_it_had() -> None:
    found = by_name(make_plan(load_spec(ROOT / "sweeps" / "demo.yaml")))
    assert {key: found[key] for key in RECORDED} == RECORDED


def test_a_variant_may_be_run_at_some_T_only(dataset: Dataset) -> None:
    grid = {"T": [1, 10, 50]}
    plan = make_plan(spec_of(methods=["ft", {"method": "grace", "T": [50, 1]}], grid=grid), dataset=dataset)
    ids = by_name(plan)
    assert sorted({(name, T) for name, T, _ in ids}) == [
        ("ft", 1),
        ("ft", 10),
        ("ft", 50),
        ("grace", 1),
        ("grace", 50),
    ]
    whole = by_name(make_plan(spec_of(methods=["ft", "grace"], grid=grid), dataset=dataset))
    assert ids.items() < whole.items()
    assert lanes_of([plan.manifest(shard) for shard in plan.shards]) == groups_of(plan)


def test_batches(dataset: Dataset) -> None:
    def plan_of(size: int, **grid: Any) -> Plan:
        grid = {"T": [10, 50], "batch_size": size, **grid}
        return make_plan(
            spec_of(methods=["ft", "wise"], grid=grid, engine={"lanes": "auto"}), dataset=dataset
        )

    alone, batched = plan_of(1), plan_of(5)
    assert not set(by_name(alone).values()) & set(by_name(batched).values())
    assert {cell.batch_size for cell in batched.cells} == {5}
    for manifest in map(batched.manifest, batched.shards):
        assert manifest.job.batch_size == 5
        assert {columns["batch_size"] for columns in manifest.columns.values()} == {5}
        assert Task.of(manifest).expected_rows == expected_rows(manifest.job)
    assert all(batched.memory[key].edit == 5 * alone.memory[key].edit for key in alone.memory)


def test_a_method_that_edits_whole_groups_goes_by_T(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_of(size: int, rollback: str = "group", Ts: tuple[int, ...] = (10, 50)) -> Plan:
        grid = {"T": list(Ts), "batch_size": size, "rollback": rollback}
        return make_plan(spec_of(methods=["ft"], grid=grid), dataset=dataset)

    ordinary = by_name(plan_of(1))
    monkeypatch.setattr(get_method("ft"), "whole_group", True)
    plan = plan_of(1, Ts=(1, 10, 50))
    assert [(cell.T, cell.batch_size) for cell in plan.cells] == [(1, 1), (10, 10), (50, 50)]
    assert by_name(plan_of(5)).items() < by_name(plan).items()  # the grid's batch size is nothing to it
    assert not set(by_name(plan).values()) & set(ordinary.values())
    assert plan.memory[0, 50].edit == 50 * plan.memory[0, 1].edit
    for manifest in map(plan.manifest, plan.shards):
        job = manifest.job
        assert job.batch_size == job.T == next(iter(manifest.columns.values()))["batch_size"]
        assert [len(wave) * job.T for wave in job.waves] == [
            sum(len(job.waves[i]) * (tick.stop - tick.start) for tick in timeline(job) if tick.wave == i)
            for i in range(len(job.waves))
        ]
        assert {kind for tick in timeline(job) for kind in moments(job, tick, job.waves[0][0])} == {"final"}
        assert (
            Task.of(manifest).expected_rows
            == expected_rows(job)
            == sum(job.T * len(wave) for wave in job.waves)
        )
    # without rollback its edits depend on T, so no lane reports to two of them
    continued = plan_of(1, "never")
    manifests = [continued.manifest(shard) for shard in continued.shards]
    assert sorted((m.job.T, m.job.batch_size, len(m.job.cells)) for m in manifests) == [
        (10, 10, 1),
        (50, 50, 1),
    ]
    assert lanes_of(manifests) == groups_of(continued)
    assert continued.edits_left == 100


def test_growth_plans_only_what_is_new(dataset: Dataset) -> None:
    first = make_plan(spec_of(), dataset=dataset)
    done = {cell.cell_id: set(range(cell.groups)) for cell in first.cells}
    assert make_plan(spec_of(), Progress(done=done), dataset).shards == ()
    longer = make_plan(spec_of(dataset__edits=100), Progress(done=done), dataset)
    assert lanes_of(map(longer.manifest, longer.shards)) == groups_of(longer) - groups_of(first)
    wider = make_plan(spec_of(grid__seeds=[0, 1, 2]), Progress(done=done), dataset)
    assert {cell.seed for s in wider.shards for cell in wider.manifest(s).job.cells} == {2}


def test_a_shard_that_has_begun_keeps_its_composition(dataset: Dataset) -> None:
    first = make_plan(spec_of(), dataset=dataset)
    begun = [first.manifest(first.shards[0]), first.manifest(first.shards[5])]
    again = make_plan(spec_of(engine__lanes=2, engine__shard_edits=30), Progress(begun=begun), dataset)
    assert [s.shard_id for s in again.shards[:2]] == [
        m.shard_id for m in sorted(begun, key=lambda m: -Task.of(m).edits)
    ]
    manifests = [again.manifest(shard) for shard in again.shards]
    assert begun[0] in manifests
    assert lanes_of(manifests) == groups_of(again)
    narrow = make_plan(spec_of(methods=["grace"], grid__T=[1]), Progress(begun=begun), dataset)
    wanted = {cell.cell_id for cell in narrow.cells}
    for shard in narrow.shards:
        assert wanted & {cell.cell_id for cell in narrow.manifest(shard).job.cells}


def test_failed_groups_get_a_fresh_shard(dataset: Dataset) -> None:
    spec = spec_of(methods=["ft"], grid={"T": [50], "seeds": [0]})
    first = make_plan(spec, dataset=dataset)
    again = make_plan(spec, Progress(used={first.shards[0].shard_id}), dataset)
    assert len(again.shards) == 1
    assert again.shards[0].shard_id != first.shards[0].shard_id
    assert again.manifest(again.shards[0]).job == first.manifest(first.shards[0]).job


def test_seeds_that_differ_in_nothing_run_once(dataset: Dataset) -> None:
    plan = make_plan(spec_of(dataset__order="file", methods=["ft", "wise"]), dataset=dataset)
    seeds = {(plan.variants[c.variant].label, c.seed) for c in plan.cells}
    assert seeds == {("ft", 0), ("wise", 0), ("wise", 1)}
    assert len(plan.warnings) == 1
    assert "ft" in plan.warnings[0]
    assert "0, 1" in plan.warnings[0]


def test_continued_lanes(dataset: Dataset) -> None:
    spec = spec_of(methods=["ft"], grid={"T": [10], "seeds": [0, 1, 2], "rollback": "never"})
    plan = make_plan(spec, dataset=dataset)
    assert [(len(s.runs), s.lanes, s.edits) for s in plan.shards] == [(1, 1, 50)] * 3
    spec = spec_of(
        methods=["ft"],
        grid={"T": [10], "seeds": [0, 1, 2], "rollback": "never"},
        engine={"lanes": 2, "lanes_across_seeds": True},
    )
    plan = make_plan(spec, dataset=dataset)
    assert [(len(s.runs), s.lanes, s.edits) for s in plan.shards] == [(1, 2, 100), (1, 1, 50)]
    done = {cell.cell_id: {0, 1, 2} for cell in plan.cells}
    rest = make_plan(spec, Progress(done=done), dataset)
    lane = rest.manifest(rest.shards[0]).job.waves[0][0]
    assert (lane.group, lane.stop_group) == (3, 5)
    assert rest.shards[0].edits == 2 * 50  # everything is edited again, only the last groups are reported


def test_one_stream_serves_every_T_without_rollback(dataset: Dataset) -> None:
    def plan_of(Ts: list[int], progress: Progress | None = None, **engine: Any) -> Plan:
        grid = {"T": Ts, "seeds": [0, 1], "rollback": "never"}
        return make_plan(spec_of(methods=["ft"], grid=grid, engine={"lanes": 4, **engine}), progress, dataset)

    plan = plan_of([1, 10, 50])
    assert lanes_of(map(plan.manifest, plan.shards)) == groups_of(plan)
    assert plan.edits_left == 2 * 50  # each seed's fifty edits are made once
    assert [(plan.group_sizes(s), s.T, s.lanes) for s in plan.shards] == [((1, 10, 50), 50, 1)] * 2
    assert [(s.lanes, s.edits) for s in plan_of([1, 10, 50], lanes_across_seeds=True).shards] == [(2, 100)]
    assert plan.shards[0].cost < sum(plan_of([T]).shards[0].cost for T in (1, 10, 50))
    done = {cell.cell_id: set(range(cell.groups)) for cell in plan.cells}
    more = plan_of([1, 5, 10, 50], Progress(done=done))
    assert {more.group_sizes(shard) for shard in more.shards} == {(5,)}
    # a lane that failed at edit 23: every T goes on from the group it was in
    ids = by_name(plan)
    kept = {1: 23, 10: 2, 50: 0}
    failed = {**done, **{ids["ft", T, 1]: set(range(n)) for T, n in kept.items()}}
    (rest,) = plan_of([1, 10, 50], Progress(done=failed)).shards
    (lane,) = plan_of([1, 10, 50], Progress(done=failed)).manifest(rest).job.waves[0]
    assert [(share.group, share.stop_group) for share in lane.shares] == [(0, 1), (2, 5), (23, 50)]
    begun = plan.manifest(plan.shards[0])
    again = plan_of([1, 5, 10, 50], Progress(begun=[begun]))
    assert again.manifest(again.shards[0]) == begun
    assert again.group_sizes(again.shards[0]) == (1, 10, 50)
    assert lanes_of(map(again.manifest, again.shards)) == groups_of(again)
    fewer = plan_of(
        [10], Progress(begun=[begun])
    )  # the stream that has begun goes on for the T that is still wanted
    assert [(s.T, s.begun) for s in fewer.shards] == [(10, True), (10, False)]
    assert fewer.peak_bytes(0) > fewer.weight_bytes


def test_requests_follow_the_seed_and_are_stable_under_growth(dataset: Dataset) -> None:
    plan = make_plan(spec_of(methods=["ft"], grid={"T": [10], "seeds": [0, 1]}), dataset=dataset)
    manifest = max(map(plan.manifest, plan.shards), key=lambda m: len(m.job.cells))
    lists = requests_of(manifest.job, dataset, "shuffle")
    assert lists[0] != lists[1]
    more = make_plan(
        spec_of(methods=["ft"], dataset__edits=100, grid={"T": [100], "seeds": [0]}), dataset=dataset
    )
    long = requests_of(more.manifest(more.shards[0]).job, dataset, "shuffle")[0]
    short = lists[[c.seed for c in manifest.job.cells].index(0)]
    assert long[: len(short)] == short


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset__edits": 5000}, ["dataset.edits", "5000", "1000"]),
        ({"methods": ["memit-typo"]}, ["memit-typo", "ft", "grace", "rome", "wise"]),
        ({"methods": [{"method": "ft", "hparams": {"layers": [99]}}]}, ["ft", "99", "0 to 5"]),
        ({"methods": [{"method": "ft", "hparams": {"steps": 3}}]}, ["ft", "steps", "num_steps"]),
        ({"methods": [{"method": "ft", "hparams": {"num_steps": "x"}}]}, ["ft", "num_steps", "'x'"]),
        ({"methods": ["ft", {"method": "ft", "label": "twin"}]}, ["ft", "twin", "same settings"]),
        (
            {
                "methods": ["ft", "grace", {"method": "rome", "label": "r"}],
                "grid": {"T": [10], "batch_size": 5},
            },
            [
                "grid.batch_size: 5, but grace, r (rome) can edit only one request",
                "several in one call: ft, ",
                "wise",
            ],
        ),
        ({"methods": [{"method": "ft", "hparams_file": "/nowhere.yaml"}]}, ["/nowhere.yaml"]),
        ({"dataset": {"kind": "zsre", "edits": 50, "path": "/nowhere.json"}}, ["/nowhere.json"]),
        ({"dataset": {"kind": "zrse", "edits": 50}}, ["zrse", "zsre"]),
        ({"model__name": "/nowhere/model"}, ["/nowhere/model"]),
    ],
)
def test_refusals(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(EditSweepError) as caught:
        make_plan(spec_of(**changes))
    for word in words:
        assert word in str(caught.value)


def test_spec_errors_are_spec_errors(dataset: Dataset) -> None:
    with pytest.raises(SpecError):
        make_plan(spec_of(dataset__edits=5000), dataset=dataset)


def test_a_plan_travels_between_processes(dataset: Dataset) -> None:
    plan = make_plan(spec_of(methods=["ft", "rome"]), dataset=dataset)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert copy.manifest(copy.shards[-1]) == plan.manifest(plan.shards[-1])
    work = pickle.loads(pickle.dumps(plan.work))  # what goes to actors
    assert [work.manifest(shard) for shard in work.shards] == list(map(plan.manifest, plan.shards))


def everything_from_files(folder: Path) -> SweepSpec:
    """A sweep whose model, data set, training data, hyperparameters, corpus and held-out text all
    lie in ``folder``."""
    shutil.copytree(assets_dir(), folder / "model")
    record = json.loads((ROOT / "tests/data/zsre_mend_eval_sample.json").read_text())[0]
    for name, people in (("edit.json", "ABCD"), ("train.json", "EFGHI")):
        rows = [
            {**record, "subject": s, "src": f"Who taught {s}?", "rephrase": f"{s}'s teacher?"} for s in people
        ]
        (folder / name).write_text(json.dumps(rows))
    (folder / "ft.yaml").write_text(
        "alg_name: FT\nlayers: [3]\nlr: 0.001\nnum_steps: 3\nobjective_optimization: target_new\n"
    )
    for name in ("corpus.txt", "held_out.txt"):
        (folder / name).write_text("Once there was a text. It had sentences.\n" * 40)
    networks = {"method": "mend", "hparams": {"layers": [3], "lr_lr": 0.001}}
    raw = {
        "name": "files",
        "model": {"name": "./model", "device": "cpu"},
        "dataset": {"kind": "zsre", "path": "edit.json", "train_path": "train.json", "edits": 4},
        "grid": {"T": [1, 4], "seeds": [0, 1]},
        "methods": [
            {"method": "ft", "hparams_file": "ft.yaml"},
            {"method": "rome", "hparams": {"layer": 3, "corpus": str(folder / "corpus.txt")}},
            {"method": "memit", "hparams": {"layers": [2, 3], "corpus": str(folder / "corpus.txt")}},
            networks,
        ],
        "scoring": {"ability_text": "held_out.txt"},
    }
    return parse_spec(yaml.safe_dump(raw), "files.yaml", folder)


def test_planning_reads_nothing_but_its_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    spec = everything_from_files(folder)
    before = make_plan(spec)
    inputs = read_inputs(spec)
    folder.rename(tmp_path / "gone")
    with pytest.raises(EditSweepError):
        read_inputs(spec)
    plan = Planner(inputs).plan(Progress())
    assert plan == before
    assert {artifact.kind for artifact in plan.artifacts.values()} >= {"second_moment", "pretrained"}
    assert any("5 requests to train on, 0 of them edited" in note for note in plan.notes)
    assert [plan.manifest(shard) for shard in plan.shards] == [
        before.manifest(shard) for shard in before.shards
    ]
    # and the same inputs serve another plan
    done = {cell.cell_id: set(range(cell.groups)) for cell in plan.cells}
    assert Planner(inputs).plan(Progress(done=done)).shards == ()


def test_a_corpus_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of methods, layers and seeds: the public one has gigabytes."""
    read: list[str] = []
    real = stats.corpus_fingerprint
    monkeypatch.setattr(stats, "corpus_fingerprint", lambda corpus: (read.append(corpus), real(corpus))[1])
    read_inputs(everything_from_files(tmp_path))
    assert read == [str(tmp_path / "corpus.txt")]


def test_artifacts_are_named_per_cell(dataset: Dataset) -> None:
    plan = make_plan(spec_of(methods=["rome"], grid={"T": [10], "seeds": [0, 1]}), dataset=dataset)
    manifest = max(map(plan.manifest, plan.shards), key=lambda m: len(m.job.cells))
    specs = Task.of(manifest).artifact_specs()
    for cell in manifest.job.cells:
        assert cell.artifacts
        assert set(cell.artifacts.values()) <= set(specs)
    assert set(specs) == set(
        plan.artifact_keys(next(s for s in plan.shards if s.shard_id == manifest.shard_id))
    )


def test_ten_thousand_cells_take_no_longer_each_than_a_thousand(dataset: Dataset) -> None:
    def planned(seeds: int) -> tuple[float, list[str]]:
        spec = spec_of(
            dataset__edits=1000,
            grid={"T": [1, 10, 100, 1000], "seeds": list(range(seeds))},
            methods=[{"method": "ft", "label": f"ft{i}", "hparams": {"num_steps": i + 1}} for i in range(5)],
            engine={"shard_edits": 1000},
        )
        began = time.process_time()
        plan = make_plan(spec, dataset=dataset)
        return time.process_time() - began, [cell.cell_id for cell in plan.cells]

    make_plan(spec_of(), dataset=dataset)  # imports, once
    fewer, _ = planned(50)
    seconds, cells = planned(500)
    assert (
        seconds < 30 * fewer
    )  # ten times as long, were every machine quiet; benchmarks/bench_plan.py says how long
    assert len(cells) == len(set(cells)) == 10_000


def test_specs_and_manifests_need_no_torch() -> None:
    code = "import sys, orchestrator.planning.plan; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode
        == 0
    )
