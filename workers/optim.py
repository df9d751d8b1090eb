"""Per-lane optimisers: lanes share one backward pass but each has its own stop.

>>> optimizer = Adam([weight_LOI], lr=1e-3)
>>> loss_L.sum().backward()              # mean within a lane, sum over lanes
>>> optimizer.step(active_L)             # a stopped lane moves neither through momentum nor through decay

The updates are torch.optim's own fused ones: one pass over memory for all lanes together.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


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
    def step(self, active_L: Tensor, moving: Sequence[int] | None = None) -> None:
        """One step of every active lane, from ``.grad``.

        ``moving``: which lanes that is, if the caller knows without asking the device; the others are then not touched. None:
        all are moved, and those that are not active put back.
        """
        self.steps_L += active_L
        before = [p.clone() for p in self.params] if moving is None else []
        lanes = range(len(self.steps_L)) if moving is None else moving
        for i, p in enumerate(self.params):
            if p.grad is None:
                raise RuntimeError("step() without a gradient: was backward() called?")
            self._update(i, _lanes(p, lanes), _lanes(p.grad, lanes), lanes)
        for p, old in zip(self.params, before, strict=False):
            p.copy_(torch.where(active_L.view(-1, *([1] * (p.dim() - 1))), p, old))

    @abstractmethod
    def _update(self, i: int, params: list[Tensor], grads: list[Tensor], lanes: Sequence[int]) -> None:
        """Move ``lanes`` of parameter ``i``, in place."""

    def part(self, lane_K: Sequence[int], params: Sequence[Tensor]) -> LaneOptimizer:
        """The optimiser of some of the lanes, going on with ``params``."""
        other = copy.copy(self)
        other.params = list(params)
        other.steps_L = self.steps_L[list(lane_K)]
        return other


class SGD(LaneOptimizer):
    """Plain gradient descent with L2 decay added to the gradient (torch.optim.SGD without momentum)."""

    def _update(self, i: int, params: list[Tensor], grads: list[Tensor], lanes: Sequence[int]) -> None:
        sgd(
            params,
            grads,
            [None] * len(params),
            fused=True,
            weight_decay=self.weight_decay,
            momentum=0.0,
            lr=self.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class Adam(LaneOptimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1) with L2 decay added to the gradient, as torch.optim.Adam."""

    decoupled = False

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self._m = [torch.zeros_like(p) for p in self.params]
        self._v = [torch.zeros_like(p) for p in self.params]
        self._count = [torch.zeros(p.shape[0], dtype=torch.float32, device=p.device) for p in self.params]

    def _update(self, i: int, params: list[Tensor], grads: list[Tensor], lanes: Sequence[int]) -> None:
        adam(
            params,
            grads,
            _lanes(self._m[i], lanes),
            _lanes(self._v[i], lanes),
            [],
            _lanes(self._count[i], lanes),
            fused=True,
            amsgrad=False,
            decoupled_weight_decay=self.decoupled,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def part(self, lane_K: Sequence[int], params: Sequence[Tensor]) -> LaneOptimizer:
        other = super().part(lane_K, params)
        assert isinstance(other, Adam)
        kept = list(lane_K)
        for name in ("_m", "_v", "_count"):
            setattr(other, name, [t[kept] for t in getattr(self, name)])
        return other


class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), as torch.optim.AdamW."""

    decoupled = True


def _lanes(tensor: Tensor, lanes: Sequence[int]) -> list[Tensor]:
    """Views of some lanes: the fused kernels take all of them in one call."""
    views = tensor.unbind(0)
    return list(views) if len(lanes) == len(views) else [views[lane] for lane in lanes]
