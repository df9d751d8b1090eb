"""Bookkeeping of the lanes of one edit call: which ones still move, and which are left in the
batch.

>>> steps = Lockstep(lanes=8, device=base.device, pool=base.pool)
>>> for step in range(25):                  # the loop itself: workers.inner_loop.descend
...     if steps.halved():                  # half of the batch stands still: go on with the others alone
...         problem = problem.part(steps.compact())
...     now_K, goes_on_K = steps.forward(problem.losses, problem.params)  # K lanes are left in the batch
...     steps.record(now_K)
...     steps.keep(goes_on_K)
...     if steps.ended():
...         break
...     steps.backward()
...     optimizer.step(steps.active_K, steps.moving)

The stopping rule is applied on the device after every step; on a GPU its outcome is read back every
few steps only, because reading waits for the device. A lane that has stopped does not move, so
looking later changes nothing but the time. There, forward and backward are recorded in the second
step of a batch and played in the later ones (:mod:`workers.kernels.cuda_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from workers.kernels.cuda_graphs import Pool, RecordedStep

_READ_EVERY = 4
"""Steps between two looks, where looking waits for the device."""

_WORTH_HALVING = 8
"""A batch of fewer lanes is as quick as half of it."""


class Lockstep:
    """The lanes that are left in the batch (``live``, ascending), which of them move, and every
    lane's last loss."""

    def __init__(
        self, lanes: int, device: torch.device, start: Sequence[bool] | None = None, pool: Pool | None = None
    ) -> None:
        """``start``: lanes that move at all; None: all of them. ``pool``: where steps are recorded;
        None: they are not."""
        self._flags = [True] * lanes if start is None else list(start)
        self.live = list(range(lanes))
        self._live_K = torch.arange(lanes, device=device)
        self.active_K = torch.tensor(self._flags, device=device)
        self.loss_L = self.first_L = torch.zeros(lanes, device=device)
        self._every = 1 if device.type == "cpu" else _READ_EVERY
        self._step = 0
        self._pool = pool
        self._again = False
        """True once the present batch has made its first pass."""
        self._attached: Tensor | None = None
        """The losses of a pass that was not recorded, with their graph."""
        self._recorded: RecordedStep | None = None

    def forward(
        self, losses: Callable[[], tuple[Tensor, ...]], params: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The losses of the batch's lanes, (K,), and what else the function returns, without their
        graph. ``losses`` is a function of ``params`` that may be recorded: called again it computes
        the same thing from the same tensors, without asking the device."""
        if self._pool is not None and self._again:
            if self._recorded is None:
                self._recorded = RecordedStep(losses, params, self._pool)
            return self._recorded.play()
        self._again = True
        with self._aside():
            out = losses()
        self._attached = out[0]
        return tuple(t.detach() for t in out)

    def backward(self) -> None:
        """Gradients of the lanes that move, after :meth:`forward`; those of the others mean
        nothing."""
        if self._attached is not None:
            with self._aside():
                torch.where(self.active_K, self._attached, 0).sum().backward()  # type: ignore[no-untyped-call]
            self._attached = None

    def _aside(self) -> AbstractContextManager[None]:
        return nullcontext() if self._pool is None else self._pool.aside()

    def record(self, now_K: Tensor) -> None:
        """Note a step's losses, of the lanes that move."""
        if self._step == 0:
            self.loss_L = self.first_L = now_K
        else:
            now_K = torch.where(self.active_K, now_K, self.loss_L[self._live_K])
            self.loss_L = self.loss_L.index_copy(0, self._live_K, now_K)
        self._step += 1

    def keep(self, goes_on_K: Tensor) -> None:
        """Stop the lanes where ``goes_on_K`` is false (as a comparison with a loss that is not a
        number is)."""
        self.active_K = self.active_K & goes_on_K
        if self._step % self._every == 0:
            self._flags = self.active_K.tolist()

    @property
    def moving(self) -> list[int] | None:
        """The lanes of the batch that move, by their place in it; None while the device has not
        been asked."""
        return None if self._every > 1 else [k for k, moves in enumerate(self._flags) if moves]

    def ended(self) -> bool:
        """Return whether every lane is known to stand still."""
        return not any(self._flags)

    def halved(self) -> bool:
        """Return whether half of the lanes in the batch stand still, so that going on without them
        pays. Not before the first step: lanes that never move have a first loss, too."""
        return (
            self._step > 0 and len(self._flags) >= _WORTH_HALVING and 2 * sum(self._flags) <= len(self._flags)
        )

    def compact(self) -> list[int]:
        """Leave the lanes that stand still; returns which lanes of the batch, by their place in it,
        go on."""
        kept = [k for k, moves in enumerate(self._flags) if moves]
        self.live = [self.live[k] for k in kept]
        self._live_K = self._live_K[kept]
        self.active_K = self.active_K[kept]
        self._flags = [True] * len(kept)
        self._again, self._recorded = False, None
        return kept
