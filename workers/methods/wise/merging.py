"""Merging of WISE's side memories: TIES, DARE, linear, SLERP and their variants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.methods.wise.config import WISEConfig
from workers.model.base import Site


def merge_deltas(
    config: WISEConfig,
    site: Site,
    deltas_OI: Sequence[Tensor],
    weights: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    """Merge several changes into one, (O, I).

    TIES: Yadav et al., arXiv 2306.01708 (trim by magnitude, elect signs, mean of those that agree).
    DARE: Yu et al., arXiv 2311.03099 (drop at random and rescale). ``sign`` elects without
    trimming; ``magnitude`` trims and adds, ``magnitude_norm`` averages. ``linear`` adds. ``slerp``
    interpolates on the sphere between whole weights.
    """
    rule = config.merge_alg
    weight_J = torch.tensor(weights, dtype=deltas_OI[0].dtype, device=deltas_OI[0].device)[:, None, None]
    if rule == "slerp":
        base_OI = site.weight_OI.to(deltas_OI[0])
        merged_OI, total = base_OI + deltas_OI[0], weights[0]
        for delta_OI, weight in zip(deltas_OI[1:], weights[1:], strict=True):
            total += weight
            merged_OI = slerp(merged_OI, base_OI + delta_OI, weight / total)
        return slerp(base_OI, merged_OI, total) - base_OI
    parts = list(deltas_OI)
    if rule in ("ties", "magnitude", "magnitude_norm"):
        parts = [_largest(delta_OI, config.density) for delta_OI in parts]
    elif rule in ("dare_ties", "dare_linear"):
        rescale = not (config.deviations.public_dare and rule == "dare_linear")
        parts = [_dropped(delta_OI, config.density, rescale, generator) for delta_OI in parts]
    weighted_JOI = torch.stack(parts) * weight_J
    if rule in ("ties", "sign", "dare_ties"):
        elected_OI = torch.where(weighted_JOI.sum(0) >= 0, 1.0, -1.0).to(weighted_JOI.dtype)
        agree_JOI = weighted_JOI.sign() == elected_OI
        merged_OI = (weighted_JOI * agree_JOI).sum(0)
        if rule == "dare_ties":
            return merged_OI
        share_OI = (weight_J * agree_JOI).sum(0)
        return merged_OI / torch.where(share_OI == 0, 1, share_OI)
    merged_OI = weighted_JOI.sum(0)
    return merged_OI / weight_J.sum() if rule == "magnitude_norm" else merged_OI


def _largest(delta_OI: Tensor, density: float) -> Tensor:
    """Keep the share ``density`` of entries with the largest magnitude."""
    if density >= 1:
        return delta_OI
    keep = max(1, int(density * delta_OI.numel()))
    flat = delta_OI.flatten()
    kept = flat.abs().topk(keep).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(delta_OI)


def _dropped(delta_OI: Tensor, density: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability ``density``."""
    if density >= 1:
        return delta_OI
    keep_OI = (torch.rand(delta_OI.shape, generator=generator) < density).to(delta_OI.device)
    return delta_OI * keep_OI / (density if rescale else 1)


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation of whole tensors; linear where they are nearly parallel (cosine above
    0.9995)."""
    cosine = float((start / start.norm().clamp_min(1e-8) * (end / end.norm().clamp_min(1e-8))).sum())
    if not abs(cosine) <= 0.9995:
        return start + share * (end - start)
    angle = math.acos(cosine)
    return (math.sin((1 - share) * angle) * start + math.sin(share * angle) * end) / math.sin(angle)
