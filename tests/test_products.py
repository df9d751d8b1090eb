"""Which library computes a product shows in the last digits only. The quick way is taken here on
every processor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.small import random_model
from workers.kernels.matmul import lane_products, linear, slow, use_fast_linear
from workers.model.batch import Encoded, collate
from workers.model.overlay import lane_linear, token_linear
from workers.session import with_kernels

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(
        not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
        reason="this build of PyTorch comes without oneDNN",
    ),
]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN runs on any processor and at any size, only not always faster."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("workers.kernels.matmul._intel", lambda: False)
    monkeypatch.setattr("workers.kernels.matmul._MULTIPLICATIONS", 8 * 48 * 64)


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def strided(kind: str, rows: int) -> Tensor:
    if kind == "flat":
        return draw(rows, 48)
    if kind == "columns":
        return draw(5, rows, 48)[:, 3:]
    if kind == "transposed":
        return draw(48, rows).T
    return draw(1, 48).expand(rows, 48)


@pytest.mark.parametrize("kind", ["flat", "columns", "transposed", "expanded"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [4, 40])
def test_values_and_gradients_are_those_of_torch(kind: str, turned: bool, rows: int) -> None:
    found: list[Tensor | None] = []
    expected: list[Tensor | None] = []
    for product, in_features in ((linear, found), (F.linear, expected)):
        x = strided(kind, rows).requires_grad_()
        weight = (draw(48, 64).T if turned else draw(64, 48)).requires_grad_()
        bias = draw(64).requires_grad_()
        out = product(x, weight, bias)
        (out * draw(*out.shape)).sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(product(x, weight, bias), out)
        if product is linear and rows == 40:  # torch's own may take another way without gradients
            with torch.no_grad():
                assert torch.equal(product(x, weight, bias), out)
        in_features += [out, x.grad, weight.grad, bias.grad]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_rows() -> None:
    x, weight = draw(40, 48).requires_grad_(), draw(64, 48)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = linear(x, weight)
    out.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, weight.sum(0).expand(40, 48), rtol=1e-5, atol=1e-5)
    assert [t.shape for t in kept] == [weight.shape]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torch_s_own(dtype: torch.dtype) -> None:
    x, weight = draw(40, 48).to(dtype), draw(64, 48).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("rows", [4, 40])
def test_lanes(rows: int) -> None:
    left, right = draw(3, rows, 48), draw(3, 64, 48)
    torch.testing.assert_close(lane_products(left, right), left @ right.transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert torch.equal(lane_products(left[1:2], right[1:2])[0], lane_products(left, right)[1])


@pytest.mark.parametrize("width", [3, 20])
def test_the_gradient_of_a_lane_is_that_of_its_rows(width: int) -> None:
    rows = collate([Encoded(tuple(range(width)), 2) for _ in range(6)], [0, 0, 1, 1, 2, 2], 0)
    x, weight = draw(6, width, 48).requires_grad_(), draw(3, 64, 48).requires_grad_()
    out = lane_linear(x, weight, rows)
    way = draw(*out.shape)
    (out * way).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and x.grad is not None
    for lane in range(3):
        some = slice(2 * lane, 2 * lane + 2)
        expected = torch.einsum("bso,bsi->oi", way[some], x[some].detach())
        torch.testing.assert_close(weight.grad[lane], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad[some], way[some] @ weight[lane].detach(), rtol=1e-4, atol=1e-4)


def test_each_token_times_the_weight_of_its_lane() -> None:
    x, weight = draw(60, 48), draw(3, 64, 48).requires_grad_()
    ends = (7, 47, 60)
    out = token_linear(x, weight, ends)
    way = draw(*out.shape)
    out.backward(way)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    for lane, (start, stop) in enumerate(((0, 7), (7, 47), (47, 60))):
        torch.testing.assert_close(out[start:stop], x[start:stop] @ weight[lane].T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weight.grad[lane], way[start:stop].T @ x[start:stop], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_answers_as_before_and_so_does_its_copy(model_type: str) -> None:
    base = with_kernels(random_model(model_type))
    names = [
        name for name, module in base.model.named_modules() if type(module).__name__.startswith("_Quick")
    ]
    assert len(names) >= 4 * len(base.layers)
    ids = torch.arange(60).reshape(4, 15) % base.vocab
    found = base.model(ids).logits
    changed = copy.deepcopy(base.model)
    slow(changed)
    assert not any(type(module).__name__.startswith("_Quick") for module in changed.modules())
    torch.testing.assert_close(changed(ids).logits, found, rtol=1e-4, atol=1e-4)
    use_fast_linear(changed)
    assert torch.equal(changed(ids).logits, found)
    with torch.no_grad():  # a copy answers by its own weights
        for module in changed.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.weight.zero_()
    assert not torch.equal(changed(ids).logits, found)
    assert torch.equal(base.model(ids).logits, found)


def test_without_the_operator_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    module = nn.Sequential(nn.Linear(48, 64))
    use_fast_linear(module)
    assert type(module[0]) is nn.Linear
    x, weight = draw(40, 48), draw(64, 48)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
