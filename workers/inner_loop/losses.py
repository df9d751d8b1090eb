"""The target loss shared by all optimising methods: the positions it reads, and how it is
averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers.model.batch import Batch

if TYPE_CHECKING:
    from workers.model.base import BaseModel


@dataclass(frozen=True)
class TargetTokens:
    """Target tokens and the positions that predict them.

    ``row_P`` and ``column_P`` are the positions in the padded batch where the head runs. The shares
    of one lane add up to 1, so that a lane's loss is a weighted mean.
    """

    row_P: tuple[int, ...]
    column_P: tuple[int, ...]
    token_P: Tensor
    share_P: Tensor
    lane_P: Tensor
    lanes: int

    @classmethod
    def of(cls, batch: Batch, places: Sequence[tuple[int, int, int, float]], lanes: int) -> TargetTokens:
        """``places``: (row, position in the row's own tokens, target token, share)."""
        row, position, token, share = zip(*places, strict=True)
        device = batch.input_ids_BS.device
        lane_B = [lane for lane, start, stop in batch.segments for _ in range(start, stop)]
        return cls(
            tuple(row),
            tuple(batch.offsets[r] + p for r, p in zip(row, position, strict=True)),
            torch.tensor(token, device=device),
            torch.tensor(share, dtype=torch.float64, device=device),
            torch.tensor([lane_B[r] for r in row], device=device),
            lanes,
        )

    @property
    def reads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and columns whose hidden states :meth:`nll` takes."""
        return self.row_P, self.column_P

    def part(self, lanes: Sequence[int], kept: Sequence[int]) -> tuple[TargetTokens, list[int]]:
        """The tokens of some lanes, and their indices in this object. ``kept``: the batch's rows of
        these lanes, in their new order."""
        place = {row: i for i, row in enumerate(kept)}
        chosen = [p for p, row in enumerate(self.row_P) if row in place]
        index = torch.tensor(chosen, device=self.lane_P.device)
        lane_L = torch.zeros(self.lanes, dtype=torch.long)
        lane_L[list(lanes)] = torch.arange(len(lanes))
        part = TargetTokens(
            tuple(place[self.row_P[p]] for p in chosen),
            tuple(self.column_P[p] for p in chosen),
            self.token_P[index],
            self.share_P[index],
            lane_L.to(index.device)[self.lane_P[index]],
            len(lanes),
        )
        return part, chosen

    def nll(self, base: BaseModel, hidden_PD: Tensor) -> Tensor:
        """Weighted mean of ``-log P(token)`` within each lane, (L,), from the hidden states at
        :attr:`reads`."""
        return self._nll(base.logits(hidden_PD))

    def nll_and_hit(self, base: BaseModel, hidden_PD: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`nll`, and whether each token of a lane has the largest logit at its position,
        (L,)."""
        logits_PV = base.logits(hidden_PD)
        missed_P = logits_PV.gather(1, self.token_P[:, None])[:, 0] < logits_PV.amax(1)
        missed_L = missed_P.new_zeros(self.lanes, dtype=torch.long).index_add(0, self.lane_P, missed_P.long())
        return self._nll(logits_PV), missed_L == 0

    def _nll(self, logits_PV: Tensor) -> Tensor:
        nll_P = logits_PV.logsumexp(-1) - logits_PV.gather(1, self.token_P[:, None])[:, 0]
        return nll_P.new_zeros(self.lanes).index_add(0, self.lane_P, nll_P * self.share_P.to(nll_P.dtype))
