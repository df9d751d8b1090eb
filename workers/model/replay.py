"""Run only the layers an edit can change (DESIGN section 5).

>>> prefix = capture(base, batch, first_layer=4)  # one full forward of the pristine base, no gradients
>>> with overlay.installed(batch):
...     hidden_BSD = replay(base, prefix)               # layers 4.. and the final norm; gradients flow

The activations entering layer L of an overlay that starts at L depend on the tokens alone, so they
are computed once per batch and not once per optimisation step. The result has the same bits as the
full forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from workers.model.base import BaseModel
    from workers.model.batch import Batch


ABOVE = sys.maxsize
"""Value of ``first_layer``: no layer is run again, only the final norm."""


@dataclass(frozen=True)
class Prefix:
    """Inputs of the decoder layers from ``first_layer`` on: the hidden states once, and each
    layer's other arguments.

    ``output_BSD`` is the pristine base's output, after the final norm.
    """

    first_layer: int
    hidden_BSD: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    output_BSD: Tensor

    def bytes(self) -> int:
        """Memory held, in bytes; a tensor that several layers share counts once."""
        found: dict[int, int] = {}

        def add(value: Any) -> None:
            if isinstance(value, Tensor):
                found[value.data_ptr()] = value.numel() * value.element_size()
            elif isinstance(value, tuple | list):
                for v in value:
                    add(v)
            elif isinstance(value, dict):
                add(list(value.values()))

        add([self.hidden_BSD, self.output_BSD, self.calls])
        return sum(found.values())

    def part(self, index_R: Tensor) -> Prefix:
        """The same for some of the rows. An argument that all rows share stays."""
        size = self.hidden_BSD.shape[0]

        def chosen(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return tuple(chosen(v) for v in value)
            return (
                value[index_R]
                if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == size
                else value
            )

        calls = tuple(
            (chosen(args), {k: chosen(v) for k, v in kwargs.items()}) for args, kwargs in self.calls
        )
        return Prefix(self.first_layer, self.hidden_BSD[index_R], calls, self.output_BSD[index_R])


@torch.no_grad()
def capture(base: BaseModel, batch: Batch, first_layer: int) -> Prefix:
    """Run the base once and keep the inputs of every layer from ``first_layer`` on (of the final
    norm, if there is no such layer)."""
    entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((args, kwargs))

    with ExitStack() as stack:
        for layer in base.layers[first_layer:] or [base.norm]:
            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        output = base.hidden_states(batch)
    args, kwargs = entered[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    # the hidden states of later layers are recomputed; keeping them would hold the whole forward in
    # memory
    calls = tuple((a[1:], {k: v for k, v in kw.items() if k != "hidden_states"}) for a, kw in entered)
    calls = calls if base.layers[first_layer:] else ()
    return Prefix(first_layer, hidden, calls, output)


@contextmanager
def override_forward(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling the module runs ``answer``; its hooks still run. Afterwards its own forward
    is restored."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = answer  # shadows the method, as assigning an attribute would
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def replay(base: BaseModel, prefix: Prefix) -> Tensor:
    """Hidden states after the final norm, (B, S, D), from the captured prefix through the layers as
    they are now."""
    hidden = prefix.hidden_BSD
    for layer, (args, kwargs) in zip(base.layers[prefix.first_layer :], prefix.calls, strict=True):
        out = layer(hidden, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    normed: Tensor = base.norm(hidden)
    return normed
