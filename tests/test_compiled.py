"""Compiled layers and updates change nothing beyond rounding. Traced here with a backend that needs
no compiler; what the real one makes of it on a GPU is in test_gpu.py."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import build_inputs, golden_requests, random_model
from tests.test_models import batch
from workers.inner_loop.lockstep import Lockstep
from workers.inner_loop.optim import Adam, Box, adam_in_box
from workers.kernels.compiled import Compiled
from workers.kernels.matmul import slow
from workers.methods import get_method
from workers.methods.base import EditOutcome, LaneEdit
from workers.methods.ft import FTConfig
from workers.methods.wise.config import WISEConfig
from workers.methods.wise.optim import masked_descent
from workers.model.base import BaseModel
from workers.model.overlay import DenseOverlay
from workers.rng import RandomStreams

TRACED = "aot_eager"
LANES = 3

CONFIGS: dict[str, Any] = {
    "ft": FTConfig(layers=(0,), num_steps=6, lr=1e-2, norm_constraint=2e-2),
    "ft without a box": FTConfig(layers=(0, 2), num_steps=6, lr=1e-2),
    "wise": WISEConfig(layer=0, n_iter=6, lr=0.5, alpha=0.2, beta=0.8, gamma=0.4),
}


def edited(base: BaseModel, name: str) -> tuple[list[EditOutcome], Tensor]:
    """Two edits of each lane, one after the other: the last outcomes, and the change of every
    weight."""
    kind, config = get_method(name.split(maxsplit=1)[0]), CONFIGS[name]
    inputs = build_inputs(base, kind.name, config)
    method = kind.prepare(base, config, inputs)
    overlay: Any = method.new_overlay(LANES)
    requests = golden_requests(2 * LANES)
    plain = config.model_dump(mode="json")
    for position in range(2):
        chosen = requests[position * LANES : (position + 1) * LANES]
        streams = [RandomStreams(kind.name, plain, 0, lane, position) for lane in range(LANES)]
        outcomes = method.edit(
            overlay, [LaneEdit((request,), d, inputs) for request, d in zip(chosen, streams, strict=True)]
        )
    if isinstance(overlay, DenseOverlay):
        assert not overlay.working_LOI  # once trained, the masters answer
        changes = [overlay.weights_LOI[site.name] - site.weight_OI for site in overlay.sites]
        return outcomes, torch.stack(changes)
    return outcomes, overlay.delta_LOI


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in sorted(CONFIGS)),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in ("ft", "wise")),
    ],
)
def test_compiled_steps_do_what_the_written_ones_do(name: str, dtype: torch.dtype) -> None:
    base = random_model("llama", dtype)
    slow(base.model)  # as on a GPU
    outcomes, change = edited(base, name)
    base.kernels.compiled = Compiled(updates=True, layers=True, backend=TRACED)
    compiled_outcomes, compiled_change = edited(base, name)
    assert not base.compiled.broken
    update = masked_descent if name == "wise" else adam_in_box
    assert {update, base.layers[1]} <= base.compiled._made.keys()  # both were compiled, and were called
    assert compiled_change.dtype == torch.float32
    rel = 1e-3 if dtype == torch.float32 else 0.05
    assert [o.iterations for o in compiled_outcomes] == [o.iterations for o in outcomes]
    assert [o.loss for o in compiled_outcomes] == pytest.approx([o.loss for o in outcomes], rel=rel, abs=rel)
    apart = torch.linalg.vector_norm(compiled_change - change) / torch.linalg.vector_norm(change)
    assert float(apart) < (
        1e-3 if dtype == torch.float32 else 0.5
    )  # Adam makes whole steps of the smallest gradients


@pytest.mark.numeric
def test_working_copies_go_on_where_half_of_the_lanes_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_model("llama", torch.bfloat16)
    requests = [
        replace(r, prompt=f"{'Yes, ' * (i % 4)}{r.prompt}") for i, r in enumerate(golden_requests(10))
    ]
    kind, config = get_method("ft"), FTConfig(layers=(1,), lr=2e-2, num_steps=12, norm_constraint=0.05)
    edits = [LaneEdit((r,), RandomStreams("ft", {}, 0, i, 0), {}) for i, r in enumerate(requests)]
    halvings: list[int] = []
    compact = Lockstep.compact
    monkeypatch.setattr(Lockstep, "compact", lambda self: (halvings.append(len(self.live)), compact(self))[1])
    monkeypatch.setattr("workers.inner_loop.finetune.STOP_LOSS", 2.0)
    found = []
    for compiled in (Compiled(), Compiled(updates=True, backend=TRACED)):
        base.kernels.compiled = compiled
        overlay: Any = kind.prepare(base, config, {}).new_overlay(10)
        found.append([o.iterations for o in kind.prepare(base, config, {}).edit(overlay, edits)])
    assert len(halvings) >= 2  # in both
    assert found[1] == pytest.approx(found[0], abs=1)


def test_an_update_in_one_pass_stops_lanes_and_keeps_them_in_their_box() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 8, 6)
    centre = start[0].to(torch.bfloat16)
    working = start.to(torch.bfloat16)
    plain, whole = start.clone(), start.clone()
    theirs = Adam([plain], 1e-2, 1e-3, [Box(centre, 0.5)])
    ours = Adam(
        [whole], 1e-2, 1e-3, [Box(centre, 0.5)], Compiled(updates=True, backend=TRACED), working=[working]
    )
    for step in range(4):
        gradient = torch.sin(7 * start + step).to(torch.bfloat16)
        plain.grad, working.grad = gradient.float(), gradient
        active = torch.tensor([True, step < 2, True])
        for optimizer in (theirs, ours):
            optimizer.step(active)
    torch.testing.assert_close(whole, plain, rtol=0, atol=1e-6)
    assert torch.equal(working, whole.to(torch.bfloat16))
    assert torch.equal(theirs.steps_L, ours.steps_L)
    assert (whole[1:] - centre.float()).abs().max() <= 0.5 + 1e-6


def test_a_layer_that_an_overlay_answers_in_is_not_compiled() -> None:
    base = random_model("llama")
    compiled = Compiled(layers=True, backend=TRACED)
    overlay = DenseOverlay([base.site(1)], 1, torch.float32)
    assert compiled.layer(base.layers[1]) is not base.layers[1]
    with overlay.installed(batch(base, [0])):
        assert compiled.layer(base.layers[1]) is base.layers[1]
        assert compiled.layer(base.layers[2]) is not base.layers[2]


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["ft", "wise"])
def test_where_the_compiler_fails_the_code_runs_as_it_is_written(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(graph: object, inputs: object) -> object:
        raise RuntimeError("no C compiler found")

    base = random_model("llama")
    outcomes, change = edited(base, name)
    base.kernels.compiled = Compiled(updates=True, layers=True, backend=no_compiler)
    with caplog.at_level(logging.WARNING):
        broken_outcomes, broken_change = edited(base, name)
    assert base.compiled.broken
    assert (
        len(base.compiled.turns(LANES)) == LANES
    )  # one after the other, which takes a lane's temporaries only
    (record,) = [r for r in caplog.records if "torch.compile failed" in r.message]
    assert "no C compiler found" in record.message
    assert [o.iterations for o in broken_outcomes] == [o.iterations for o in outcomes]
    torch.testing.assert_close(broken_change, change, rtol=1e-3, atol=1e-5)
