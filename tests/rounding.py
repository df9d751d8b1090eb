"""Copies of models and statistics that differ from them by rounding alone.

A recorded number comes from one run on one processor. Where a computation amplifies rounding, two
correct runs differ, too; these copies tell by how much, on the processor at hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from workers.model.base import BaseModel


def rounded(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the numbers moved to a neighbouring float, a quarter up and a quarter down."""
    chance = torch.rand(tensor.shape, generator=generator)
    toward = torch.full_like(tensor, math.inf) * (chance < 0.25).to(tensor.dtype).sub(0.5).sign()
    return torch.where(chance < 0.5, torch.nextafter(tensor, toward), tensor)


def rounded_model(base: BaseModel, seed: int) -> BaseModel:
    """Copy ``seed`` of a model; copy 0 is the model itself."""
    if seed == 0:
        return base
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base.model)
    for parameter in model.parameters():
        parameter.data = rounded(parameter.data, generator)
    return BaseModel(model, base.tokenizer, base.config).with_encoder(base.encoder)


def rounded_tensors(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Copy ``seed`` of recorded tensors; whole numbers stay."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: rounded(tensor, generator) if seed and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
