"""Lanes that fit, and what is said where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.machine import check_declared
from orchestrator.planning.memory import GIB, MOST_LANES, MemoryEstimate, estimate, lane_edits
from workers.artifacts import fisher, stats, templates
from workers.artifacts.base import ArtifactData
from workers.artifacts.pretrain import PRETRAINED, training_source
from workers.job import ScoreConfig
from workers.methods import get_method, load_config, method_names
from workers.methods.base import ArtifactContext, MethodConfig
from workers.methods.ft import FTConfig
from workers.methods.melo import BlockOverlay
from workers.methods.rome import ROMEConfig
from workers.methods.simie import BASES, SimIEConfig
from workers.methods.wise.config import WISEConfig
from workers.model.base import BaseModel, Site, model_shape
from workers.model.config import ModelConfig, ModelFingerprint, ModelShape
from workers.session import Session
from workers.types import ModelError

BYTES = st.integers(0, 1 << 40)


@given(weights=BYTES, overlay=BYTES, edit=BYTES, score=BYTES, budget=BYTES)
def test_as_many_lanes_as_fit_and_not_one_more(
    weights: int, overlay: int, edit: int, score: int, budget: int
) -> None:
    need = MemoryEstimate(weights, overlay, edit, score)
    lanes = need.lanes_within(budget)
    assert lanes == 0 or need.peak(lanes) <= budget
    assert lanes == MOST_LANES or need.peak(lanes + 1) > budget


class Toy(MethodConfig):
    """A method whose answers are those of its fields."""

    layer: int = 4
    rows: int = 2
    shared: int = 0

    @property
    def first_layer(self) -> int:
        return self.layer

    @property
    def rows_per_edit(self) -> int:
        return self.rows

    def overlay_bytes(self, shape: ModelShape, edits: int) -> int:
        return 10 * edits

    def shared_bytes(self, shape: ModelShape) -> int:
        return self.shared


def test_what_an_estimate_grows_with() -> None:
    shape = model_shape(ModelConfig(name="embedded", device="cpu"))

    def need(config: MethodConfig, score: ScoreConfig | None = None, **changes: Any) -> MemoryEstimate:
        values = {"edits": 10, "batch_size": 1, "tokens": 40, **changes}
        return estimate(shape, config, score=score or ScoreConfig(rows_per_batch=8), **values)

    base = need(Toy())
    assert base.weights == shape.weight_bytes
    assert (base.overlay, base.shared) == (100, 0)
    assert need(Toy(), edits=20).overlay == 200
    below = need(Toy(layer=2))
    assert below.edit > base.edit  # four layers are replayed with gradients instead of two
    wider = need(Toy(), ScoreConfig(rows_per_batch=16), batch_size=3)
    assert (wider.edit, wider.score) == (3 * base.edit, 2 * base.score)
    assert need(Toy(rows=22)).edit == 11 * base.edit
    longer = need(Toy(), tokens=80)
    assert longer.edit > base.edit and longer.score > base.score
    assert need(Toy(), ScoreConfig(rows_per_batch=8, tokens_per_batch=160)).score == base.score // 2
    assert need(Toy(), cache_bytes=1000).peak(3) == base.peak(3) + 1000
    assert need(Toy(shared=1000)).peak(3) == base.peak(3) + 1000
    on_gpu = need(Toy(), on_gpu=True)
    assert (
        on_gpu.peak(3) == base.weights + 3 * 100 + 3 * base.edit + base.score
    )  # a recording keeps its activations


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


@pytest.fixture(scope="module")
def embedded() -> BaseModel:
    return Session.open(ModelConfig(name="embedded", device="cpu")).base


def embedded_inputs(base: BaseModel, name: str, config: MethodConfig) -> dict[str, ArtifactData]:
    """What a method asks for on the embedded model, of the sizes that it would be built in."""
    shape = model_shape(base.config)
    training = training_source("tinyworld", shards=(16,))[0]
    found = {}
    for spec in config.artifacts(ArtifactContext(ModelFingerprint("m", "t"), base.config, 0, training)):
        out, in_features = shape.site(spec.recipe.get("module"))
        if spec.kind == PRETRAINED:
            assert spec.recipe["method"] == name  # whose trainer a session will ask for
            trainer = get_method(name).trainer(base, spec.recipe["hparams"], torch.Generator().manual_seed(0))
            found[spec.name] = trainer.product()
        elif spec.kind == templates.KIND:
            found[spec.name] = ArtifactData(meta={"templates": ["{}"]})
        elif spec.kind == fisher.KIND:
            found[spec.name] = ArtifactData({"fisher": torch.ones(out, in_features)})
        elif spec.kind == stats.NULL_SPACE:
            found[spec.name] = ArtifactData({"projection": torch.eye(in_features)})
        else:
            assert spec.kind == stats.KIND
            found[spec.name] = ArtifactData({"moment": torch.eye(in_features)})
    return found


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit", "ft-ewc", "mend", "none"])
def test_what_lanes_share_is_stated(name: str, embedded: BaseModel) -> None:
    """What a prepared method holds beside the base fits into what is stated, which is not many
    times more."""
    base = embedded
    kind = get_method(name)
    config = kind.Config.model_validate({**kind.embedded(), **({"rank": 16} if name == "mend" else {})})
    inputs = embedded_inputs(base, name, config)
    weights = Held()
    weights.add(dict(base.model.named_parameters()))
    method = kind.prepare(base, config, inputs)
    held = Held(base, base.model)
    held.add(vars(method))
    bytes_held = sum(size for place, size in held.found.items() if place not in weights.found)
    stated = config.shared_bytes(model_shape(base.config))
    assert bytes_held <= stated <= 6 * bytes_held


FROM_THE_BOTTOM = {"none", "icl", "serac"}
"""Methods that edit no map of a layer."""


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        *((name, {"layers": [2, 3]} if name == "lora" else {}) for name in method_names()),
        ("lora", {}),
        ("ultraedit", {"modules": {"mlp.up_proj": [4, 2], "mlp.gate_proj": [3]}}),
        *(("simie", {"base_method": name}) for name in BASES),
    ],
)
def test_a_config_states_the_first_layer_of_its_overlay(
    name: str, hparams: dict[str, Any], embedded: BaseModel
) -> None:
    """The planner counts layers from where the config says, and lanes: auto follows from that."""
    base = embedded
    config = load_config(name, hparams, None, base.config)
    overlay = get_method(name).prepare(base, config, embedded_inputs(base, name, config)).new_overlay(1)
    # at MELO's key layer a map is read, but none is edited: steps do not run through it
    sites = overlay.adapted if isinstance(overlay, BlockOverlay) else overlay.sites
    assert bool(sites) is (name not in FROM_THE_BOTTOM)
    assert config.first_layer == min((site.layer for site in sites), default=0)
    if sites and (name, hparams) != ("lora", {}):
        assert config.first_layer > 0  # so that the default would not do


def test_how_many_rows_a_request_is_edited_in() -> None:
    assert FTConfig(layers=(3,)).rows_per_edit == 2
    contexts: Any = {"context_template_length_params": [[5, 10], [10, 10]]}
    rome = ROMEConfig(layer=3, **contexts)
    assert rome.rows_per_edit == 22
    assert SimIEConfig(base_method="rome", base=rome.model_dump()).rows_per_edit == 22
    assert WISEConfig(layer=3).rows_per_edit == 12


def test_how_many_edits_a_lane_holds() -> None:
    assert (lane_edits("group", 10, 1000), lane_edits("never", 10, 1000)) == (10, 1000)


def test_a_smaller_gpu_than_planned_for_is_refused_with_the_way_out() -> None:
    check_declared("s1", None, 8 * GIB)  # a number of lanes, and no memory declared
    check_declared("s1", 80, None)  # no GPU here: the device is recorded in every row
    check_declared("s1", 80, int(79.1 * GIB))  # a card of 80 GB
    check_declared("s1", 24, 80 * GIB)
    with pytest.raises(ModelError) as caught:
        check_declared("s1", 80, int(23.6 * GIB))
    for word in (
        "shard s1",
        "engine.gpu_memory_gb: 80",
        "23.6 GiB",
        "not begun",
        "--set engine.gpu_memory_gb=23",
    ):
        assert word in str(caught.value)
