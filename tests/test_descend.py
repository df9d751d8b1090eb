"""The loop that all optimising methods share, on a problem whose every step is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import pytest
import torch
from torch import Tensor

from workers.inner_loop.descend import DivisibleProblem, WholeBatch, descend
from workers.inner_loop.optim import SGD, Adam


@dataclass(frozen=True)
class Parabolas(DivisibleProblem):
    """``|x|^2 / 2`` in each lane; one lane is done when its loss falls below its own bound."""

    x_LD: Tensor
    stop_L: Tensor
    sizes: list[int]
    """Lanes of each pass, noted."""

    @property
    def params(self) -> Sequence[Tensor]:
        return [self.x_LD]

    def losses(self) -> tuple[Tensor, Tensor]:
        loss_L = self.x_LD.square().sum(1) / 2
        self.sizes.append(len(loss_L))
        return loss_L, loss_L.detach() >= self.stop_L

    def part(self, kept: Sequence[int]) -> Self:
        return replace(self, x_LD=self.x_LD[list(kept)], stop_L=self.stop_L[list(kept)])


def parabolas(lanes: int, highest_stop: float = 0.0) -> Parabolas:
    generator = torch.Generator().manual_seed(0)
    x_LD = torch.rand(lanes, 5, generator=generator) + 1
    return Parabolas(x_LD, torch.linspace(0, highest_stop, lanes), [])


def test_lanes_that_leave_the_batch_end_with_the_bits_of_lanes_that_stay() -> None:
    leaving, staying = parabolas(16, 1.5), parabolas(16, 1.5)
    found = descend(leaving, Adam(leaving.params, 0.1), 40)
    assert min(leaving.sizes) < 16
    for lane in range(16):
        alone = staying.part([lane])
        expected = descend(alone, Adam(alone.params, 0.1), 40)
        assert torch.equal(leaving.x_LD[lane], alone.x_LD[0])
        for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
            assert torch.equal(one[lane], other[0])
    assert len(set(found.steps_L.tolist())) > 4


def test_a_lane_that_never_starts_stays_where_it_is() -> None:
    problem = parabolas(3)
    before = problem.x_LD.clone()
    found = descend(problem, SGD(problem.params, 0.1), 2, start=[True, False, True])
    assert found.steps_L.tolist() == [2, 0, 2]
    assert torch.equal(problem.x_LD[1], before[1])
    assert torch.equal(found.loss_L[1], found.first_L[1])
    assert not torch.equal(problem.x_LD[0], before[0])


def test_lanes_that_never_start_leave_the_batch_after_they_were_evaluated() -> None:
    problem = parabolas(8)
    first_L = problem.x_LD.square().sum(1) / 2
    found = descend(problem, SGD(problem.params, 0.1), 3, start=[lane == 5 for lane in range(8)])
    assert problem.sizes == [8, 1, 1]
    assert found.steps_L.tolist() == [0, 0, 0, 0, 0, 3, 0, 0]
    torch.testing.assert_close(found.first_L, first_L)
    torch.testing.assert_close(found.loss_L[5], first_L[5] * 0.9**4)


def test_the_last_step_may_only_evaluate() -> None:
    """Plain descent on a parabola: each update scales ``x`` by ``1 - lr``."""
    start = parabolas(2).x_LD
    for update_last, updates in ((True, 3), (False, 2)):
        problem = parabolas(2)
        found = descend(problem, SGD(problem.params, 0.1), 3, update_last=update_last)
        assert found.steps_L.tolist() == [updates] * 2
        torch.testing.assert_close(problem.x_LD, start * 0.9**updates)
        # the loss of the third evaluation, which two updates precede
        torch.testing.assert_close(found.loss_L, start.square().sum(1) / 2 * 0.9**4)


def test_the_step_size_may_change_from_step_to_step() -> None:
    problem = parabolas(2)
    start = problem.x_LD.clone()
    descend(problem, SGD(problem.params, 1.0), 3, lr=lambda step: 0.5 ** (step + 1))
    torch.testing.assert_close(problem.x_LD, start * 0.5 * 0.75 * 0.875)


def test_constraint_and_stop_after_a_step() -> None:
    class Bounded(Parabolas):
        def project(self) -> None:
            self.x_LD.clamp_(min=1.0)

        def unfinished(self, now_K: Tensor, before_K: Tensor) -> Tensor:
            asked.append(before_K.tolist())
            return (now_K - before_K).abs() > 1e-6

    asked: list[list[float]] = []
    problem = Bounded(torch.tensor([[1.0], [1.2]]), torch.zeros(2), [])
    found = descend(problem, SGD(problem.params, 0.1), 9)
    # lane 0 is held at its bound from the start: its second loss equals the first, and it stops
    # after that step
    assert found.steps_L.tolist() == [2, 4]
    assert problem.x_LD.tolist() == [[1.0], [1.0]]
    assert asked[0] == [math.inf, math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_whole_batch_stops_a_lane_whose_loss_is_not_finite(bad: float) -> None:
    x_LD = torch.tensor([[1.0], [2.0]])
    factor_L = torch.tensor([1.0, bad])
    found = descend(WholeBatch([x_LD], lambda: x_LD.square().sum(1) * factor_L), SGD([x_LD], 0.1), 4)
    assert found.steps_L.tolist() == [4, 0]
    assert x_LD[1].item() == 2.0
    assert not x_LD.requires_grad
    assert x_LD.grad is None


def test_gradients_are_off_again_after_an_error() -> None:
    x_LD = torch.ones(2, 1)

    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        descend(WholeBatch([x_LD], fail), SGD([x_LD], 0.1), 4)
    assert not x_LD.requires_grad
