"""What an edit's inner loop leaves out changes nothing: the reduced pass against the whole one,
values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.small import build_inputs, golden_requests, random_model
from tests.test_models import batch, model_of
from workers.inner_loop.lockstep import Lockstep
from workers.inner_loop.suffix import Suffix
from workers.methods import get_method
from workers.methods.base import LaneEdit
from workers.methods.ft import FTConfig
from workers.methods.rome import ROMEConfig
from workers.methods.wise.config import WISEConfig
from workers.model.architectures import ARCHITECTURES
from workers.model.base import BaseModel
from workers.model.replay import capture, replay
from workers.rng import RandomStreams

pytestmark = pytest.mark.numeric

IN_FLOAT32 = {"gptj": 1e-6}  # computes its rotation in float32, which differs by up to 2e-8


def double(model_type: str) -> BaseModel:
    base = model_of(model_type)
    return BaseModel(base.model.double(), base.tokenizer, base.config)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_reduced_pass_is_the_whole_pass(model_type: str, layer: int) -> None:
    base = double(model_type)
    rows = batch(base, [0, 1, 2])
    site = base.site(layer)
    width = rows.input_ids_BS.shape[1]
    tolerance = IN_FLOAT32.get(model_type, 1e-12)
    for first, row_P, column_P in (
        (0, [0, 0, 2], [width - 3, width - 1, width - 2]),  # row 1 is not read
        (0, [0, 1, 2], [width - 1] * 3),
        (0, [2, 1, 0], [0, width - 1, 4]),
        (
            width - 3,
            [0, 0, 2],
            [width - 3, width - 1, width - 2],
        ),  # the map answers as before up to column -3
        (width - 4, [0, 1, 2], [width - 4, width - 1, width - 1]),
        (width - 4, [0, 1, 2], [width - 1] * 3),
    ):
        suffix = Suffix.capture(base, site, rows, (row_P, column_P), first)
        assert suffix._layers is not None
        generator = torch.Generator().manual_seed(0)
        change = torch.zeros_like(suffix.output_BSO)
        change[:, first:] = torch.randn(change[:, first:].shape, generator=generator, dtype=change.dtype)
        ours, whole = change.clone().requires_grad_(), change.clone().requires_grad_()
        found = suffix.hidden((suffix.output_BSO + ours)[:, suffix.first :])
        prefix = capture(base, rows, layer)
        handle = site.module.register_forward_hook(lambda _m, _a, out, whole=whole: out + whole)
        expected = replay(base, prefix)[row_P, column_P]
        handle.remove()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        weights = torch.randn(found.shape, generator=generator, dtype=found.dtype)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        assert ours.grad is not None and whole.grad is not None and whole.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad[:, first:], whole.grad[:, first:], rtol=0, atol=10 * tolerance)

        few, kept = rows.part([1, 2])
        reads = [p for p, row in enumerate(row_P) if row in kept]
        part = suffix.part(kept, few, reads)
        again = part.hidden((suffix.output_BSO + ours)[kept][:, suffix.first :])
        torch.testing.assert_close(again, found[reads], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_in_half_precision_an_answer_that_did_not_change_gives_the_same_bits(model_type: str) -> None:
    base = model_of(model_type)
    base = BaseModel(base.model.to(torch.bfloat16), base.tokenizer, base.config)
    rows = batch(base, [0, 1, 2])
    width = rows.input_ids_BS.shape[1]
    reads = ([row for row in range(3) for _ in range(width)], list(range(width)) * 3)
    suffix = Suffix.capture(base, base.site(2), rows, reads)  # no layer above, so nothing else rounds
    with torch.no_grad():
        assert torch.equal(suffix.hidden(suffix.output_BSO), base.hidden_states(rows)[reads])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_map_that_is_not_added_to_the_sum_is_replayed_from_its_layer(model_type: str) -> None:
    base = double(model_type)
    rows = batch(base, [0, 0, 1])
    site = base.site(1, base.arch.mlp_in[0])
    suffix = Suffix.capture(base, site, rows, ([0, 2], [5, 6]), first=3)
    assert (suffix._layers, suffix.first) == (None, 0)
    torch.testing.assert_close(suffix.hidden(), base.hidden_states(rows)[[0, 2], [5, 6]], rtol=0, atol=1e-12)
    changed = suffix.hidden(suffix.output_BSO * 2)
    assert (changed - suffix.hidden()).abs().max() > 1e-3
    few, kept = rows.part([1])
    torch.testing.assert_close(
        suffix.part(kept, few, [1]).hidden(suffix.output_BSO[kept] * 2), changed[1:], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ft", FTConfig(layers=(1,), lr=2e-2, num_steps=12, norm_constraint=0.05)),
        ("ft", FTConfig(layers=(0, 2), lr=2e-2, num_steps=12)),
        (
            "rome",
            ROMEConfig(layer=1, v_lr=0.5, context_template_length_params=((2, 5),), mom2_adjustment=False),
        ),
        (
            "wise",
            WISEConfig(
                layer=1, lr=0.5, n_iter=14, alpha=0, beta=0, gamma=0, context_template_length_params=()
            ),
        ),
    ],
)
def test_lanes_that_have_arrived_leave_the_batch_and_nothing_else_changes(
    arch: str, name: str, config: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten lanes stop at different steps; each ends as if it had been alone."""
    base = random_model(arch, torch.float64)
    kind = get_method(name)
    config = kind.Config.model_validate(config.model_dump())  # type: ignore[attr-defined]
    inputs = build_inputs(base, name, config)
    editor = kind.prepare(base, config, inputs)
    # the same short target for all, so that the easy ones arrive early
    requests = [
        replace(r, prompt=f"{'Yes, ' * (i % 4)}{r.prompt}") for i, r in enumerate(golden_requests(10))
    ]
    edits = [LaneEdit((r,), RandomStreams(name, {}, 0, i, 0), inputs) for i, r in enumerate(requests)]
    halvings: list[int] = []
    compact = Lockstep.compact
    monkeypatch.setattr(Lockstep, "compact", lambda self: (halvings.append(len(self.live)), compact(self))[1])
    stop = {"ft": 2.0, "rome": {"llama": 10.0, "gpt2": 14.0}[arch], "wise": 2.0}[name]
    where = {"ft": "inner_loop.finetune", "rome": "methods.families.locate", "wise": "methods.wise.method"}[
        name
    ]
    monkeypatch.setattr(f"workers.{where}.STOP_LOSS", stop)
    if name == "wise":
        monkeypatch.setattr("workers.methods.wise.method.STOP_CHANGE", 1e9)
    together = editor.new_overlay(10)
    outcomes = editor.edit(together, edits)
    assert len({o.iterations for o in outcomes}) > 1
    assert halvings
    for lane, edit in enumerate(edits):
        alone = editor.new_overlay(1)
        (outcome,) = editor.edit(alone, [edit])
        assert outcome.iterations == outcomes[lane].iterations
        assert outcomes[lane].loss == pytest.approx(outcome.loss, rel=1e-5)
        found, expected = together.state(lane), alone.state(0)
        assert found.tensors.keys() == expected.tensors.keys()
        for key, value in expected.tensors.items():
            torch.testing.assert_close(found.tensors[key], value, rtol=1e-4, atol=1e-7)
