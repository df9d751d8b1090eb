"""Lanes that fit, and what is said where they do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.execute import check_declared
from orchestrator.memory import GIB, MOST_LANES, Memory, estimate, first_layer, lane_edits, rows_per_edit
from workers.job import ScoreConfig
from workers.models import ModelConfig, model_shape
from workers.types import ModelError

BYTES = st.integers(0, 1 << 40)


@given(weights=BYTES, overlay=BYTES, edit=BYTES, score=BYTES, budget=BYTES)
def test_as_many_lanes_as_fit_and_not_one_more(weights: int, overlay: int, edit: int, score: int, budget: int) -> None:
    need = Memory(weights, overlay, edit, score)
    lanes = need.lanes_within(budget)
    assert lanes == 0 or need.peak(lanes) <= budget
    assert lanes == MOST_LANES or need.peak(lanes + 1) > budget


def test_what_an_estimate_grows_with() -> None:
    shape = model_shape(ModelConfig(name="embedded", device="cpu"))
    base = estimate(
        shape, {"layer": 4}, overlay_bytes=100, batch_size=1, score=ScoreConfig(rows_per_batch=8), tokens=40
    )
    assert base.weights == shape.weight_bytes
    assert base.overlay == 100
    below = estimate(
        shape, {"layers": [5, 2]}, overlay_bytes=100, batch_size=1, score=ScoreConfig(rows_per_batch=8), tokens=40
    )
    assert below.edit > base.edit  # four layers are replayed with gradients instead of two
    wider = estimate(
        shape, {"layer": 4}, overlay_bytes=100, batch_size=3, score=ScoreConfig(rows_per_batch=16), tokens=40
    )
    assert (wider.edit, wider.score) == (3 * base.edit, 2 * base.score)
    wrapped = estimate(
        shape, {"base": {"layer": 4}}, overlay_bytes=100, batch_size=1, score=ScoreConfig(rows_per_batch=8), tokens=40
    )
    assert wrapped == base  # a method around another one steps through what that one does
    longer = estimate(
        shape, {"layer": 4}, overlay_bytes=100, batch_size=1, score=ScoreConfig(rows_per_batch=8), tokens=80
    )
    assert longer.edit > base.edit and longer.score > base.score
    capped = estimate(shape, {"layer": 4}, 100, 1, ScoreConfig(rows_per_batch=8, tokens_per_batch=160), tokens=40)
    assert capped.score == base.score // 2
    keeps = estimate(shape, {"layer": 4}, 100, 1, ScoreConfig(rows_per_batch=8), tokens=40, cache_bytes=1000)
    assert keeps.peak(3) == base.peak(3) + 1000


def test_which_layer_and_how_many_edits() -> None:
    assert rows_per_edit({"layer": 3}) == 2
    assert rows_per_edit({"context_template_length_params": [[5, 10], [10, 10]]}) == 22
    assert [first_layer(c) for c in ({"layer": 7}, {"layers": [3, 2]}, {"layers": []}, {"x": 1})] == [7, 2, 0, 0]
    assert (lane_edits("group", 10, 1000), lane_edits("never", 10, 1000)) == (10, 1000)


def test_a_smaller_gpu_than_planned_for_is_refused_with_the_way_out() -> None:
    check_declared("s1", None, 8 * GIB)  # a number of lanes, and no memory declared
    check_declared("s1", 80, None)  # no GPU here: the device is recorded in every row
    check_declared("s1", 80, int(79.1 * GIB))  # a card of 80 GB
    check_declared("s1", 24, 80 * GIB)
    with pytest.raises(ModelError) as caught:
        check_declared("s1", 80, int(23.6 * GIB))
    for word in ("shard s1", "engine.gpu_memory_gb: 80", "23.6 GiB", "not begun", "--set engine.gpu_memory_gb=23"):
        assert word in str(caught.value)
