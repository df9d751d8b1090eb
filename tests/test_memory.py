"""Lanes that fit, and what is said where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.machine import check_declared
from orchestrator.planning.memory import (
    GIB,
    MOST_LANES,
    MemoryEstimate,
    estimate,
    first_layer,
    lane_edits,
    rows_per_edit,
)
from workers.artifacts.base import ArtifactData
from workers.job import ScoreConfig
from workers.methods import get_method
from workers.model.base import Site, model_shape
from workers.model.config import ModelConfig
from workers.session import Session
from workers.types import ModelError

BYTES = st.integers(0, 1 << 40)


@given(weights=BYTES, overlay=BYTES, edit=BYTES, score=BYTES, budget=BYTES)
def test_as_many_lanes_as_fit_and_not_one_more(weights: int, overlay: int, edit: int, score: int, budget: int) -> None:
    need = MemoryEstimate(weights, overlay, edit, score)
    lanes = need.lanes_within(budget)
    assert lanes == 0 or need.peak(lanes) <= budget
    assert lanes == MOST_LANES or need.peak(lanes + 1) > budget


def test_what_an_estimate_grows_with() -> None:
    shape = model_shape(ModelConfig(name="embedded", device="cpu"))
    base = estimate(
        shape, {"layer": 4}, overlay_bytes=100, batch_size=1, score=ScoreConfig(rows_per_batch=8), tokens=40
    )
    assert base.weights == shape.weight_bytes
    assert (base.overlay, base.shared) == (100, 0)
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
    shares = estimate(shape, {"layer": 4}, 100, 1, ScoreConfig(rows_per_batch=8), tokens=40, shared_bytes=1000)
    assert shares.peak(3) == base.peak(3) + 1000
    on_gpu = estimate(shape, {"layer": 4}, 100, 1, ScoreConfig(rows_per_batch=8), tokens=40, on_gpu=True)
    assert on_gpu.peak(3) == base.weights + 3 * 100 + 3 * base.edit + base.score  # a recording keeps its activations


class Held:
    """Finds the bytes of every tensor that an object leads to; what shares memory counts once."""

    def __init__(self, *skip: object) -> None:
        self.seen = {id(thing) for thing in skip}
        self.found: dict[int, int] = {}

    def add(self, value: object) -> int:
        if id(value) not in self.seen:
            self.seen.add(id(value))
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, Mapping):
                for part in value.values():
                    self.add(part)
            elif isinstance(value, tuple | list):
                for part in value:
                    self.add(part)
            elif hasattr(value, "__dict__") and not isinstance(value, Site | type):
                self.add(vars(value))
        return sum(self.found.values())


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit", "ft-ewc", "mend", "none"])
def test_what_lanes_share_is_stated(name: str) -> None:
    """What a prepared method holds beside the base fits into what is stated, which is not many times more."""
    base = Session.open(ModelConfig(name="embedded", device="cpu")).base
    shape = model_shape(base.config)
    kind = get_method(name)
    config = kind.Config.model_validate({**kind.embedded(), **({"rank": 16} if name == "mend" else {})})
    out, in_features = shape.site(None)
    inputs: dict[str, ArtifactData] = {"templates": ArtifactData(meta={"templates": ["{}"]})}
    moment_II = torch.eye(in_features)
    inputs["moment"] = ArtifactData({"moment": moment_II})
    for layer in (3, 4):
        inputs[f"moment.{layer}"] = ArtifactData({"moment": moment_II.clone()})
        inputs[f"null_space.{layer}"] = ArtifactData({"projection": moment_II.clone()})
        inputs[f"fisher_{layer}"] = ArtifactData({"fisher": torch.ones(out, in_features)})
    if name == "mend":
        network: Any = kind
        net = network.network(base, config.model_dump(mode="json"), torch.Generator().manual_seed(0))
        inputs["pretrained"] = ArtifactData(net.data())
    asked = {"rome": ("moment",), "mend": ("pretrained",), "ft-ewc": ("fisher_3",), "none": ()}
    kept = asked.get(name, tuple(f"{'moment' if name == 'memit' else 'null_space'}.{layer}" for layer in (3, 4)))
    weights = Held()
    weights.add(dict(base.model.named_parameters()))
    method = kind.prepare(base, config, {key: inputs[key] for key in (*kept, "templates")})
    held = Held(base, base.model)
    held.add(vars(method))
    bytes_held = sum(size for place, size in held.found.items() if place not in weights.found)
    stated = kind.shared_bytes(config, shape)
    assert bytes_held <= stated <= 6 * bytes_held


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
