"""Low-rank adapters beside linear maps, one per lane: ``W' x = W x + s B A x`` (Hu et al., LoRA,
arXiv 2106.09685).

>>> overlay = AdapterOverlay(sites, lanes=2, rank=8, scale=4.0, dtype=torch.float32)
>>> overlay.start(0, draws)  # lane 0: A random, B zero; lane 1 has no adapter
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers.model.batch import Batch
from workers.model.overlay import LaneState, Overlay, lane_linear
from workers.rng import RandomStreams
from workers.types import SpecError

if TYPE_CHECKING:
    from workers.model.architectures import Arch
    from workers.model.base import BaseModel, Site
    from workers.model.config import ModelShape


def target_paths(arch: Arch, target_modules: Sequence[str] | None) -> tuple[str, ...]:
    """Paths inside a layer of the linear maps with these names: ``q_proj`` gives
    ``self_attn.q_proj``.

    None means the attention's query and value maps (or the one map that holds them). Raises
    :class:`SpecError`.
    """
    known = (*arch.attn_in, arch.attn_out, *arch.mlp_in, arch.mlp_out)
    if target_modules is None:
        return (arch.attn_in[0], arch.attn_in[2]) if len(arch.attn_in) == 3 else arch.attn_in
    found: dict[str, None] = {}
    for name in target_modules:
        matches = [path for path in known if path == name or path.endswith(f".{name}")]
        if not matches:
            raise SpecError(
                f"target_modules: {name!r} is no linear map of a decoder layer; choices: {', '.join(known)}"
            )
        found.update(dict.fromkeys(matches))
    return tuple(path for path in known if path in found)


def adapter_bytes(shape: ModelShape, paths: Sequence[str], layers: int, rank: int) -> int:
    """Bytes of one lane's adapters in ``layers`` layers, in the precision of overlays."""
    return layers * rank * sum(sum(shape.site(path)) for path in paths) * max(4, shape.bytes_per_value)


def uniform_A(streams: RandomStreams, purpose: str, rank: int, width: int) -> Tensor:
    """Initial A, (R, I): uniform within ``1 / sqrt(I)``, PyTorch's initialisation of a linear map,
    as in public adapters."""
    bound = 1 / math.sqrt(width)
    unit_RI = torch.rand(rank, width, generator=streams.generator(purpose))
    return (unit_RI * 2 - 1) * bound


class AdapterOverlay(Overlay):
    """Adapters at several maps. A lane that was never edited has none and computes the base's
    output."""

    def __init__(
        self, sites: Sequence[Site], lanes: int, rank: int, scale: float, dtype: torch.dtype
    ) -> None:
        super().__init__(sites, lanes)
        self.scale = scale
        self.down_LRI: dict[str, Tensor] = {}
        self.up_LOR: dict[str, Tensor] = {}
        for site in sites:
            out, in_features = site.shape
            device = site.weight_OI.device
            self.down_LRI[site.name] = torch.zeros(lanes, rank, in_features, dtype=dtype, device=device)
            self.up_LOR[site.name] = torch.zeros(lanes, out, rank, dtype=dtype, device=device)
        self.dropout: Dropout | None = None
        """Set while a lane trains; scoring has none."""
        self._started = [False] * lanes

    @property
    def factors(self) -> list[Tensor]:
        """All trained tensors."""
        return [*self.down_LRI.values(), *self.up_LOR.values()]

    def start(self, lane: int, streams: RandomStreams) -> None:
        """Initialise a lane's adapters, unless it has them."""
        if self._started[lane]:
            return
        self._started[lane] = True
        for name, down_LRI in self.down_LRI.items():
            down_LRI[lane] = uniform_A(streams, f"A {name}", down_LRI.shape[1], down_LRI.shape[2])

    def forward(self, site: Site, x_BSI: Tensor, batch: Batch) -> Tensor:
        out_BSO = site.base_output(x_BSI)
        if not any(self._started[lane] for lane, _, _ in batch.segments):
            return out_BSO
        if self.dropout is not None:
            x_BSI = self.dropout(x_BSI, batch)
        inner_BSR = lane_linear(x_BSI, self.down_LRI[site.name], batch)
        return out_BSO + lane_linear(inner_BSR, self.up_LOR[site.name], batch) * self.scale

    def tensors(self, lane: int) -> dict[str, Tensor]:
        if not self._started[lane]:
            return {}
        tensors = {f"{name}.A": t[lane] for name, t in self.down_LRI.items()}
        return tensors | {f"{name}.B": t[lane] for name, t in self.up_LOR.items()}

    def load_state(self, lane: int, state: LaneState) -> None:
        self._started[lane] = bool(state.tensors)
        for site in self.sites:
            for letter, factors in (("A", self.down_LRI), ("B", self.up_LOR)):
                found = state.tensors.get(f"{site.name}.{letter}")
                factor = factors[site.name]
                factor[lane] = 0 if found is None else found.to(factor)

    def delta(self, site: Site, lane: int) -> Tensor:
        """The whole change of one map in one lane, (out, in)."""
        return self.scale * (self.up_LOR[site.name][lane] @ self.down_LRI[site.name][lane])

    def delta_norm(self, lane: int) -> float | None:
        change = total = 0.0
        for site in self.sites:
            up_OR, down_RI = self.up_LOR[site.name][lane], self.down_LRI[site.name][lane]
            # ||BA||^2 = sum of (B^T B) * (A A^T): the product itself may be large
            change += self.scale**2 * float(((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum())
            total += float(site.weight_OI.to(up_OR.dtype).square().sum())
        return math.sqrt(max(change, 0.0) / total)


class Dropout:
    """Dropout of an edit's adapter inputs. A lane's masks come from its own generator and cover
    only its real tokens, so that they depend neither on padding nor on other lanes."""

    def __init__(self, rate: float, streams: Sequence[RandomStreams]) -> None:
        self.rate = rate
        self._generators = [d.generator("dropout") for d in streams]

    def __call__(self, x_BSI: Tensor, batch: Batch) -> Tensor:
        keep_BSI = torch.zeros(x_BSI.shape, dtype=torch.bool)
        real_BS = batch.attention_mask_BS.bool().cpu()
        for lane, start, stop in batch.segments:
            for row in range(start, stop):
                size = (int(real_BS[row].sum()), x_BSI.shape[2])
                keep_BSI[row, real_BS[row]] = torch.rand(size, generator=self._generators[lane]) >= self.rate
        return torch.where(keep_BSI.to(x_BSI.device), x_BSI / (1 - self.rate), 0)


def resolve_sites(base: BaseModel, layers: Sequence[int], paths: Sequence[str]) -> list[Site]:
    """The maps at ``paths`` of some layers, layer by layer."""
    return [base.site(layer, path) for layer in layers for path in paths]
