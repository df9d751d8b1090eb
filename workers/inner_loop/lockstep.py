"""Bookkeeping of the lanes of one edit call: which are active, and which are left in the batch.

>>> steps = Lockstep(lanes=8, device=base.device, pool=base.pool)
>>> for step in range(25):                  # the loop itself: workers.inner_loop.descend
...     if steps.halved():                  # half of the batch has stopped: continue with the rest
...         problem = problem.part(steps.compact())
...     now_K, goes_on_K = steps.forward(problem.losses, problem.params)  # K lanes are left in the batch
...     steps.record(now_K)
...     steps.keep(goes_on_K)
...     if steps.ended():
...         break
...     steps.backward()
...     optimizer.step(steps.active_K, steps.moving)

The stopping rule is applied on the device after every step. On a GPU its result is read back only
every few steps, because reading waits for the device. A stopped lane is not updated, so reading
later changes the run time and no result. On a GPU, forward and backward are recorded in the second
step of a batch and replayed in later steps (:mod:`workers.kernels.cuda_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from workers.kernels.cuda_graphs import Pool, RecordedStep

_READ_EVERY = 4
"""Steps between two reads of the stopping rule where a read waits for the device."""

_WORTH_HALVING = 8
"""A batch with fewer lanes takes as long as half of it."""


class Lockstep:
    """The lanes left in the batch (``live``, ascending), which of them are active, and every lane's
    last loss."""

    def __init__(
        self, lanes: int, device: torch.device, start: Sequence[bool] | None = None, pool: Pool | None = None
    ) -> None:
        """``start``: the lanes that are optimised; None: all. ``pool``: memory for recorded steps;
        None: steps are not recorded."""
        self._flags = [True] * lanes if start is None else list(start)
        self.live = list(range(lanes))
        self._live_K = torch.arange(lanes, device=device)
        self.active_K = torch.tensor(self._flags, device=device)
        self.loss_L = self.first_L = torch.zeros(lanes, device=device)
        self._every = 1 if device.type == "cpu" else _READ_EVERY
        self._step = 0
        self._pool = pool
        self._again = False
        """True after the first forward of the current batch."""
        self._attached: Tensor | None = None
        """The losses of a forward that was not recorded, with their autograd graph."""
        self._recorded: RecordedStep | None = None

    def forward(
        self, losses: Callable[[], tuple[Tensor, ...]], params: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The losses of the batch's lanes, (K,), and the function's other results, detached.
        ``losses`` may be recorded: every call must run the same operations on the same tensors,
        without waiting for the device."""
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
        """Gradients of the active lanes, after :meth:`forward`; those of the other lanes are
        undefined."""
        if self._attached is not None:
            with self._aside():
                torch.where(self.active_K, self._attached, 0).sum().backward()  # type: ignore[no-untyped-call]
            self._attached = None

    def _aside(self) -> AbstractContextManager[None]:
        return nullcontext() if self._pool is None else self._pool.aside()

    def record(self, now_K: Tensor) -> None:
        """Store a step's losses, (K,), of the active lanes."""
        if self._step == 0:
            self.loss_L = self.first_L = now_K
        else:
            now_K = torch.where(self.active_K, now_K, self.loss_L[self._live_K])
            self.loss_L = self.loss_L.index_copy(0, self._live_K, now_K)
        self._step += 1

    def keep(self, goes_on_K: Tensor) -> None:
        """Stop the lanes where ``goes_on_K`` is false. A comparison with a NaN loss is false,
        too."""
        self.active_K = self.active_K & goes_on_K
        if self._step % self._every == 0:
            self._flags = self.active_K.tolist()

    @property
    def moving(self) -> list[int] | None:
        """Indices in the batch of its active lanes; None where reading them would wait for the
        device."""
        return None if self._every > 1 else [k for k, moves in enumerate(self._flags) if moves]

    def ended(self) -> bool:
        """Return whether all lanes are known to have stopped."""
        return not any(self._flags)

    def halved(self) -> bool:
        """Return whether at least half of the batch's lanes have stopped, so that removing them
        saves time. False before the first step, because lanes that never start need a first loss,
        too."""
        return (
            self._step > 0 and len(self._flags) >= _WORTH_HALVING and 2 * sum(self._flags) <= len(self._flags)
        )

    def compact(self) -> list[int]:
        """Remove the stopped lanes; return the indices in the batch of those that continue."""
        kept = [k for k, moves in enumerate(self._flags) if moves]
        self.live = [self.live[k] for k in kept]
        self._live_K = self._live_K[kept]
        self.active_K = self.active_K[kept]
        self._flags = [True] * len(kept)
        self._again, self._recorded = False, None
        return kept
