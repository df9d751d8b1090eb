"""Matrix products in float32 on a CPU, by the faster of two libraries.

>>> out_BSO = linear(x_BSI, weight_OI, bias_O)  # torch.nn.functional.linear up to rounding, gradients included
>>> use_fast_linear(model)  # every linear map of the model uses it

PyTorch computes such products with MKL, which uses AVX-512 only on Intel CPUs. oneDNN, which
PyTorch contains as well, uses AVX-512 on any CPU that has it: on an AMD EPYC it is up to 2.2 times
as fast (``benchmarks/bench_products.py``), on Intel CPUs slower than MKL. For small products MKL
has less overhead. The choice depends only on the product's shape, its precision and the CPU type,
so the same batch always gives the same bits. Without oneDNN's operator or AVX-512, PyTorch's own
products are used.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ROWS = 8
_MULTIPLICATIONS = 1 << 21
"""Rows and multiplications of one product from which oneDNN is faster; below, its overhead is
larger than the gain."""


def linear(x_BSI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x W^T + b``, (..., O). Differentiable once."""
    if not _use_onednn(x_BSI, x_BSI.shape[:-1].numel(), weight_OI.shape[0]):
        return F.linear(x_BSI, weight_OI, bias_O)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_BSI, weight_OI, bias_O)):
        out: Tensor = _Linear.apply(x_BSI, weight_OI, bias_O)  # type: ignore[no-untyped-call]
        return out
    return _product(x_BSI, weight_OI, bias_O)


def wide_linear(x_BSI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x W^T + b`` in ``dtype``, (..., O), for inputs of any precision.

    On a GPU, bfloat16 inputs are not cast first: products of two bfloat16 numbers are exact in
    float32, and the matrix units sum them in float32, ten times as fast as float32 products.
    """
    narrow = x_BSI.dtype == weight_OI.dtype == torch.bfloat16 and dtype == torch.float32
    if narrow and x_BSI.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
        out_NO: Tensor = _WideProduct.apply(x_BSI.flatten(0, -2), weight_OI)  # type: ignore[no-untyped-call]
        out = out_NO.view(*x_BSI.shape[:-1], -1)
        return out if bias_O is None else out + bias_O.to(dtype)
    return linear(x_BSI.to(dtype), weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))


def lane_products(left_LMI: Tensor, right_LNI: Tensor) -> Tensor:
    """``left right^T`` of every lane, (L, M, N). Not differentiable."""
    if not _use_onednn(left_LMI, left_LMI.shape[1], right_LNI.shape[1]):
        return torch.bmm(left_LMI, right_LNI.transpose(1, 2))
    return torch.stack(
        [_product(left_MI, right_NI) for left_MI, right_NI in zip(left_LMI, right_LNI, strict=True)]
    )


def product_into(out_MN: Tensor, left_MI: Tensor, right_NI: Tensor) -> None:
    """``left right^T``, written to ``out``. Not differentiable."""
    if _use_onednn(left_MI, left_MI.shape[0], right_NI.shape[0]):
        out_MN.copy_(_product(left_MI, right_NI))
    else:
        torch.mm(left_MI, right_NI.T, out=out_MN)


class _QuickLinear(nn.Linear):
    def forward(self, x_BSI: Tensor) -> Tensor:
        return linear(x_BSI, self.weight, self.bias)


class _QuickConv1D(Conv1D):
    def forward(self, x_BSI: Tensor) -> Tensor:
        return linear(x_BSI, self.weight.T, self.bias)


_QUICK: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {nn.Linear: _QuickLinear, Conv1D: _QuickConv1D}
)


def use_fast_linear(model: nn.Module) -> None:
    """Make the linear maps of a model on a CPU use :func:`linear`. Only their class changes."""
    if _available() and all(p.device.type == "cpu" for p in model.parameters()):
        _change(model, _QUICK)


def slow(model: nn.Module) -> None:
    """Undo :func:`use_fast_linear` (for benchmarks)."""
    _change(model, {quick: plain for plain, quick in _QUICK.items()})


def _change(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_BSI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        context.save_for_backward(x_BSI if context.needs_input_grad[1] else None, weight_OI)
        return _product(x_BSI, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_BSO,) = grads
        x_BSI, weight_OI = context.saved_tensors
        needs_x, needs_weight, needs_bias = context.needs_input_grad
        grad_NO = grad_BSO.flatten(0, -2)
        return (
            _product(grad_BSO, weight_OI.T) if needs_x else None,
            _product(grad_NO.T, x_BSI.flatten(0, -2).T) if needs_weight else None,
            grad_NO.sum(0) if needs_bias else None,
        )


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        context.save_for_backward(weight_OI)
        return torch.mm(x_NI, weight_OI.T, out_dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_NO,) = grads
        (weight_OI,) = context.saved_tensors
        # the gradient as a sum of two bfloat16 numbers: one alone would lose its float32 precision
        high_NO = grad_NO.to(weight_OI.dtype)
        low_NO = (grad_NO - high_NO).to(weight_OI.dtype)
        parts = [torch.mm(part_NO, weight_OI, out_dtype=torch.float32) for part_NO in (high_NO, low_NO)]
        return (parts[0] + parts[1]).to(weight_OI.dtype), None


def _use_onednn(left: Tensor, rows: int, columns: int) -> bool:
    """Return whether oneDNN computes ``rows x columns`` sums over the last axis of ``left``."""
    return (
        rows >= _ROWS
        and rows * columns * left.shape[-1] >= _MULTIPLICATIONS
        and left.dtype == torch.float32
        and left.device.type == "cpu"
        and _available()
    )


def _available() -> bool:
    """Return whether oneDNN is available and faster than MKL."""
    capable = torch.backends.cpu.get_cpu_capability() == "AVX512" and not _intel()
    return capable and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _intel() -> bool:
    """Return whether the CPU is an Intel one: MKL decides by the vendor's name whether to use
    AVX-512."""
    known = Path("/proc/cpuinfo")
    return "GenuineIntel" in (known.read_text() if known.exists() else platform.processor())


def _product(x_BSI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_BSI, weight_OI, bias_O, "none", [], "")
    return out
