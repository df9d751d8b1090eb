"""Overlays: everything a method adds to the base model, one copy per lane. Base weights never
change.

>>> overlay = DenseOverlay(site, lanes=8)
>>> with overlay.installed(batch):                  # the edited map uses the lane of each row
...     hidden = base.hidden_states(batch)
>>> saved = overlay.state(3)                       # snapshot of lane 3: only what edits touched
>>> overlay = DenseOverlay(site, lanes=8)          # rollback: a new overlay; nothing to undo

Invariant (tested): the base model's bytes and module tree are the same before, during and after.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.kernels.matmul import lane_products, linear, product_into
from workers.model.batch import Batch
from workers.model.replay import ABOVE, override_forward
from workers.types import JSON

if TYPE_CHECKING:
    from workers.model.base import BaseModel, Site


@dataclass(frozen=True)
class LaneState:
    """The snapshot of one lane: named tensors and a JSON value. Independent copies, safe to
    keep."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, JSON] = field(default_factory=dict)


class Overlay(ABC):
    """Edits of ``lanes`` independent lanes at one or more linear maps of the shared base."""

    def __init__(self, sites: Sequence[Site], lanes: int) -> None:
        self.sites = tuple(sites)
        self.lanes = lanes
        self._seen: list[dict[str, int]] = [{} for _ in range(lanes)]

    @property
    def first_layer(self) -> int:
        """The lowest decoder layer whose output an edit can change; replay starts here. Without a
        site: ``ABOVE``."""
        return min((site.layer for site in self.sites), default=ABOVE)

    @property
    def inert(self) -> bool:
        """True if no edit changes an output of the base model. The edited model is then not run at
        all."""
        return False

    @abstractmethod
    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        """Return the output of the edited linear map, (B, S, O). ``batch`` gives each row's lane
        and the end of its prompt."""

    @abstractmethod
    def tensors(self, lane: int) -> dict[str, Tensor]:
        """One lane's state by name, as it lies in memory: no copies. Empty for a pristine lane."""

    def meta(self, lane: int) -> dict[str, JSON]:
        """What else belongs to one lane's state."""
        return {}

    def state(self, lane: int) -> LaneState:
        """Snapshot of one lane. Restoring it elsewhere continues bit-identically."""
        copies = {name: t.detach().clone() for name, t in self.tensors(lane).items()}
        return LaneState(copies, self.meta(lane))

    @abstractmethod
    def load_state(self, lane: int, state: LaneState) -> None:
        """Restore a snapshot taken from an overlay of the same construction."""

    @abstractmethod
    def delta_norm(self, lane: int) -> float | None:
        """Relative Frobenius norm of the weight change, ``||W' - W|| / ||W||``; None where no
        weight is changed."""

    @property
    def replays(self) -> bool:
        """True if the layers from :attr:`first_layer` on, run on the pristine base's activations,
        give the edited output. False if an edit changes the input tokens; such an overlay overrides
        :meth:`hidden_states`."""
        return True

    def hidden_states(self, base: BaseModel, batch: Batch) -> Tensor:
        """The edited model's hidden states after the final norm, (B, S, D), for the columns of
        ``batch``."""
        with self.installed(batch):
            return base.hidden_states(batch)

    def logits(
        self, base: BaseModel, hidden_PD: Tensor, batch: Batch, row_P: Sequence[int], column_P: Sequence[int]
    ) -> Tensor:
        """The edited model's logits (P, V) at some positions of ``batch``, from its hidden states
        there."""
        return base.logits(hidden_PD)

    @contextmanager
    def installed(self, batch: Batch) -> Iterator[None]:
        """Inside the ``with``, the edited maps compute this overlay's :meth:`forward`; afterwards
        the modules are restored."""
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(override_forward(site.module, partial(self._forward_at, site, batch)))
            yield

    def _forward_at(self, site: Site, batch: Batch, x_BSI: Tensor) -> Tensor:
        return self.forward(site, x_BSI, batch)

    def changed(self, lane: int) -> Iterable[Tensor]:
        """The tensors, or their parts, that may differ from those of the last call: by default the
        whole state. An overlay whose state grows gives what is new (see :meth:`_since`)."""
        return self.tensors(lane).values()

    def _since(self, lane: int, name: str, grown: Tensor, dim: int = 0) -> Tensor:
        """The end of a tensor that only grows, from its size at the last call on. Where a snapshot
        is restored, ``self._seen[lane]`` is cleared."""
        seen, size = self._seen[lane].get(name, 0), grown.shape[dim]
        self._seen[lane][name] = size
        start = seen if seen <= size else 0
        return grown.narrow(dim, start, size - start)

    def finite(self, lane: int) -> bool:
        """Return whether every number that changed since the last call is finite."""
        return all(bool(torch.isfinite(t).all()) for t in self.changed(lane) if t.is_floating_point())

    def lane_bytes(self, lane: int) -> int:
        """Size of one lane's snapshot."""
        return sum(t.numel() * t.element_size() for t in self.tensors(lane).values())


