"""Per-lane optimisers: lanes share one backward pass, but each lane stops by itself.

>>> optimizer = Adam([weight_LOI], lr=1e-3)
>>> loss_L.sum().backward()              # mean within a lane, sum over lanes
>>> optimizer.step(active_L)  # momentum and decay do not change a stopped lane

The updates are torch.optim's fused ones: one pass over memory for all lanes. Where functions are
compiled, Adam uses :func:`adam_in_box`, which also skips stopped lanes and clamps to the box in the
same pass.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from workers.kernels.compiled import Compiled

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's usual constants."""


class Box:
    """Limit of a parameter: at most ``bound`` from ``centre``, (O, I) for all lanes or (L, O, I).
    The centre may be a base weight in lower precision."""

    def __init__(self, centre: Tensor, bound: float) -> None:
        self.centre = centre
        self.bound = bound

    @cached_property
    def _limits(self) -> tuple[Tensor, Tensor]:
        centre = self.centre.to(torch.promote_types(self.centre.dtype, torch.float32))
        return centre - self.bound, centre + self.bound

    def clamp_(self, p: Tensor) -> None:
        """Clamp the parameter to the box, in place."""
        p.clamp_(*self._limits)

    def part(self, lanes: Sequence[int]) -> Box:
        return Box(self.centre[list(lanes)], self.bound) if self.centre.dim() == 3 else self


class LaneOptimizer(ABC):
    """Updates parameters that carry a leading lane axis, in place, only where a lane is active."""

    def __init__(
        self, params: Sequence[Tensor], lr: float, weight_decay: float = 0.0, boxes: Sequence[Box] = ()
    ) -> None:
        """``boxes``: one per parameter, or empty."""
        self.params = list(params)
        self.working: list[Tensor] = []
        self.boxes = list(boxes)
        self.lr = lr
        self.weight_decay = weight_decay
        lanes, device = self.params[0].shape[0], self.params[0].device
        self.steps_L = torch.zeros(lanes, dtype=torch.long, device=device)

    def zero_grad(self) -> None:
        for p in (*self.params, *self.working):
            p.grad = None

    @torch.no_grad()
    def step(self, active_L: Tensor, moving: Sequence[int] | None = None) -> None:
        """One step of every active lane, from ``.grad``.

        ``moving``: indices of the active lanes, if the caller knows them without waiting for the
        device; other lanes are then not touched. None: all lanes are updated, and inactive ones are
        restored.
        """
        self.steps_L += active_L
        if self._step_in_one_pass(active_L):
            return
        before = [p.clone() for p in self.params] if moving is None else []
        lanes = range(len(self.steps_L)) if moving is None else moving
        for i, p in enumerate(self.params):
            self._update(i, _lanes(p, lanes), _lanes(gradient(p), lanes), lanes)
        for p, box in zip(self.params, self.boxes, strict=False):
            box.clamp_(p)
        for p, old in zip(self.params, before, strict=False):
            p.copy_(torch.where(active_L.view(-1, *([1] * (p.dim() - 1))), p, old))

    def _step_in_one_pass(self, active_L: Tensor) -> bool:
        """Update all active lanes in one pass over memory; return False if this optimiser has no
        such update."""
        return False

    @abstractmethod
    def _update(self, i: int, params: list[Tensor], grads: list[Tensor], lanes: Sequence[int]) -> None:
        """Update ``lanes`` of parameter ``i``, in place."""

    def part(self, lane_K: Sequence[int], params: Sequence[Tensor], working: Sequence[Tensor] = ()) -> Self:
        """The optimiser of some lanes, which continues with ``params`` and, if used, their
        ``working`` copies."""
        other = copy.copy(self)
        other.params, other.working = list(params), list(working)
        other.steps_L = self.steps_L[list(lane_K)]
        other.boxes = [box.part(lane_K) for box in self.boxes]
        return other


