"""Gradient descent inside the masks of WISE's side memories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from workers.inner_loop.descend import Problem
from workers.inner_loop.optim import SGD, gradient
from workers.kernels.compiled import Compiled
from workers.methods.wise.config import WISEConfig


def masked_descent(
    delta_KOI: Tensor,
    grad_KOI: Tensor,
    working_KOI: Tensor | None,
    weight_OI: Tensor,
    mask_KOI: Tensor,
    active_K11: Tensor,
    lr: float,
    weight_decay: float,
    bound: float,
) -> None:
    """One step of gradient descent inside the masks of the active lanes, decay included, then
    clamped to the box, in place. ``working`` becomes a copy of the result."""
    step_KOI = grad_KOI.to(delta_KOI.dtype) + weight_decay * (weight_OI.to(delta_KOI.dtype) + delta_KOI)
    moved_KOI = (delta_KOI - lr * torch.where(mask_KOI, step_KOI, 0)).clamp(-bound, bound)
    moved_KOI = torch.where(active_K11, moved_KOI, delta_KOI)
    delta_KOI.copy_(moved_KOI)
    if working_KOI is not None:
        working_KOI.copy_(moved_KOI)


class MaskedSGD(SGD):
    """Gradient descent of each memory inside its mask (decay included, unless ``public_decay``),
    then clamped to the box."""

    def __init__(
        self,
        config: WISEConfig,
        weight_OI: Tensor,
        mask_LOI: Tensor,
        problem: Problem,
        compiled: Compiled | None,
    ) -> None:
        """``mask_LOI``: booleans. ``compiled``: makes a step in one pass over memory, see
        :meth:`in_one_pass`; None: one pass per operation."""
        super().__init__(problem.params, config.lr)
        self.working = list(problem.working)
        self._config, self._weight_OI, self._compiled = config, weight_OI, compiled
        self._mask_KOI = mask_LOI if compiled is not None else mask_LOI.to(self.params[0].dtype)

    @staticmethod
    def in_one_pass(config: WISEConfig, compiled: Compiled) -> bool:
        """Return whether a compiled step supports the configuration."""
        return compiled.updates and not config.deviations.public_decay and config.activation != "public"

    @torch.no_grad()
    def step(self, active_L: Tensor, moving: Sequence[int] | None = None) -> None:
        if self._compiled is not None:
            super().step(active_L, moving)
            return
        config, delta_KOI, mask_KOI = self._config, self.params[0], self._mask_KOI
        grad_KOI = gradient(delta_KOI)
        if config.deviations.public_decay:
            grad_KOI.mul_(mask_KOI)
        if config.weight_decay:
            weight_OI = self._weight_OI.to(delta_KOI.dtype)
            grad_KOI.add_(weight_OI, alpha=config.weight_decay).add_(delta_KOI, alpha=config.weight_decay)
        if not config.deviations.public_decay:
            grad_KOI.mul_(mask_KOI)
        super().step(active_L, moving)
        if config.norm_constraint is not None:
            delta_KOI.clamp_(-config.norm_constraint, config.norm_constraint)

    def _step_in_one_pass(self, active_L: Tensor) -> bool:
        if self._compiled is None:
            return False
        config, delta_KOI = self._config, self.params[0]
        working_KOI = self.working[0] if self.working else None
        grad_KOI = gradient(delta_KOI if working_KOI is None else working_KOI)
        bound = float("inf") if config.norm_constraint is None else config.norm_constraint
        move = self._compiled.update(masked_descent)
        for at in self._compiled.turns(len(active_L)):
            copy_KOI = None if working_KOI is None else working_KOI.detach()[at]
            where = (self._weight_OI, self._mask_KOI[at], active_L[at, None, None])
            move(
                delta_KOI.detach()[at], grad_KOI[at], copy_KOI, *where, config.lr, config.weight_decay, bound
            )
        return True

    def part(self, lane_K: Sequence[int], params: Sequence[Tensor], working: Sequence[Tensor] = ()) -> Self:
        other = super().part(lane_K, params, working)
        other._mask_KOI = self._mask_KOI[list(lane_K)]
        return other
