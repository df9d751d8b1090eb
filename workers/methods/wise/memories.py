"""Side memories of WISE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workers.kernels.matmul import linear
from workers.methods.wise.config import MERGED_SHARE, WISEConfig
from workers.methods.wise.merging import merge_deltas
from workers.model.base import BaseModel, Site
from workers.model.batch import Batch
from workers.model.overlay import LaneState, Overlay, token_linear
from workers.types import JSON


@dataclass(frozen=True)
class SideMemory:
    """A saved change of the map. ``activation``: the smallest routing activation of its edits."""

    delta_OI: Tensor
    activation: float
    merged: bool

    @cached_property
    def square(self) -> float:
        """The change's squared norm."""
        return float(self.delta_OI.detach().square().sum())


class SideMemories(Overlay):
    """Per lane the current side memory and the saved ones, each stored as a change of the base
    weight."""

    def __init__(self, base: BaseModel, site: Site, lanes: int, config: WISEConfig) -> None:
        super().__init__([site], lanes)
        out, in_features = site.shape
        self.config = config
        self.delta_LOI = torch.zeros(lanes, out, in_features, dtype=base.master_dtype, device=base.device)
        self.masks_OI: list[Tensor | None] = [None] * lanes
        self.edits = [0] * lanes
        """Edits in the current side memory."""
        self.activation = [math.inf] * lanes
        """Smallest routing activation of these edits."""
        self.saved: list[list[SideMemory]] = [[] for _ in range(lanes)]
        self._fresh: list[list[SideMemory]] = [[] for _ in range(lanes)]
        """Saved since the last call of :meth:`changed`."""
        self._function = base.activation if config.activation == "public" else None

    # --- forward ---

    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            plain_BSO = site.base_output(x_BSI)
        if not any(self._memories(lane) for lane, _, _ in batch.segments):
            return plain_BSO
        token_BS = batch.prompt_mask_BS if self.config.routing == "prompt" else batch.attention_mask_BS.bool()
        parts = [
            self._route(lane, x_BSI[a:b], plain_BSO[a:b], token_BS[a:b]) for lane, a, b in batch.segments
        ]
        return torch.cat(parts)

    def _route(self, lane: int, x_RSI: Tensor, plain_RSO: Tensor, token_RS: Tensor) -> Tensor:
        """Outputs of one lane's rows, (R, S, O). Each row uses the memory with the largest
        activation among those whose threshold it reaches, or the base weight."""
        answer_RSO = plain_RSO
        best_R = torch.zeros(x_RSI.shape[0], dtype=self.delta_LOI.dtype, device=x_RSI.device)
        for delta_OI, threshold in self._memories(lane):
            change_RSO = linear(x_RSI, delta_OI.to(x_RSI.dtype))
            activation_R = token_mean(self.strength(plain_RSO, change_RSO), token_RS)
            wins_R = (activation_R >= threshold) & (activation_R > best_R)
            answer_RSO = torch.where(wins_R[:, None, None], plain_RSO + change_RSO, answer_RSO)
            best_R = torch.where(wins_R, activation_R, best_R)
        return answer_RSO

    def _memories(self, lane: int) -> list[tuple[Tensor, float]]:
        """Every memory of a lane that holds edits, with its threshold."""
        found = [(m.delta_OI, m.activation) for m in self.saved[lane]]
        if self.edits[lane]:
            found.append((self.delta_LOI[lane], self.activation[lane]))
        if not self.config.retrieve and found:
            smallest = min(activation for _, activation in found)
            found = [(delta_OI, smallest) for delta_OI, _ in found]
        return [(delta_OI, activation * self.config.act_ratio) for delta_OI, activation in found]

    def strength(self, plain_O: Tensor, change_O: Tensor) -> Tensor:
        """The routing activation of each token: (..., O) -> (...)."""
        dtype = self.delta_LOI.dtype
        if self._function is not None:
            plain_O = plain_O.to(dtype)
            change_O = self._function(plain_O + change_O.to(dtype)) - self._function(plain_O)
        norm: Tensor = torch.linalg.vector_norm(change_O.to(dtype), dim=-1)
        return norm

    # --- editing ---

    def change(self, delta_KOI: Tensor, x_NI: Tensor, ends: tuple[int, ...]) -> Tensor:
        """``A(x) D`` of some lanes' memories at their tokens, (N, O). Exactly zero for a new
        memory.

        With ``activation: public`` two outputs are subtracted, as in the public code, because
        parity needs the same rounding (the margin's hinges amplify it to percents in 20 steps).
        """
        if self.config.activation == "difference":
            return token_linear(x_NI, delta_KOI, ends)
        weight_KOI = self.sites[0].weight_OI.to(delta_KOI).expand_as(delta_KOI)
        return token_linear(x_NI, weight_KOI + delta_KOI, ends) - token_linear(x_NI, weight_KOI, ends)

    def begin(self, lane: int, draw: Tensor) -> None:
        """Give a new side memory its mask: the weights whose uniform draw, (O, I), is below
        ``mask_ratio``."""
        self.masks_OI[lane] = (draw < self.config.mask_ratio).to(self.delta_LOI.device)

    def finish(self, lane: int, activations: Sequence[float], generator: torch.Generator) -> None:
        """Count a lane's edits; save and merge memories when due. ``generator``: for the random
        merge rules."""
        self.edits[lane] += len(activations)
        self.activation[lane] = min(self.activation[lane], *activations)
        if self.edits[lane] < self.config.save_freq:
            return
        saved = SideMemory(self.delta_LOI[lane].clone(), self.activation[lane], merged=False)
        self.saved[lane].append(saved)
        self._fresh[lane].append(saved)
        self._reset(lane)
        waiting = [m for m in self.saved[lane] if not m.merged]
        if len(waiting) < self.config.memories_per_merge:
            return
        done = [m for m in self.saved[lane] if m.merged]
        absorbed = [] if self.config.retrieve else done
        share = (1 - MERGED_SHARE) if absorbed else self.config.merge_weight
        weights = [share / len(waiting)] * len(waiting) + [MERGED_SHARE] * len(absorbed)
        parts = waiting + absorbed
        delta_OI = merge_deltas(self.config, self.sites[0], [m.delta_OI for m in parts], weights, generator)
        merged = SideMemory(delta_OI, min(m.activation for m in parts), merged=True)
        self.saved[lane] = [*done, merged] if self.config.retrieve else [merged]
        self._fresh[lane].append(merged)

    def _reset(self, lane: int) -> None:
        with torch.no_grad():
            self.delta_LOI[lane] = 0
        self.masks_OI[lane] = None
        self.edits[lane] = 0
        self.activation[lane] = math.inf

    # --- state ---

    def tensors(self, lane: int) -> dict[str, Tensor]:
        return {f"saved.{i}": m.delta_OI for i, m in enumerate(self.saved[lane])} | self._side(lane)

    def _side(self, lane: int) -> dict[str, Tensor]:
        """The tensors of the current side memory, if it holds edits."""
        mask_OI = self.masks_OI[lane]
        if not self.edits[lane] or mask_OI is None:
            return {}
        return {"side": self.delta_LOI[lane], "mask": mask_OI}

    def meta(self, lane: int) -> dict[str, JSON]:
        meta: dict[str, JSON] = {}
        if self.edits[lane]:
            meta["side"] = {"edits": self.edits[lane], "activation": self.activation[lane]}
        if self.saved[lane]:
            meta["saved"] = [{"activation": m.activation, "merged": m.merged} for m in self.saved[lane]]
        return meta

    def changed(self, lane: int) -> Iterable[Tensor]:
        fresh, self._fresh[lane] = self._fresh[lane], []
        return [*(memory.delta_OI for memory in fresh), *self._side(lane).values()]

    def load_state(self, lane: int, state: LaneState) -> None:
        self._reset(lane)
        side = state.meta.get("side")
        if side is not None:
            with torch.no_grad():
                self.delta_LOI[lane] = state.tensors["side"].to(self.delta_LOI)
            self.masks_OI[lane] = state.tensors["mask"].to(self.delta_LOI.device, torch.bool)
            self.edits[lane], self.activation[lane] = side["edits"], side["activation"]
        self.saved[lane] = [
            SideMemory(
                state.tensors[f"saved.{i}"].to(self.delta_LOI, copy=True), m["activation"], m["merged"]
            )
            for i, m in enumerate(state.meta.get("saved", []))
        ]
        self._fresh[lane] = list(self.saved[lane])

    def delta_norm(self, lane: int) -> float | None:
        """Norm of the changes of all memories, relative to the base weight."""
        squares = [memory.square for memory in self.saved[lane]]
        squares += [
            float(t.detach().square().sum()) for name, t in self._side(lane).items() if name == "side"
        ]
        return math.sqrt(sum(squares) / self._base_square) if self._base_square else 0.0

    @cached_property
    def _base_square(self) -> float:
        return float(self.sites[0].weight_OI.to(self.delta_LOI.dtype).square().sum())


def token_mean(value_BS: Tensor, token_BS: Tensor) -> Tensor:
    """Mean over the marked tokens of each row, (B,)."""
    return (value_BS * token_BS).sum(1) / token_BS.sum(1).clamp_min(1)
