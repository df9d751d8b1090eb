"""Training dense copies of linear maps on requests, lane by lane: what FT and its relatives share.

>>> problem = Problem.of(base, overlay, requests, with_target)
>>> found = descend(base, overlay, problem, num_steps=25, lr=1e-3)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from workers.inner_loop.lockstep import Lockstep
from workers.inner_loop.losses import TargetTokens
from workers.inner_loop.optim import Adam, Box, LaneOptimizer
from workers.inner_loop.suffix import Suffix
from workers.model.batch import Batch, Encoded, collate
from workers.model.overlay import DenseOverlay
from workers.types import EditRequest

if TYPE_CHECKING:
    from workers.model.base import BaseModel

STOP_LOSS = 1e-2
"""A lane whose loss is below this makes no further step (the public code's constant)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One request as a row: the tokens to run, the target tokens to score, and where the first of them is read.

    Each further token is read ``step`` positions later.
    """

    encoded: Encoded
    target: tuple[int, ...]
    read: int
    step: int = 1


def with_target(base: BaseModel, request: EditRequest) -> Example:
    """Every target token, given the prompt and the target tokens before it."""
    pair = base.encoder.pair(request.prompt, request.target_new)  # says so if the target adds no token
    # the last token predicts nothing that is scored
    return Example(Encoded(pair.ids[:-1], pair.prompt_len), pair.target, pair.prompt_len - 1)


def batch(
    base: BaseModel, lanes: Sequence[Sequence[EditRequest]], example: Callable[[BaseModel, EditRequest], Example]
) -> tuple[Batch, TargetTokens]:
    """The rows of all lanes' requests; losses are the mean over a request's tokens, then over a lane's requests."""
    encoded: list[Encoded] = []
    lane_B: list[int] = []
    places: list[tuple[int, int, int, float]] = []
    for lane, requests in enumerate(lanes):
        for request in requests:
            made = example(base, request)
            share = 1 / (len(made.target) * len(requests))
            places += [(len(encoded), made.read + j * made.step, token, share) for j, token in enumerate(made.target)]
            encoded.append(made.encoded)
            lane_B.append(lane)
    rows = collate(encoded, lane_B, base.encoder.pad_id, base.device)
    return rows, TargetTokens.of(rows, places, len(lanes))


@dataclass(frozen=True)
class Problem:
    """The lanes in one batch: what they train, and how their losses are found."""

    overlay: DenseOverlay
    suffix: Suffix
    targets: TargetTokens

    @classmethod
    def of(
        cls,
        base: BaseModel,
        overlay: DenseOverlay,
        lanes: Sequence[Sequence[EditRequest]],
        example: Callable[[BaseModel, EditRequest], Example],
    ) -> Self:
        rows, targets = batch(base, lanes, example)
        lowest = min(overlay.sites, key=lambda site: site.layer)
        return cls(overlay, Suffix.capture(base, lowest, rows, targets.reads), targets)

    @property
    def weights(self) -> list[Tensor]:
        return list(self.overlay.weights_LOI.values())

    @property
    def working(self) -> list[Tensor]:
        """Their copies in the base's precision, if these are what answers."""
        return list(self.overlay.working_LOI.values())

    @property
    def trained(self) -> list[Tensor]:
        """What gets the gradients."""
        return self.working or self.weights

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, gradients flow to the weights and to nothing else; afterwards there are none."""
        for weight_KOI in self.trained:
            weight_KOI.requires_grad_(True)
        try:
            yield
        finally:
            for weight_KOI in self.trained:
                weight_KOI.requires_grad_(False)
                weight_KOI.grad = None

    def loss(self, base: BaseModel) -> Tensor:
        """Each lane's loss, (K,)."""
        with self.overlay.installed(self.suffix.rows):
            return self.targets.nll(base, self.suffix.hidden())

    def part(self, kept: Sequence[int]) -> Problem:
        rows, row_B = self.suffix.rows.part(kept)
        targets, read_P = self.targets.part(kept, row_B)
        return Problem(self.overlay.part(kept), self.suffix.part(row_B, rows, read_P), targets)

    def write_back(self, overlay: DenseOverlay, lanes: Sequence[int]) -> None:
        """Copy the trained weights into the overlay of all lanes."""
        if self.overlay is not overlay:
            for name, weight_KOI in self.overlay.weights_LOI.items():
                overlay.weights_LOI[name][list(lanes)] = weight_KOI


@dataclass(frozen=True)
class Descent:
    """How it went, per lane: steps made, the last and the first loss."""

    steps_L: Tensor
    loss_L: Tensor
    first_L: Tensor


def descend(
    base: BaseModel,
    overlay: DenseOverlay,
    problem: Problem,
    num_steps: int,
    lr: float,
    weight_decay: float = 0.0,
    boxes: Sequence[Box] = (),
    penalty: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Descent:
    """Train the overlay's weights with Adam until a lane's loss is below :data:`STOP_LOSS` or the steps are spent.

    ``boxes``: how far each weight may go. ``penalty``: what is added to the lanes' losses, (K,), given the weights (K lanes); it
    has no say in when to stop.
    """
    overlay.touch(range(overlay.lanes))
    # where one pass moves the masters and renews narrower copies, no other pass only casts
    copies = base.compiled.updates and base.dtype != base.master_dtype and penalty is None
    with overlay.working(base.dtype) if copies else nullcontext():
        return _descend(base, overlay, problem, num_steps, lr, weight_decay, boxes, penalty)


def _descend(
    base: BaseModel,
    overlay: DenseOverlay,
    problem: Problem,
    num_steps: int,
    lr: float,
    weight_decay: float,
    boxes: Sequence[Box],
    penalty: Callable[[Sequence[Tensor]], Tensor] | None,
) -> Descent:
    optimizer: LaneOptimizer = Adam(problem.weights, lr, weight_decay, boxes, base.compiled, problem.working)
    steps = Lockstep(overlay.lanes, base.device, pool=base.pool)
    steps_L = torch.zeros(overlay.lanes, dtype=torch.long, device=base.device)

    def losses() -> tuple[Tensor, Tensor]:
        now_K = problem.loss(base)
        goes_on_K = now_K.detach() >= STOP_LOSS
        return (now_K if penalty is None else now_K + penalty(problem.weights)), goes_on_K

    for _ in range(num_steps):
        if steps.halved():
            steps_L[steps.live] = optimizer.steps_L
            problem.write_back(overlay, steps.live)
            kept = steps.compact()
            problem = problem.part(kept)
            optimizer = optimizer.part(kept, problem.weights, problem.working)
        with problem.training():
            now_K, goes_on_K = steps.forward_all(losses, problem.trained)
            steps.record(now_K)
            steps.keep(goes_on_K)
            if steps.ended():
                break
            steps.backward()
            optimizer.step(steps.active_K, steps.moving)
    steps_L[steps.live] = optimizer.steps_L
    problem.write_back(overlay, steps.live)
    return Descent(steps_L, steps.loss_L, steps.first_L)
