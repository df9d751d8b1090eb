"""torch.compile for large models on a GPU. Elsewhere, and after a compiler failure, the same code
runs uncompiled.

>>> compiled = Compiled(updates=True, layers=False)
>>> compiled.update(move)(weight_LOI, gradient_LOI)  # one pass over memory, not a dozen
>>> hidden_BSD = compiled.layer(base.layers[30])(hidden_BSD, **arguments)  # here uncompiled: layers=False

*Updates* of large weights are element-wise; compiled, they give the same bits whatever was compiled
before. A decoder *layer* runs about a hundred small kernels, most of them limited by memory
bandwidth, and about a dozen when compiled. But it contains reductions, and the order of their sums
depends on the shapes that the compiler saw first (measured: two actors with their batches in
different order gave different bits). So layers are compiled only on request (``model.compile``),
and never for scoring.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

LOG = logging.getLogger(__name__)

WORTH = 1_000_000_000
"""Number of parameters from which compiling saves time on a GPU."""

F = TypeVar("F", bound=Callable[..., Any])


class Compiled:
    """The compiled functions of one model."""

    def __init__(
        self, updates: bool = False, layers: bool = False, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        """``updates``, ``layers``: True to compile them."""
        self.updates = updates
        self.layers = layers
        self.broken = False
        """True after a compiler failure: functions then run uncompiled."""
        self._backend = backend
        self._made: dict[Any, Callable[..., Any]] = {}

    def layer(self, module: nn.Module) -> Callable[..., Any]:
        """The compiled forward of a decoder layer; the layer itself where an overlay overrides a
        part of it."""
        if not self.layers or self.broken or any("forward" in part.__dict__ for part in module.modules()):
            return module
        return self._wrap(module)

    def update(self, function: F) -> F:
        """Compile a function that changes large tensors in place, element by element."""
        return self._wrap(function) if self.updates and not self.broken else function

    def turns(self, lanes: int) -> list[slice]:
        """The lanes of each call of an update: all at once, or one by one if it runs uncompiled,
        because it then needs about a dozen temporaries per lane."""
        return [slice(lane, lane + 1) for lane in range(lanes)] if self.broken else [slice(None)]

    def _wrap(self, function: F) -> F:
        made = self._made.get(function)
        if made is None:
            made = self._made[function] = _CompiledOrEager(self, function)
        return made  # type: ignore[return-value]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile once for all shapes."""
        if self._backend != "inductor":
            return torch.compile(function, dynamic=True, backend=self._backend)
        import torch._inductor.config as inductor

        options: dict[str, Any] = {
            name: True for name in ("deterministic", "batch_invariant") if hasattr(inductor, name)
        }
        return torch.compile(function, dynamic=True, options=options)

    def give_up(self, error: Exception) -> None:
        """Stop compiling: the machine has no working compiler, or it does not support this
        model."""
        self.broken = True
        LOG.warning(
            "torch.compile failed, so edits run uncompiled, which takes longer and changes results by "
            "rounding: %s",
            " ".join(str(error).split())[:300],
        )


class _CompiledOrEager:
    """Calls the compiled function, or the original one after a compiler failure."""

    def __init__(self, owner: Compiled, function: Callable[..., Any]) -> None:
        self.owner = owner
        self.function = function
        self.compiled = owner.compile(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        if self.owner.broken:
            return self.function(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except TorchDynamoException as error:
            self.owner.give_up(error)
            return self.function(*args, **kwargs)