class SitelessOverlay(Overlay):
    """An overlay that changes no linear map: it adds a text before the prompt, a second model, or
    nothing."""

    def __init__(self, lanes: int) -> None:
        super().__init__([], lanes)

    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no edited map, {site.name} least of all")

    def delta_norm(self, lane: int) -> float | None:
        return None


class _LaneProduct(torch.autograd.Function):
    """``x @ W^T`` lane by lane. It has its own backward because torch returns the weights' gradient
    in a transposed layout, and copying it takes longer than both products."""

    @staticmethod
    def forward(context: Any, x_LNI: Tensor, weight_LOI: Tensor) -> Tensor:
        context.save_for_backward(x_LNI, weight_LOI)
        return lane_products(x_LNI, weight_LOI)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad_LNO,) = grads
        x_LNI, weight_LOI = context.saved_tensors
        grad_x_LNI = (
            lane_products(grad_LNO, weight_LOI.transpose(1, 2)) if context.needs_input_grad[0] else None
        )
        grad_LOI = None
        if context.needs_input_grad[1]:
            grad_LOI = lane_products(grad_LNO.transpose(1, 2), x_LNI.transpose(1, 2))
        return grad_x_LNI, grad_LOI


def lane_linear(x_BSI: Tensor, weight_LOI: Tensor, batch: Batch, bias_O: Tensor | None = None) -> Tensor:
    """Each row times the weight of its own lane, (B, S, O).

    One lane uses its weight directly; lanes with equally many rows share one batched product;
    otherwise lane by lane. Weights are cast to the activations' precision (masters may be wider
    than the base).
    """
    weight_LOI = weight_LOI.to(x_BSI.dtype)
    lanes = weight_LOI.shape[0]
    whole = (
        lanes == 1 and x_BSI.device.type == "cuda"
    )  # on CUDA the gradient of one lane's view copies the whole weight
    if len(batch.segments) == 1 and not whole:
        return linear(x_BSI, weight_LOI[batch.segments[0][0]], bias_O)
    if batch.even(lanes):
        x_LNI = x_BSI.reshape(lanes, -1, x_BSI.shape[-1])
        out_LNO: Tensor = _LaneProduct.apply(x_LNI, weight_LOI)  # type: ignore[no-untyped-call]
        out = out_LNO.reshape(*x_BSI.shape[:-1], weight_LOI.shape[1])
        return out if bias_O is None else out + bias_O
    return torch.cat(
        [linear(x_BSI[start:stop], weight_LOI[lane], bias_O) for lane, start, stop in batch.segments]
    )


class _TokenProduct(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_NI: Tensor, weight_LOI: Tensor, ends: tuple[int, ...]) -> Tensor:
        context.save_for_backward(x_NI)
        context.ends = ends
        out_NO = x_NI.new_empty(len(x_NI), weight_LOI.shape[1])
        for weight_OI, (start, stop) in zip(weight_LOI, pairwise((0, *ends)), strict=True):
            product_into(out_NO[start:stop], x_NI[start:stop], weight_OI)
        return out_NO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad_NO,) = grads
        (x_NI,) = context.saved_tensors
        grad_LOI = x_NI.new_empty(len(context.ends), grad_NO.shape[1], x_NI.shape[1])
        for grad_OI, (start, stop) in zip(grad_LOI, pairwise((0, *context.ends)), strict=True):
            product_into(grad_OI, grad_NO[start:stop].T, x_NI[start:stop].T)
        return None, grad_LOI, None


