"""A decoder layer of Llama's kind inside an edit's inner loop, on a processor: forward and backward written out.

>>> constants = Constants.of(arguments)                           # None: not these arguments
>>> layer = QuickLayer.of(base.quick_weights(4), constants)       # None: not a layer it knows
>>> if layer is not None and plain(base.layers[4]):               # nobody answers for a part of it
...     hidden_RSD = layer(hidden_RSD)                            # gradients flow to the hidden states

A step of an edit runs such a layer on some dozens or hundreds of tokens, where a product takes a tenth of a
millisecond. Run by its modules, more time than that goes into a few dozen small passes forward and as many backward,
into attention by a kernel made for long rows, and into products whose right factor lies the wrong way round (see
:mod:`workers.kernels.matmul`). Here the maps that share an input are one product, attention is two batched products
over keys and values as they lie, and backward computes what frozen weights leave to compute: the gradient of the hidden
states.

The result equals the modules' up to rounding. It is used where edits search (:mod:`workers.inner_loop.suffix`), never
for scoring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.kernels.limits import LAID_OUT
from workers.kernels.matmul import Joined

KINDS = frozenset(
    f"transformers.models.{name}.modeling_{name}.{title}DecoderLayer"
    for name, title in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"))
)
"""Layers of this structure: RMS norm, rotary attention, RMS norm, gated MLP."""

_UNDERSTOOD = frozenset({"attention_mask", "position_embeddings", "position_ids", "cache_position"})


@dataclass(frozen=True)
class Weights:
    """A layer's frozen weights, laid out for quick products. Axes of the maps: (out, in)."""

    qkv: Joined
    """Queries and keys with the two numbers of a rotated pair side by side, which stand half a head apart in the modules. Scores
    do not ask for the order."""
    out: Joined
    gate_up: Joined
    down: Joined
    norm_D: Tensor
    eps: float
    mlp_norm_D: Tensor
    mlp_eps: float
    heads: int
    kv_heads: int
    scaling: float
    value_HDE: Tensor
    value_HED: Tensor
    """The map of the values, key head by key head (E numbers each), both ways round."""
    value_bias: bool

    @classmethod
    def of(cls, module: Any) -> Self | None:
        """None: not a layer of this kind."""
        if not known(module):
            return None
        matrices = [p for p in module.parameters() if p.dim() == 2]
        fits = sum(p.numel() for p in matrices) <= LAID_OUT
        wide = (torch.float32, torch.float64)
        if not fits or any(p.dtype not in wide or p.device.type != "cpu" for p in matrices):
            return None
        attention, mlp = module.self_attn, module.mlp
        size = attention.head_dim
        value_HED = attention.v_proj.weight.detach().view(-1, size, attention.v_proj.in_features)
        return cls(
            Joined([_turning(attention.q_proj, size), _turning(attention.k_proj, size), _frozen(attention.v_proj)]),
            Joined([_frozen(attention.o_proj)]),
            Joined([_frozen(mlp.gate_proj), _frozen(mlp.up_proj)]),
            Joined([_frozen(mlp.down_proj)]),
            module.input_layernorm.weight,
            module.input_layernorm.variance_epsilon,
            module.post_attention_layernorm.weight,
            module.post_attention_layernorm.variance_epsilon,
            attention.q_proj.weight.shape[0] // size,
            len(value_HED),
            attention.scaling,
            value_HED.transpose(1, 2).contiguous(),
            value_HED,
            attention.v_proj.bias is not None,
        )


def _frozen(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def _turning(linear: nn.Linear, size: int) -> tuple[Tensor, Tensor | None]:
    """A map whose answer is rotated, head by head of ``size`` numbers: the two of a pair side by side."""
    order = _side_by_side(torch.arange(linear.out_features).view(-1, size)).flatten()
    weight_OI, bias_O = _frozen(linear)
    return weight_OI[order], None if bias_O is None else bias_O[order]


@dataclass(frozen=True)
class Constants:
    """What a layer is given beside the hidden states of a batch of R rows.

    C columns enter; the first ``given`` of them only give keys and values, the other Q are answered. P earlier columns never
    change and are there as ``past`` keys and values, (R, heads, P, head size).
    """

    cos_RCE: Tensor
    sin_RCE: Tensor
    """Each column's rotation; R or 1 rows."""
    mask_R1QK: Tensor
    """What is added to the scores of each query with the K = P + C keys; R or 1 rows."""
    given: int
    past: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        key_arguments: Mapping[str, Any] | None = None,
        given: int = 0,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Self | None:
        """``arguments`` are the layer's for the Q columns, ``key_arguments`` for those before; None if they hold more than this
        knows."""
        tensors = {name for name, value in arguments.items() if isinstance(value, Tensor | tuple | list)}
        if not {"attention_mask", "position_embeddings"} <= tensors <= _UNDERSTOOD:
            return None
        parts = [arguments] if key_arguments is None else [key_arguments, arguments]
        cos_RCE, sin_RCE = (torch.cat([part["position_embeddings"][i] for part in parts], 1) for i in (0, 1))
        mask = arguments["attention_mask"]
        if mask.dtype == torch.bool:  # which keys a query looks at: every layer would translate it anew in every step
            mask = cos_RCE.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(cos_RCE.dtype).min)
        return cls(cos_RCE, sin_RCE, mask, given, past)

    def part(self, index_R: Tensor) -> Self:
        """The same for some of the rows."""
        cos, sin, mask = (t if len(t) == 1 else t[index_R] for t in (self.cos_RCE, self.sin_RCE, self.mask_R1QK))
        past = None if self.past is None else (self.past[0][index_R], self.past[1][index_R])
        return replace(self, cos_RCE=cos, sin_RCE=sin, mask_R1QK=mask, past=past)


