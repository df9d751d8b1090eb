"""Per-lane optimisers: lanes share one backward pass but each has its own moments, step count and stop.

>>> optimizer = Adam([weight_LOI], lr=1e-3)
>>> loss_L.sum().backward()              # mean within a lane, sum over lanes
>>> optimizer.step(active_L)             # a stopped lane moves neither through momentum nor through decay

With one lane the updates are torch.optim's, up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class LaneOptimizer(ABC):
    """Updates parameters that carry a leading lane axis, in place, only where a lane is active."""

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        self.params = list(params)
        self.lr = lr
        self.weight_decay = weight_decay
        lanes, device = self.params[0].shape[0], self.params[0].device
        self.steps_L = torch.zeros(lanes, dtype=torch.long, device=device)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, active_L: Tensor) -> None:
        """One step of every active lane, from ``.grad``."""
        self.steps_L += active_L
        for i, p in enumerate(self.params):
            if p.grad is None:
                raise RuntimeError("step() without a gradient: was backward() called?")
            moved = self._update(i, p, p.grad, _as(self.steps_L, p), _as(active_L, p))
            p.copy_(torch.where(_as(active_L, p), moved, p))

    @abstractmethod
    def _update(self, i: int, p: Tensor, grad: Tensor, steps: Tensor, active: Tensor) -> Tensor:
        """The new value of parameter ``i``; its own state may change only where ``active``."""


class SGD(LaneOptimizer):
    """Plain gradient descent with L2 decay added to the gradient (torch.optim.SGD without momentum)."""

    def _update(self, i: int, p: Tensor, grad: Tensor, steps: Tensor, active: Tensor) -> Tensor:
        if self.weight_decay:
            grad = grad + self.weight_decay * p
        return p - self.lr * grad


class Adam(LaneOptimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1) with L2 decay added to the gradient, as torch.optim.Adam."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.betas = betas
        self.eps = eps
        self._m = [torch.zeros_like(p) for p in self.params]
        self._v = [torch.zeros_like(p) for p in self.params]

    def _update(self, i: int, p: Tensor, grad: Tensor, steps: Tensor, active: Tensor) -> Tensor:
        if self.weight_decay and not isinstance(self, AdamW):
            grad = grad + self.weight_decay * p
        beta1, beta2 = self.betas
        m = torch.lerp(self._m[i], grad, 1 - beta1)
        v = self._v[i] * beta2 + (1 - beta2) * grad.square()
        self._m[i] = torch.where(active, m, self._m[i])
        self._v[i] = torch.where(active, v, self._v[i])
        count = steps.clamp_min(1).to(p.dtype)
        step_size = self.lr / (1 - beta1**count)
        denom = v.sqrt() / (1 - beta2**count).sqrt() + self.eps
        return self._decayed(p) - step_size * m / denom

    def _decayed(self, p: Tensor) -> Tensor:
        return p


class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), as torch.optim.AdamW."""

    def _decayed(self, p: Tensor) -> Tensor:
        return p * (1 - self.lr * self.weight_decay)


def _as(value_L: Tensor, like: Tensor) -> Tensor:
    """Reshape a per-lane vector so that it broadcasts over a parameter."""
    return value_L.view(-1, *([1] * (like.dim() - 1)))