def token_linear(x_NI: Tensor, weight_LOI: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Each token times the weight of its own lane, (N, O). ``ends``: per lane, the index after its
    last token. Gradients flow only to the weights."""
    out_NO: Tensor = _TokenProduct.apply(x_NI, weight_LOI.to(x_NI.dtype), ends)  # type: ignore[no-untyped-call]
    return out_NO


class DenseOverlay(Overlay):
    """Replaces the weights of some linear maps, one copy per lane. Copies are made at
    construction."""

    def __init__(self, sites: Sequence[Site], lanes: int, dtype: torch.dtype) -> None:
        super().__init__(sites, lanes)
        self.weights_LOI = {
            site.name: site.weight_OI.to(dtype).unsqueeze(0).repeat(lanes, 1, 1).contiguous()
            for site in sites
        }
        self.working_LOI: dict[str, Tensor] = {}
        """Inside :meth:`working`: the copies that the forward uses."""
        self._touched = [False] * lanes

    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        weight_LOI = self.working_LOI.get(site.name, self.weights_LOI[site.name])
        return lane_linear(x_BSI, weight_LOI, batch, site.bias_O)

    @contextmanager
    def working(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, the forward uses copies of the weights in ``dtype``. Code that changes the
        weights must renew the copies."""
        self.working_LOI = {name: weight_LOI.to(dtype) for name, weight_LOI in self.weights_LOI.items()}
        try:
            yield
        finally:
            self.working_LOI = {}

    def part(self, lanes: Sequence[int]) -> DenseOverlay:
        """An overlay of some of the lanes, with copies of their weights."""
        other = copy.copy(self)
        other.lanes = len(lanes)
        other.weights_LOI = {name: w[list(lanes)] for name, w in self.weights_LOI.items()}
        other.working_LOI = {name: w[list(lanes)] for name, w in self.working_LOI.items()}
        other._touched = [self._touched[lane] for lane in lanes]
        return other

    def weight(self, lane: int, site: Site) -> Tensor:
        """One lane's edited weight at one map, (out, in)."""
        return self.weights_LOI[site.name][lane]

    def set_weight(self, lane: int, site: Site, weight_OI: Tensor) -> None:
        """Set one lane's weight at one map."""
        self.weights_LOI[site.name][lane] = weight_OI.to(self.weights_LOI[site.name])
        self.touch([lane])

    def touch(self, lanes: Sequence[int]) -> None:
        """Note that these lanes differ from the base now; untouched lanes have an empty
        snapshot."""
        for lane in lanes:
            self._touched[lane] = True

    def tensors(self, lane: int) -> dict[str, Tensor]:
        if not self._touched[lane]:
            return {}
        return {name: w[lane] for name, w in self.weights_LOI.items()}

    def load_state(self, lane: int, state: LaneState) -> None:
        self._touched[lane] = bool(state.tensors)
        with torch.no_grad():
            for site in self.sites:
                weight_LOI = self.weights_LOI[site.name]
                weight_LOI[lane] = state.tensors.get(site.name, site.weight_OI).to(weight_LOI)

    def delta_norm(self, lane: int) -> float | None:
        return relative_norm((site.weight_OI, self.weights_LOI[site.name][lane]) for site in self.sites)


class _LowRank:
    """The weight change of one map in all lanes: low-rank factors plus a dense part."""

    def __init__(self, site: Site, lanes: int, dtype: torch.dtype) -> None:
        out, in_features = site.shape
        device = site.weight_OI.device
        self.limit = max(1, min(out, in_features) // 2)
        self.left_LOJ = torch.zeros(lanes, out, 0, dtype=dtype, device=device)
        self.right_LJI = torch.zeros(lanes, 0, in_features, dtype=dtype, device=device)
        self.dense_LOI: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.left_LOJ.shape[2])

    def add(self, left_LON: Tensor, right_LNI: Tensor) -> None:
        self.left_LOJ = torch.cat([self.left_LOJ, left_LON.to(self.left_LOJ)], dim=2)
        self.right_LJI = torch.cat([self.right_LJI, right_LNI.to(self.right_LJI)], dim=1)
        if self.dense_LOI is not None or self.rank >= self.limit:
            if self.dense_LOI is None:
                self.dense_LOI = torch.bmm(self.left_LOJ, self.right_LJI)
            else:
                self.dense_LOI = self.dense_LOI + torch.bmm(self.left_LOJ, self.right_LJI)
            self.left_LOJ, self.right_LJI = self.left_LOJ[:, :, :0], self.right_LJI[:, :0]

    def delta(self, lane: int) -> Tensor:
        delta = self.left_LOJ[lane] @ self.right_LJI[lane]
        return delta if self.dense_LOI is None else delta + self.dense_LOI[lane]

    def tensors(self, lane: int) -> dict[str, Tensor]:
        tensors = {"left": self.left_LOJ[lane], "right": self.right_LJI[lane]} if self.rank else {}
        if self.dense_LOI is not None:
            tensors["dense"] = self.dense_LOI[lane]
        return tensors

    def load_state(self, lane: int, tensors: Mapping[str, Tensor]) -> None:
        left, right = tensors.get("left"), tensors.get("right")
        if left is None and self.rank:  # a pristine lane among edited ones
            self.left_LOJ[lane], self.right_LJI[lane] = 0, 0
        rank = self.rank if left is None else left.shape[1]
        lanes, out, _ = self.left_LOJ.shape
        if rank != self.rank:  # lanes are in lockstep: the first lane restored sets the rank of all
            self.left_LOJ = self.left_LOJ.new_zeros(lanes, out, rank)
            self.right_LJI = self.right_LJI.new_zeros(lanes, rank, self.right_LJI.shape[2])
        if left is not None and right is not None:
            self.left_LOJ[lane], self.right_LJI[lane] = left.to(self.left_LOJ), right.to(self.right_LJI)
        dense = tensors.get("dense")
        if dense is not None:
            if self.dense_LOI is None:
                self.dense_LOI = self.left_LOJ.new_zeros(lanes, out, self.right_LJI.shape[2])
            self.dense_LOI[lane] = dense.to(self.dense_LOI)
        elif self.dense_LOI is not None:
            self.dense_LOI[lane] = 0


class LowRankOverlay(Overlay):
    """Adds ``left @ right`` to one or more linear maps, a pair of factors per lane and map, new
    columns and rows per edit.

    A dense copy of an MLP projection of a 7B model takes 90 MB or more per lane, a rank-one edit 60
    kB. When the rank reaches half the smaller dimension, the factors are as large as the matrix,
    and the change is stored as a dense matrix from then on. All lanes edit in lockstep, so their
    rank depends only on the number of edits. A snapshot names the factors ``left``, ``right`` and
    ``dense``, prefixed with the map's name if there are several maps.
    """

    def __init__(self, sites: Site | Sequence[Site], lanes: int, dtype: torch.dtype) -> None:
        super().__init__(sites if isinstance(sites, Sequence) else [sites], lanes)
        self._parts = {site.name: _LowRank(site, lanes, dtype) for site in self.sites}
        self._dtype = dtype

    @property
    def rank(self) -> int:
        """Columns that are kept as factors, over all maps."""
        return sum(part.rank for part in self._parts.values())

    def part_of(self, site: Site | None = None) -> _LowRank:
        """The change of one map; None: of the only one."""
        if site is None:
            (part,) = self._parts.values()
            return part
        return self._parts[site.name]

    @property
    def dense_LOI(self) -> Tensor | None:
        """The dense change of the only map."""
        return self.part_of().dense_LOI

    def add(self, left: Tensor, right: Tensor, site: Site | None = None) -> None:
        """Add the product of each lane's factors, (L, O, N) and (L, N, I); vectors (L, O) and (L,
        I) stand for N = 1."""
        if left.dim() == 2:
            left, right = left.unsqueeze(2), right.unsqueeze(1)
        self.part_of(site).add(left, right)

    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        part = self._parts[site.name]
        out = site.base_output(x_BSI)
        if part.dense_LOI is not None:
            out = out + lane_linear(x_BSI, part.dense_LOI, batch)
        if part.rank:
            out = out + lane_linear(lane_linear(x_BSI, part.right_LJI, batch), part.left_LOJ, batch)
        return out

    def delta(self, lane: int, site: Site | None = None) -> Tensor:
        """The whole change of one lane at one map (None: the only one), (out, in)."""
        return self.part_of(site).delta(lane)

    def weight(self, lane: int, site: Site) -> Tensor:
        """One lane's edited weight at one map, (out, in)."""
        return site.weight_OI.to(self._dtype) + self.delta(lane, site)

    def set_weight(self, lane: int, site: Site, weight_OI: Tensor) -> None:
        """Set one lane's weight at one map: its change there becomes dense, without factors."""
        self.part_of(site).load_state(lane, {"dense": weight_OI - site.weight_OI.to(self._dtype)})

    def tensors(self, lane: int) -> dict[str, Tensor]:
        return {
            self._prefix(site) + name: tensor
            for site in self.sites
            for name, tensor in self._parts[site.name].tensors(lane).items()
        }

    def changed(self, lane: int) -> Iterable[Tensor]:
        for site in self.sites:
            for name, tensor in self._parts[site.name].tensors(lane).items():
                if name == "dense":
                    yield tensor
                else:
                    yield self._since(lane, self._prefix(site) + name, tensor, int(name == "left"))

    def load_state(self, lane: int, state: LaneState) -> None:
        self._seen[lane].clear()
        for site in self.sites:
            prefix = self._prefix(site)
            tensors = {
                name: state.tensors[prefix + name]
                for name in ("left", "right", "dense")
                if prefix + name in state.tensors
            }
            self._parts[site.name].load_state(lane, tensors)

    def _prefix(self, site: Site) -> str:
        return "" if len(self.sites) == 1 else f"{site.name}/"

    def delta_norm(self, lane: int) -> float | None:
        if len(self.sites) == 1:
            weight_OI = self.sites[0].weight_OI.to(self._dtype)
            return float(self.delta(lane).norm() / weight_OI.norm())
        weights = [site.weight_OI.to(self._dtype) for site in self.sites]
        return relative_norm(
            (w, w + self.delta(lane, site)) for site, w in zip(self.sites, weights, strict=True)
        )


def relative_norm(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """``sqrt(sum ||after - before||^2 / sum ||before||^2)`` over (before, after) pairs."""
    change = total = 0.0
    for before, after in pairs:
        change += float((after.detach() - before.to(after.dtype)).square().sum())
        total += float(before.to(after.dtype).square().sum())
    return (change / total) ** 0.5 if total else 0.0


def pack_states(states: Sequence[LaneState], meta: dict[str, JSON]) -> bytes:
    """All lanes' snapshots as one safetensors blob; JSON in its metadata. No pickle."""
    from safetensors.torch import save

    tensors = {
        f"{i}/{name}": t.contiguous().cpu() for i, s in enumerate(states) for name, t in s.tensors.items()
    }
    header = {"lanes": [s.meta for s in states], "meta": meta}
    return save(tensors, metadata={"editsweep": json.dumps(header, sort_keys=True)})


def unpack_states(blob: bytes) -> tuple[list[LaneState], dict[str, JSON]]:
    """Reverse of :func:`pack_states`."""
    from safetensors.torch import load

    length = int.from_bytes(blob[:8], "little")
    header = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["editsweep"])
    states = [LaneState(meta=meta) for meta in header["lanes"]]
    for key, tensor in load(blob).items():
        lane, name = key.split("/", 1)
        states[int(lane)].tensors[name] = tensor
    return states, header["meta"]