@dataclass(frozen=True)
class QuickLayer:
    """One layer with the constants of a batch, as :class:`Constants` has them, laid out for its products."""

    weights: Weights
    given: int
    turn_RC1F: Tensor
    """Each column's rotation, a complex number for each pair of a head's numbers; R or 1 rows."""
    mask_R1QK: Tensor
    past: tuple[Tensor, Tensor] | None
    late_values: bool
    """Whether what enters the map of the values is mixed by the attention's shares first."""

    @classmethod
    def of(cls, weights: Weights | None, constants: Constants | None) -> Self | None:
        """None if there are none, or if the two numbers of a pair do not rotate together."""
        if weights is None or constants is None:
            return None
        (cos, other_cos), (sin, other_sin) = (
            t[:, :, None].chunk(2, -1) for t in (constants.cos_RCE, constants.sin_RCE)
        )
        if not torch.equal(cos, other_cos) or not torch.equal(sin, other_sin):
            return None
        given, mask, past = constants.given, constants.mask_R1QK, constants.past
        past = None if past is None else (_side_by_side(past[0]), past[1].contiguous())
        # the work of either order, over the width of what enters: a value of each column, or a mix and its value for each query
        asked, columns, size = mask.shape[2], cos.shape[1], weights.value_HED.shape[1]
        mixing = asked * weights.heads * (columns + size)
        late_values = bool(given) and not weights.value_bias and 2 * mixing <= columns * weights.kv_heads * size
        return cls(weights, given, torch.complex(cos, sin), mask, past, late_values)

    def part(self, index_R: Tensor) -> Self:
        """The same for some of the rows."""
        turn, mask = self.turn_RC1F, self.mask_R1QK
        return replace(
            self,
            turn_RC1F=turn if turn.shape[0] == 1 else turn[index_R],
            mask_R1QK=mask if mask.shape[0] == 1 else mask[index_R],
            past=None if self.past is None else (self.past[0][index_R], self.past[1][index_R]),
        )

    def __call__(self, hidden_RCD: Tensor) -> Tensor:
        out_RQD: Tensor = _Layer.apply(hidden_RCD, self)  # type: ignore[no-untyped-call]
        return out_RQD


