"""The kernels that one base model runs on, chosen by its device and size.

>>> base.kernels = Kernels.for_model(base.model, compile_layers=False)

A base model starts without them and gives the same numbers up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from workers.kernels.compiled import WORTH, Compiled
from workers.kernels.cuda_graphs import Pool
from workers.kernels.matmul import use_fast_linear


@dataclass
class Kernels:
    """Compiled updates and layers, and the memory for recorded steps."""

    compiled: Compiled = field(default_factory=Compiled)
    record: bool = False
    """Record the steps of edits as CUDA graphs; only on a GPU."""

    @cached_property
    def pool(self) -> Pool | None:
        """Memory of the recordings, made on first use; None: steps are not recorded."""
        return Pool() if self.record else None

    @classmethod
    def for_model(cls, model: nn.Module, compile_layers: bool) -> Kernels:
        """Choose the fastest kernels for this model and its device. On a CPU its linear maps change
        their class."""
        use_fast_linear(model)
        parameters = list(model.parameters())
        on_gpu = parameters[0].device.type == "cuda"
        large = on_gpu and sum(p.numel() for p in parameters) >= WORTH
        return cls(Compiled(updates=large, layers=compile_layers), record=on_gpu)
