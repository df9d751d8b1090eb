"""The closed form that MEMIT, EMMET and PMET share: keys against a factorised second moment, one small system a lane."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.locate import Factor, lane_chunks

SOLVE_BYTES = 1 << 30
"""Temporaries: as many lanes at once as stay below this."""


def ridge_keys(factor: Factor, keys_LIN: Tensor, ridge: float, limit: int = SOLVE_BYTES) -> Tensor:
    """``(K^T C^-1 K + ridge)^-1 K^T C^-1`` of every lane, (L, N, I), float64.

    With ``ridge`` 1 this is ``K^T (C + K K^T)^-1`` (Woodbury), with 0 the left inverse of K that ordinary keys feel least.
    Its temporaries take at most ``limit`` bytes, or one lane.
    """
    lanes, into, count = keys_LIN.shape
    out_LNI = keys_LIN.new_empty(lanes, count, into)
    for some in lane_chunks(lanes, 8 * (3 * into * count + 2 * count * count), limit):
        keys_KIN = keys_LIN[some]
        solved_KIN = factor.solve(keys_KIN)
        small_KNN = keys_KIN.transpose(1, 2) @ solved_KIN
        small_KNN.diagonal(dim1=1, dim2=2).add_(ridge)
        # a lane that is singular or not finite must not raise for the others
        out_LNI[some], _ = torch.linalg.solve_ex(small_KNN, solved_KIN.transpose(1, 2))
    return out_LNI