def known(module: Any) -> bool:
    """Whether a layer is of the kind that is written out here."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return kind in KINDS and type(module.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def plain(module: nn.Module) -> bool:
    """Whether a layer's modules are themselves: no overlay answers for one of them, and nobody listens to it."""
    parts = module.modules()
    return not any("forward" in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in parts)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden_RCD: Tensor, layer: QuickLayer) -> Tensor:
        weights, given = layer.weights, layer.given
        inner_RCD, scale_RC1 = _normed(hidden_RCD, weights.eps)
        entering_RCD = inner_RCD * weights.norm_D
        values = 2 if layer.late_values else 3
        if given:
            q_RQX = weights.qkv(entering_RCD[:, given:], 0, 1)
            key_RCX, *value_RCX = weights.qkv(entering_RCD, 1, values).tensor_split(values - 1, -1)
        else:
            q_RQX, key_RCX, *value_RCX = weights.qkv(entering_RCD).tensor_split(weights.qkv.ends[1:-1], -1)
        q = _rotated(_split(q_RQX, weights.heads), layer.turn_RC1F[:, given:])
        key = _rotated(_split(key_RCX, weights.kv_heads), layer.turn_RC1F)
        attention = _Attention(layer, q, key)
        if value_RCX:
            mixed = attention.mixed(_split(value_RCX[0], weights.kv_heads).transpose(1, 2).contiguous())
        else:
            mixed = attention.mixed_late(entering_RCD)
        mixed_RQX = mixed.transpose(1, 2).flatten(2)
        between_RQD = weights.out(mixed_RQX).add_(hidden_RCD[:, given:])
        mlp_inner_RQD, mlp_scale_RQ1 = _normed(between_RQD, weights.mlp_eps)
        gate_up_RQF = weights.gate_up(mlp_inner_RQD * weights.mlp_norm_D)
        gate_RQF, up_RQF = gate_up_RQF.chunk(2, -1)
        out_RQD = weights.down(F.silu(gate_RQF).mul_(up_RQF)).add_(between_RQD)
        context.layer = layer
        context.kept = (inner_RCD, scale_RC1, attention, mlp_inner_RQD, mlp_scale_RQ1, gate_up_RQF)
        return out_RQD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # what was kept has its values of forward; every other name is the gradient of what it named there
        (out_RQD,) = grads
        layer: QuickLayer = context.layer
        weights, given = layer.weights, layer.given
        inner_RCD, scale_RC1, attention, mlp_inner_RQD, mlp_scale_RQ1, gate_up_RQF = context.kept
        gate_RQF, up_RQF = gate_up_RQF.chunk(2, -1)
        product_RQF = weights.down.back(out_RQD)
        d_up_RQF = product_RQF * F.silu(gate_RQF)
        d_gate_RQF = torch.ops.aten.silu_backward(product_RQF.mul_(up_RQF), gate_RQF)
        d_mlp_RQD = weights.gate_up.back(d_gate_RQF, d_up_RQF).mul_(weights.mlp_norm_D)
        between_RQD = _normed_back(d_mlp_RQD, mlp_inner_RQD, mlp_scale_RQ1).add_(out_RQD)
        mixed = _split(weights.out.back(between_RQD), weights.heads).transpose(1, 2).contiguous()
        q, key, value, late_RCD = attention.back(mixed)
        q_RQX = _rotated_back(q, layer.turn_RC1F[:, given:])
        key_RCX = _rotated_back(key, layer.turn_RC1F)
        value_RCX = None if value is None else value.transpose(1, 2).flatten(2)
        if given:
            entering_RCD = weights.qkv.back(None, key_RCX, value_RCX)
            entering_RCD[:, given:] += weights.qkv.back(q_RQX, None, None)
        else:
            entering_RCD = weights.qkv.back(q_RQX, key_RCX, value_RCX)
        if late_RCD is not None:
            entering_RCD += late_RCD
        hidden_RCD = _normed_back(entering_RCD.mul_(weights.norm_D), inner_RCD, scale_RC1)
        hidden_RCD[:, given:] += between_RQD
        return hidden_RCD, None


