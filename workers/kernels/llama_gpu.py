"""A decoder layer of Llama's kind inside an edit's inner loop, on a GPU: its own products, and fewer kernels between them.

>>> layer = FusedLayer.of(base.layers[30], constants)            # None: not a layer it knows, or not on a GPU
>>> if layer is not None and plain(base.layers[30]):
...     hidden_RSD = layer(hidden_RSD)                            # gradients flow to the hidden states

Beside a layer's seven products the modules start some thirty kernels forward and fifty backward, each of which waits
for memory. Here a norm is one kernel, as torch has it, and rotary positions are three either way. Nothing is compiled,
so that the bits of a step depend on its batch alone, and not on what a compiler met before (see
:mod:`workers.kernels.compiled`). On a processor torch has no such norm, and there is nothing to gain.

The result equals the modules' up to rounding: a norm rounds to the model's precision once, at its end. Used where edits search
(:mod:`workers.inner_loop.suffix`), never for scoring.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.llama_cpu import Constants, known


@dataclass(frozen=True)
class FusedLayer:
    """One layer with the constants of a batch."""

    module: Any
    constants: Constants

    @classmethod
    def of(cls, module: Any, constants: Constants | None) -> Self | None:
        """None: not a layer of this kind on a GPU, or no constants."""
        if constants is None or constants.mask_R1QK.device.type != "cuda" or not known(module):
            return None
        return cls(module, constants)

    def part(self, index_R: Tensor) -> Self:
        """The same for some of the rows."""
        return replace(self, constants=self.constants.part(index_R))

    def __call__(self, hidden_RCD: Tensor) -> Tensor:
        attention, mlp, constants = self.module.self_attn, self.module.mlp, self.constants
        given = constants.given
        entering_RCD = _normed(self.module.input_layernorm, hidden_RCD)
        q = self._rotated(attention.q_proj(entering_RCD[:, given:]), given)
        key = self._rotated(attention.k_proj(entering_RCD))
        value = _split(attention.v_proj(entering_RCD), attention.head_dim)
        if constants.past is not None:
            key, value = torch.cat([constants.past[0], key], 2), torch.cat([constants.past[1], value], 2)
        sharing = q.shape[1] // key.shape[1]
        if sharing > 1:
            key, value = (t.repeat_interleave(sharing, 1) for t in (key, value))
        mixed = F.scaled_dot_product_attention(q, key, value, constants.mask_R1QK, scale=attention.scaling)
        between_RQD = hidden_RCD[:, given:] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        inner_RQD = _normed(self.module.post_attention_layernorm, between_RQD)
        out_RQD: Tensor = between_RQD + mlp(inner_RQD)
        return out_RQD

    def _rotated(self, x_RCX: Tensor, start: int = 0) -> Tensor:
        cos_R1CE, sin_R1CE = (t[:, None, start:] for t in (self.constants.cos_RCE, self.constants.sin_RCE))
        x_RHCE = _split(x_RCX, self.module.self_attn.head_dim)
        out_RHCE: Tensor = _Rotation.apply(x_RHCE, cos_R1CE, sin_R1CE)  # type: ignore[no-untyped-call]
        return out_RHCE


class _Rotation(torch.autograd.Function):
    """Rotary positions (arXiv 2104.09864) of pairs that stand half a head apart: ``(a, b)`` becomes
    ``(a cos - b sin, b cos + a sin)``, each half with cosines and sines of its own."""

    @staticmethod
    def forward(context: Any, x_RHCE: Tensor, cos_R1CE: Tensor, sin_R1CE: Tensor) -> Tensor:
        context.save_for_backward(cos_R1CE, sin_R1CE)
        (a, b), (of_a, of_b) = x_RHCE.chunk(2, -1), sin_R1CE.chunk(2, -1)
        out_RHCE = x_RHCE * cos_R1CE
        out_a, out_b = out_RHCE.chunk(2, -1)
        out_a.addcmul_(b, of_a, value=-1)
        out_b.addcmul_(a, of_b)
        return out_RHCE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (out_RHCE,) = grads
        cos_R1CE, sin_R1CE = context.saved_tensors
        (out_a, out_b), (of_a, of_b) = out_RHCE.chunk(2, -1), sin_R1CE.chunk(2, -1)
        x_RHCE = out_RHCE * cos_R1CE
        a, b = x_RHCE.chunk(2, -1)
        a.addcmul_(out_b, of_b)
        b.addcmul_(out_a, of_a, value=-1)
        return x_RHCE, None, None


def _normed(norm: Any, x_RCD: Tensor) -> Tensor:
    return F.rms_norm(x_RCD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _split(x_RCX: Tensor, size: int) -> Tensor:
    """(R, heads, C, head size)."""
    return x_RCX.view(*x_RCX.shape[:2], -1, size).transpose(1, 2)
