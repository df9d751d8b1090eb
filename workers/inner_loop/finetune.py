"""Training of dense copies of linear maps on requests, lane by lane; shared by FT and its variants.

>>> found = fine_tune(base, overlay, requests, with_target, num_steps=25, lr=1e-3)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from torch import Tensor

from workers.data.scripts import joiner_of
from workers.inner_loop.descend import Descent, DivisibleProblem, descend
from workers.inner_loop.losses import TargetTokens
from workers.inner_loop.optim import Adam, Box
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
    """One request as a row: its tokens and its target tokens.

    ``read`` is the position whose logits predict the first target token; each further one is
    predicted ``step`` positions later.
    """

    encoded: Encoded
    target: tuple[int, ...]
    read: int
    step: int = 1


def with_target(base: BaseModel, request: EditRequest) -> Example:
    """Every target token, given the prompt and the target tokens before it."""
    joiner = joiner_of(request, request.prompt)
    # raises if the target adds no token
    pair = base.encoder.pair(request.prompt, request.target_new, joiner)
    # the last token predicts nothing that is scored
    return Example(Encoded(pair.ids[:-1], pair.prompt_len), pair.target, pair.prompt_len - 1)


def collate_requests(
    base: BaseModel,
    lanes: Sequence[Sequence[EditRequest]],
    example: Callable[[BaseModel, EditRequest], Example],
) -> tuple[Batch, TargetTokens]:
    """The batch of all lanes' requests and its target tokens. A lane's loss is the mean over a
    request's tokens, then over the lane's requests."""
    encoded: list[Encoded] = []
    lane_B: list[int] = []
    places: list[tuple[int, int, int, float]] = []
    for lane, requests in enumerate(lanes):
        for request in requests:
            made = example(base, request)
            share = 1 / (len(made.target) * len(requests))
            places += [
                (len(encoded), made.read + j * made.step, token, share) for j, token in enumerate(made.target)
            ]
            encoded.append(made.encoded)
            lane_B.append(lane)
    batch = collate(encoded, lane_B, base.encoder.pad_id, base.device)
    return batch, TargetTokens.of(batch, places, len(lanes))


@dataclass(frozen=True)
class DenseProblem(DivisibleProblem):
    """Dense copies of some linear maps, one per lane. A lane stops once its loss is below
    :data:`STOP_LOSS`."""

    base: BaseModel
    overlay: DenseOverlay
    suffix: Suffix
    targets: TargetTokens
    penalty: Callable[[Sequence[Tensor]], Tensor] | None

    @classmethod
    def of(
        cls,
        base: BaseModel,
        overlay: DenseOverlay,
        lanes: Sequence[Sequence[EditRequest]],
        example: Callable[[BaseModel, EditRequest], Example],
        penalty: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> Self:
        batch, targets = collate_requests(base, lanes, example)
        lowest = min(overlay.sites, key=lambda site: site.layer)
        return cls(base, overlay, Suffix.capture(base, lowest, batch, targets.reads), targets, penalty)

    @property
    def params(self) -> list[Tensor]:
        return list(self.overlay.weights_LOI.values())

    @property
    def working(self) -> list[Tensor]:
        return list(self.overlay.working_LOI.values())

    def losses(self) -> tuple[Tensor, Tensor]:
        with self.overlay.installed(self.suffix.batch):
            loss_K = self.targets.nll(self.base, self.suffix.hidden())
        goes_on_K = loss_K.detach() >= STOP_LOSS
        return (loss_K if self.penalty is None else loss_K + self.penalty(self.params)), goes_on_K

    def part(self, kept: Sequence[int]) -> Self:
        batch, row_B = self.suffix.batch.part(kept)
        targets, read_P = self.targets.part(kept, row_B)
        suffix = self.suffix.part(row_B, batch, read_P)
        return replace(self, overlay=self.overlay.part(kept), suffix=suffix, targets=targets)


def fine_tune(
    base: BaseModel,
    overlay: DenseOverlay,
    lanes: Sequence[Sequence[EditRequest]],
    example: Callable[[BaseModel, EditRequest], Example],
    *,
    num_steps: int,
    lr: float,
    weight_decay: float = 0.0,
    boxes: Sequence[Box] = (),
    penalty: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Descent:
    """Train the overlay's weights with Adam on each lane's requests until the lane's loss is below
    :data:`STOP_LOSS`, at most ``num_steps`` steps.

    ``boxes``: the range of each weight. ``penalty``: a function of the weights (K lanes) that is
    added to the lanes' losses, (K,); the stopping rule ignores it.
    """
    problem = DenseProblem.of(base, overlay, lanes, example, penalty)
    overlay.touch(range(overlay.lanes))
    # a compiled update writes weights and their narrower copies in one pass over memory, so the
    # forward needs no extra pass to cast them
    copies = base.compiled.updates and base.dtype != base.master_dtype and penalty is None
    with overlay.working(base.dtype) if copies else nullcontext():
        optimizer = Adam(problem.params, lr, weight_decay, boxes, base.compiled, problem.working)
        return descend(problem, optimizer, num_steps, pool=base.pool)
