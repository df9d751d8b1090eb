"""The optimisation loop of one edit call: one for all methods that optimise.

>>> problem = WholeBatch([value_LO], losses)                   # losses() gives each lane's loss, (L,)
>>> found = descend(problem, Adam([value_LO], lr=1.0), 50, pool=base.pool)
>>> found.steps_L, found.loss_L                                # value_LO has been changed in place

A :class:`Problem` defines the parameters, the loss of each lane and which lanes continue.
:func:`descend` does the rest: it keeps track of the active lanes
(:mod:`workers.inner_loop.lockstep`), of recorded steps, of the first and last losses and of the
step counts. If the problem is a :class:`DivisibleProblem`, lanes that have stopped leave the batch
once they are half of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workers.inner_loop.lockstep import Lockstep
from workers.inner_loop.optim import LaneOptimizer
from workers.kernels.cuda_graphs import Pool


class Problem(ABC):
    """The lanes of one batch: their parameters and their losses."""

    @property
    @abstractmethod
    def params(self) -> Sequence[Tensor]:
        """The parameters, each with a leading lane axis; they are changed in place."""

    @property
    def working(self) -> Sequence[Tensor]:
        """Copies of the parameters in the base's precision, if the losses are computed from them;
        else empty."""
        return ()

    @abstractmethod
    def losses(self) -> tuple[Tensor, Tensor]:
        """The loss of each lane and the lanes that make this step, (K,) each.

        A call may be recorded, so every call must run the same operations on the same tensors.
        """

    def project(self) -> None:  # noqa: B027 - most problems have no constraint
        """Bring the parameters back into the feasible set; called after each step."""

    def unfinished(self, now_K: Tensor, before_K: Tensor) -> Tensor | None:
        """The lanes that make a further step after this one, (K,); None: all of them.

        ``now_K``: the losses this step was made from; ``before_K``: those of the step before,
        infinite in the first step.
        """
        return None


class DivisibleProblem(Problem):
    """A problem that can continue with a subset of its lanes."""

    @abstractmethod
    def part(self, kept: Sequence[int]) -> Self:
        """The same problem for the lanes at indices ``kept`` of this batch, with copies of their
        parameters."""


@dataclass(frozen=True)
class WholeBatch(Problem):
    """A batch that keeps all its lanes. A lane stops only if its loss is not finite."""

    tensors: Sequence[Tensor]
    loss: Callable[[], Tensor]

    @property
    def params(self) -> Sequence[Tensor]:
        return self.tensors

    def losses(self) -> tuple[Tensor, Tensor]:
        loss_L = self.loss()
        return loss_L, torch.isfinite(loss_L)


@dataclass(frozen=True)
class Descent:
    """The result per lane, (L,): steps made, last loss, first loss."""

    steps_L: Tensor
    loss_L: Tensor
    first_L: Tensor


def descend(
    problem: Problem,
    optimizer: LaneOptimizer,
    num_steps: int,
    *,
    pool: Pool | None = None,
    start: Sequence[bool] | None = None,
    update_last: bool = True,
    lr: Callable[[int], float] | None = None,
) -> Descent:
    """Optimise the problem's parameters in place until every lane has stopped, at most
    ``num_steps`` steps.

    ``optimizer`` holds the problem's parameters and working copies. ``pool``: memory for recorded
    steps on a GPU; None: steps are not recorded. ``start``: the lanes that are optimised; None:
    all. ``update_last``: False: the last step only evaluates the losses. ``lr``: the learning rate
    as a function of the step number; None: the optimiser's own.
    """
    whole = list(problem.params)
    lanes = len(optimizer.steps_L)
    steps = Lockstep(lanes, optimizer.steps_L.device, start, pool)
    steps_L = torch.zeros_like(optimizer.steps_L)
    before_K = whole[0].new_full((lanes,), math.inf)

    def write_back() -> None:
        steps_L[steps.live] = optimizer.steps_L
        for of_all_L, of_part_K in zip(whole, problem.params, strict=True):
            if of_part_K is not of_all_L:
                of_all_L[steps.live] = of_part_K

    for step in range(num_steps):
        if isinstance(problem, DivisibleProblem) and steps.halved():
            write_back()
            kept = steps.compact()
            problem = problem.part(kept)
            optimizer = optimizer.part(kept, problem.params, problem.working)
            before_K = before_K[kept]
        if lr is not None:
            optimizer.lr = lr(step)
        trained = problem.working or problem.params
        with _training(trained):
            now_K, goes_on_K = steps.forward(problem.losses, trained)
            steps.record(now_K)
            steps.keep(goes_on_K)
            if steps.ended() or (step == num_steps - 1 and not update_last):
                break
            steps.backward()
            optimizer.step(steps.active_K, steps.moving)
        problem.project()
        unfinished_K = problem.unfinished(now_K, before_K)
        if unfinished_K is not None:
            steps.keep(unfinished_K)
            if steps.ended():
                break
        before_K = now_K
    write_back()
    return Descent(steps_L, steps.loss_L, steps.first_L)


@contextmanager
def _training(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, only the parameters require gradients; afterwards the gradients are deleted."""
    for p in params:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(False)
            p.grad = None
