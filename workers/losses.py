"""The target loss every optimising method shares: where in a batch it is read, and how it is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers.rows import Rows

if TYPE_CHECKING:
    from workers.models import BaseModel


class TargetTokens:
    """Target tokens and the positions that predict them.

    ``places`` lists (row, position in the row's own tokens, target token, share); shares of one lane add up to 1, so that a
    lane's loss is a weighted mean. The head runs at these positions and nowhere else.
    """

    def __init__(self, rows: Rows, places: Sequence[tuple[int, int, int, float]], lanes: int) -> None:
        row, position, token, share = zip(*places, strict=True)
        device = rows.input_ids_BS.device
        self.lanes = lanes
        self.row_P = torch.tensor(row, device=device)
        self.column_P = torch.tensor([rows.offsets[r] + p for r, p in zip(row, position, strict=True)], device=device)
        self.token_P = torch.tensor(token, device=device)
        self.share_P = torch.tensor(share, dtype=torch.float64, device=device)
        self.lane_P = rows.lane_B[self.row_P]

    def nll(self, base: BaseModel, hidden_BSD: Tensor) -> Tensor:
        """Weighted mean of ``-log P(token)`` within each lane, (L,), from the hidden states after the final norm."""
        logits_PV = base.logits(hidden_BSD[self.row_P, self.column_P])
        nll_P = -logits_PV.log_softmax(-1).gather(1, self.token_P[:, None])[:, 0]
        return nll_P.new_zeros(self.lanes).index_add(0, self.lane_P, nll_P * self.share_P.to(nll_P.dtype))
