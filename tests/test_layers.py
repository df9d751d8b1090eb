"""A decoder layer written out against its modules, and its gradient against differences of its values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import random_model
from tests.test_models import batch
from workers.inner_loop.suffix import Suffix
from workers.kernels.llama_cpu import Constants, QuickLayer, plain
from workers.model.base import BaseModel
from workers.model.overlay import DenseOverlay

LAYER = 2


def double(**sizes: Any) -> BaseModel:
    base = random_model("llama", **sizes)
    return BaseModel(base.model.double(), base.tokenizer, base.config)


def last_layer(base: BaseModel, first: int, read_from: int) -> tuple[QuickLayer, Tensor, Tensor]:
    """The last layer of a batch whose columns before ``first`` are fixed and which is read from ``read_from`` on; what enters it;
    and which of its answers are no padding's."""
    rows = batch(base, [0, 1, 2])
    width = rows.input_ids_BS.shape[1]
    reads = ([0, 1, 2], [width + read_from, width - 1, width - 1])
    suffix = Suffix.capture(base, base.site(LAYER - 1), rows, reads, width + first if first else 0)
    assert suffix._layers is not None
    (step,) = suffix._layers
    assert step.quick is not None
    real_RQ = rows.attention_mask_BS[:, suffix.first + step.given :].bool()
    return step.quick, suffix.layer_BSD[:, suffix.first :], real_RQ


@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "head_dim": 16}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("first", "read_from", "late"), [(0, -1, True), (0, -9, False), (-7, -1, True), (-4, -4, False)]
)
def test_gradients_are_those_of_the_values(
    sizes: dict[str, Any], bias: bool, first: int, read_from: int, late: bool
) -> None:
    base = double(**sizes, attention_bias=bias, mlp_bias=bias)
    if bias:  # which begin at zero
        for module in base.layers[LAYER].modules():
            if isinstance(module, torch.nn.Linear):
                module.bias.data.normal_(generator=torch.Generator().manual_seed(1))
        base._quick.clear()
    layer, hidden, real = last_layer(base, first, read_from)
    if not sizes:
        assert layer.late_values is (late and not bias)
    assert torch.autograd.gradcheck(lambda x: layer(x)[real], hidden.clone().requires_grad_(), fast_mode=True)
    if layer.late_values:  # mixed before or after their map, values are the same
        torch.testing.assert_close(layer(hidden), replace(layer, late_values=False)(hidden), rtol=0, atol=1e-12)


def test_the_same_batch_has_the_same_bits() -> None:
    base = random_model("llama")
    layer, hidden, _ = last_layer(base, 0, -1)
    out = layer(hidden)
    assert torch.equal(layer(hidden.clone()), out)
    some = torch.tensor([2, 0])
    torch.testing.assert_close(layer.part(some)(hidden[some]), out[some], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "dtype", "sizes"),
    [
        ("gpt2", torch.float32, {}),
        ("llama", torch.bfloat16, {}),
        ("llama", torch.float32, {"hidden_act": "gelu"}),
        ("llama", torch.float32, {"hidden_size": 1024, "intermediate_size": 256}),
    ],
)
def test_other_layers_run_by_their_modules(model_type: str, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    base = random_model(model_type, dtype, **sizes)
    assert base.quick_weights(LAYER) is None
    rows = batch(base, [0, 1])
    suffix = Suffix.capture(base, base.site(1), rows, ([0, 1], [rows.input_ids_BS.shape[1] - 1] * 2))
    assert suffix._layers is not None and all(step.quick is None for step in suffix._layers)
    assert bool(torch.isfinite(suffix.hidden(suffix.output_BSO)).all())


def test_arguments_it_does_not_know_are_left_to_the_modules() -> None:
    base = random_model("llama")
    weights = base.quick_weights(LAYER)
    cos, sin = torch.rand(2, 5, 6).repeat(1, 1, 2), torch.rand(2, 5, 6).repeat(1, 1, 2)
    known = {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool), "position_embeddings": (cos, sin)}
    assert QuickLayer.of(weights, Constants.of(known)) is not None
    assert QuickLayer.of(None, Constants.of(known)) is None
    assert Constants.of({**known, "alibi": cos}) is None
    assert Constants.of({"attention_mask": known["attention_mask"]}) is None
    assert QuickLayer.of(weights, None) is None
    for halves in ((torch.rand(2, 5, 12), sin), (cos, torch.rand(2, 5, 12))):
        assert QuickLayer.of(weights, Constants.of({**known, "position_embeddings": halves})) is None


def test_where_an_overlay_answers_for_a_part_the_modules_run() -> None:
    base = random_model("llama")
    rows = batch(base, [0, 0])
    suffix = Suffix.capture(base, base.site(1), rows, ([0, 1], [rows.input_ids_BS.shape[1] - 1] * 2))
    untouched = suffix.hidden(suffix.output_BSO)
    overlay = DenseOverlay([base.site(LAYER)], 1, torch.float32)
    overlay.set_weight(0, overlay.sites[0], 2 * overlay.sites[0].weight_OI)
    assert plain(base.layers[LAYER])
    with overlay.installed(rows):
        assert not plain(base.layers[LAYER])
        edited = suffix.hidden(suffix.output_BSO)
        whole = base.hidden_states(rows)[[0, 1], -1]
    torch.testing.assert_close(edited, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untouched, edited, rtol=1e-2, atol=1e-2)
    heard: list[Tensor] = []
    note = base.site(LAYER).module.register_forward_hook(lambda _, args, out: heard.append(out))
    suffix.hidden(suffix.output_BSO)
    note.remove()
    assert len(heard) == 1 and plain(base.layers[LAYER])