class SGD(LaneOptimizer):
    """Plain gradient descent with L2 decay added to the gradient (torch.optim.SGD without
    momentum)."""

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
    """Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1) with L2 decay added to the gradient, as
    torch.optim.Adam."""

    decoupled = False

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        boxes: Sequence[Box] = (),
        compiled: Compiled | None = None,
        working: Sequence[Tensor] = (),
    ) -> None:
        """``compiled``: for parameters so large that passes over memory take most of the time.
        ``working``: with it, copies of the parameters in lower precision, which have the gradients;
        each step updates them."""
        super().__init__(params, lr, weight_decay, boxes)
        self.working = list(working)
        self._compiled = compiled if compiled is not None and compiled.updates else None
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
            beta1=BETA1,
            beta2=BETA2,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=EPS,
            maximize=False,
        )

    def _step_in_one_pass(self, active_L: Tensor) -> bool:
        if self._compiled is None or self.decoupled:
            return False
        update = self._compiled.update(adam_in_box)
        for i, p in enumerate(self.params):
            count_L = self._count[i].add_(active_L)
            first_L11, second_L11 = ((1 - beta**count_L)[:, None, None] for beta in (BETA1, BETA2))
            working = self.working[i] if self.working else None
            box = self.boxes[i] if self.boxes else Box(p.new_zeros(1), float("inf"))
            for at in self._compiled.turns(len(active_L)):
                update(
                    p.detach()[at],
                    gradient(p if working is None else working)[at],
                    self._m[i][at],
                    self._v[i][at],
                    None if working is None else working.detach()[at],
                    active_L[at, None, None],
                    first_L11[at],
                    second_L11[at],
                    box.centre[at] if box.centre.dim() == 3 else box.centre,
                    self.lr,
                    self.weight_decay,
                    box.bound,
                )
        return True

    def part(self, lane_K: Sequence[int], params: Sequence[Tensor], working: Sequence[Tensor] = ()) -> Self:
        other = super().part(lane_K, params, working)
        kept = list(lane_K)
        for name in ("_m", "_v", "_count"):
            setattr(other, name, [t[kept] for t in getattr(self, name)])
        return other


def adam_in_box(
    p_LOI: Tensor,
    grad_LOI: Tensor,
    m_LOI: Tensor,
    v_LOI: Tensor,
    working_LOI: Tensor | None,
    active_L11: Tensor,
    correct1_L11: Tensor,
    correct2_L11: Tensor,
    centre: Tensor,
    lr: float,
    weight_decay: float,
    bound: float,
) -> None:
    """One step of Adam for the active lanes, in place, then clamped to ``bound`` around ``centre``.
    ``correct1``, ``correct2``: the bias corrections ``1 - beta^t``. ``working`` becomes a copy of
    the result."""
    grad_LOI = grad_LOI.to(p_LOI.dtype) + weight_decay * p_LOI
    m_new_LOI = m_LOI + (1 - BETA1) * (grad_LOI - m_LOI)
    v_new_LOI = BETA2 * v_LOI + (1 - BETA2) * grad_LOI * grad_LOI
    step_LOI = (m_new_LOI / correct1_L11) / ((v_new_LOI / correct2_L11).sqrt() + EPS)
    centre = centre.to(p_LOI.dtype)
    moved_LOI = (p_LOI - lr * step_LOI).clamp(centre - bound, centre + bound)
    moved_LOI = torch.where(active_L11, moved_LOI, p_LOI)
    p_LOI.copy_(moved_LOI)
    if working_LOI is not None:
        working_LOI.copy_(moved_LOI)
    m_LOI.copy_(torch.where(active_L11, m_new_LOI, m_LOI))
    v_LOI.copy_(torch.where(active_L11, v_new_LOI, v_LOI))


class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), as torch.optim.AdamW."""

    decoupled = True


def gradient(p: Tensor) -> Tensor:
    """A parameter's gradient. Raises RuntimeError if there is none."""
    if p.grad is None:
        raise RuntimeError("no gradient: was backward() called?")
    return p.grad


def _lanes(tensor: Tensor, lanes: Sequence[int]) -> list[Tensor]:
    """Views of some lanes: the fused kernels take all of them in one call."""
    views = tensor.unbind(0)
    return list(views) if len(lanes) == len(views) else [views[lane] for lane in lanes]