class _Attention:
    """Every query of a row looks at the row's past and present keys; its share in each is what a softmax makes of the scores.

    Queries of all heads that share keys and values stand below each other: (R x key heads, queries, head size). Products of many
    small matrices are several times as quick where the right factor is not transposed, so it is the queries that are turned
    around, of which there are few.
    """

    def __init__(self, layer: QuickLayer, q: Tensor, key: Tensor) -> None:
        self.weights = layer.weights
        self.shape, self.kv_shape = q.shape, key.shape
        self.q = q.view(-1, self.shape[1] // self.kv_shape[1] * self.shape[2], self.shape[3])
        self.keys, self.values = [key.flatten(0, 1)], list[Tensor]()
        if layer.past is not None:
            self.keys.insert(0, layer.past[0].flatten(0, 1))
            self.values.append(layer.past[1].flatten(0, 1))
        self.entering_RCD: Tensor | None = None
        turned = self.q.transpose(1, 2).contiguous()
        scores = self._across([torch.bmm(key, turned) for key in self.keys]).mul_(self.weights.scaling)
        by_row = scores.view(len(q), -1, *layer.mask_R1QK.shape[2:])
        by_row += layer.mask_R1QK
        self.share = scores.softmax(-1)

    def _across(self, parts: list[Tensor]) -> Tensor:
        """(..., keys, queries) of past and present as one (..., queries, keys)."""
        out = self.q.new_empty(*self.q.shape[:2], sum(key.shape[1] for key in self.keys))
        for view, part in zip(self._parts(out), parts, strict=True):
            view.view(len(part), -1, view.shape[-1]).copy_(part.transpose(1, 2))
        return out

    def _parts(self, whole: Tensor) -> tuple[Tensor, ...]:
        """What of shares or scores belongs to the past and to the present."""
        return whole.tensor_split([key.shape[1] for key in self.keys[:-1]], 2)

    def mixed(self, value: Tensor) -> Tensor:
        """The values by their shares, (R, heads, Q, head size)."""
        self.values.append(value.flatten(0, 1))
        return _sum(self._parts(self.share), self.values).view(self.shape)

    def mixed_late(self, entering_RCD: Tensor) -> Tensor:
        """The same from what enters the map of the values: it is mixed first, and then there are but a few values to compute."""
        self.entering_RCD = entering_RCD
        inner_RYD = torch.bmm(self._present(self.share), entering_RCD)
        mixed = torch.bmm(self._heads_first(inner_RYD), self.weights.value_HDE)
        rows, kv_heads, _, size = self.kv_shape
        out = mixed.view(kv_heads, rows, -1, size).transpose(0, 1).reshape_as(self.q)
        if self.values:
            out.baddbmm_(self._parts(self.share)[0], self.values[0])
        return out.view(self.shape)

    def _present(self, whole: Tensor) -> Tensor:
        """Shares in the present keys with all queries of a row below each other, (R, Y, C)."""
        by_row = whole.view(self.kv_shape[0], -1, whole.shape[2])
        return by_row[..., -self.kv_shape[2] :]

    def _heads_first(self, by_row: Tensor) -> Tensor:
        """(R, Y, X) as (key heads, R x queries, X)."""
        rows, kv_heads = self.kv_shape[:2]
        return by_row.view(rows, kv_heads, -1, by_row.shape[-1]).transpose(0, 1).reshape(kv_heads, -1, by_row.shape[-1])

    def back(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of queries, present keys and present values, (R, heads, columns, head size), from that of the mixed values;
        with late values that of what enters their map, (R, C, D), in their place."""
        mixed = mixed.view_as(self.q)
        turned = mixed.transpose(1, 2).contiguous()
        parts = [torch.bmm(value, turned) for value in self.values]
        value = late_RCD = None
        if self.entering_RCD is None:
            value = torch.bmm(self._parts(self.share)[-1].transpose(1, 2), mixed).view(self.kv_shape)
        else:
            rows, kv_heads = self.kv_shape[:2]
            by_head = self._heads_first(mixed.view(rows, -1, mixed.shape[-1]))
            inner = torch.bmm(by_head, self.weights.value_HED).view(kv_heads, rows, -1, self.entering_RCD.shape[-1])
            inner_RYD = inner.transpose(0, 1).flatten(1, 2)
            parts.append(torch.bmm(self.entering_RCD, inner_RYD.transpose(1, 2).contiguous()))
            late_RCD = torch.bmm(self._present(self.share).transpose(1, 2), inner_RYD)
        share = self._across(parts)
        scores = torch._softmax_backward_data(share, self.share, -1, share.dtype).mul_(self.weights.scaling)
        parts_of_scores = self._parts(scores)
        q = _sum(parts_of_scores, self.keys).view(self.shape)
        key = torch.bmm(parts_of_scores[-1].transpose(1, 2), self.q).view(self.kv_shape)
        return q, key, value, late_RCD


def _sum(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The sum of the batched products."""
    out = torch.bmm(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        out.baddbmm_(a, b)
    return out


def _split(x_RCX: Tensor, heads: int) -> Tensor:
    """(R, C, heads, head size)."""
    return x_RCX.view(*x_RCX.shape[:2], heads, -1)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Divided by its root mean square, and one over that."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x * scale, scale


def _normed_back(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """Gradient of what was divided; ``grad`` is overwritten."""
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.addcmul_(normed, along, value=-1).mul_(scale)


def _rotated(x_RCHE: Tensor, turn_RC1F: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) of pairs that stand side by side, with heads first: (R, H, C, E)."""
    rows, columns, heads, size = x_RCHE.shape
    out = turn_RC1F.new_empty(rows, heads, columns, size // 2)
    torch.mul(_pairs(x_RCHE), turn_RC1F, out=out.transpose(1, 2))
    return torch.view_as_real(out).flatten(3)


def _rotated_back(grad_RHCE: Tensor, turn_RC1F: Tensor) -> Tensor:
    """Gradient of :func:`_rotated`, (R, C, H x E)."""
    return torch.view_as_real(_pairs(grad_RHCE.transpose(1, 2)) * turn_RC1F.conj()).flatten(2)


def _pairs(x_E: Tensor) -> Tensor:
    """Neighbours as the parts of complex numbers, (..., E) as (..., E / 2)."""
    return torch.view_as_complex(x_E.view(*x_E.shape[:-1], -1, 2))


def _side_by_side(x_E: Tensor) -> Tensor:
    """The two halves' numbers in turn, along the last axis."""
    return x_E.reshape(*x_E.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2)
