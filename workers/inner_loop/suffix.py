"""The part of a forward pass that an edit's inner loop has to repeat.

>>> suffix = Suffix.capture(base, site, batch, reads)  # one forward; reads: (row, column) of each loss position
>>> hidden_PD = suffix.hidden(site_output_BSO)               # every optimisation step, gradients flow
>>> hidden_PD = suffix.hidden()  # output of the site's module (inside overlay.installed)

What no step changes is computed once; what the loss does not depend on is not computed:

- the input of the edited map and the rest of its layer are constant: a step starts at the map's
  output;
- rows without a loss position need no layer above the map;
- columns before the first one whose output changes keep their keys and values (attention is
  causal);
- in the last layer, columns before the first one that is read give only keys and values.

The hidden states equal those of :func:`workers.model.replay.replay` up to rounding (products of
other shapes round differently). Scoring therefore uses ``replay``, which has the bits of the full
forward. This works for every decoder of ``ARCHITECTURES`` (:mod:`workers.model.architectures`)
whose layer adds the edited map's output to a sum; for any other map (attention projections, the
MLP's input) the layers are replayed from the map's layer on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workers.kernels.compiled import Compiled
from workers.model.batch import Batch
from workers.model.replay import Prefix, capture, override_forward, replay

if TYPE_CHECKING:
    from workers.model.base import BaseModel, Site
    from workers.model.overlay import Overlay

_COLUMN_AXIS: Mapping[str, int] = MappingProxyType(
    {"attention_mask": 2, "position_ids": 1, "position_embeddings": 1, "cache_position": 0}
)
"""The axis of a layer's argument that runs over the query columns (the keys' axis of a mask is not
cut)."""

_CACHES = ("past_key_values", "layer_past")
"""Names of the key-value cache among decoder layers' arguments."""


@dataclass(frozen=True)
class Suffix:
    """The captured constants of one batch; runs the remaining layers. Made by :meth:`capture`."""

    base: BaseModel
    site: Site
    batch: Batch
    input_BSI: Tensor
    """Input of the edited map."""
    output_BSO: Tensor
    """Output of the map at capture."""
    layer_BSD: Tensor
    """Output of the map's whole layer."""
    row_P: Tensor
    column_P: Tensor
    first: int
    """Columns before this one never change; ``hidden`` takes the map's output from this column
    on."""
    _layers: tuple[_Layer, ...] | None
    _rest_BSD: Tensor
    _kept_R: Tensor | None
    _prefix: Prefix

    @classmethod
    @torch.no_grad()
    def capture(
        cls,
        base: BaseModel,
        site: Site,
        batch: Batch,
        reads: tuple[Sequence[int], Sequence[int]],
        first: int = 0,
        overlay: Overlay | None = None,
    ) -> Suffix:
        """Run one forward and keep what later steps need.

        ``reads``: rows and padded columns whose hidden states are read, in that order. ``first``:
        the first column at which a step changes the map's output. ``overlay``: earlier edits,
        constant in all steps.
        """
        caught: list[tuple[Tensor, Tensor]] = []
        layer_out: list[Any] = []
        additive = site.is_mlp_output(base.arch)
        upper = base.layers[site.layer + 1 :]
        recorders = (
            {i: _Recorder() for i in range(site.layer + 1, len(base.layers))} if first and additive else {}
        )
        with ExitStack() as stack:
            if overlay is not None:
                stack.enter_context(overlay.installed(batch))
            note = site.module.register_forward_hook(lambda _, args, out: caught.append((args[0], out)))
            stack.callback(note.remove)
            last = base.layers[site.layer].register_forward_hook(lambda _, args, out: layer_out.append(out))
            stack.callback(last.remove)
            for i, recorder in recorders.items():
                stack.callback(_record(base.layers[i], recorder))
            if additive and not recorders:
                for layer in upper:  # only their other arguments are needed
                    stack.enter_context(override_forward(layer, lambda *_, **__: layer_out[0]))
            prefix = capture(base, batch, site.layer)
        (entered_BSI, output_BSO), hidden_BSD = caught[0], _hidden(layer_out[0])
        row, column = reads
        device = batch.input_ids_BS.device
        kept = sorted(set(row))
        all_rows = len(kept) == batch.size
        kept_R = None if all_rows else torch.tensor(kept, device=device)
        place = {r: i for i, r in enumerate(kept)}
        row_P = torch.tensor([place[r] for r in row], device=device)
        column_P = torch.tensor(list(column), device=device)
        layers = None
        if additive:
            layers = _prepare(base, batch, prefix, site.layer + 1, kept_R, first, min(column), recorders)
        if layers is None:
            if additive and not recorders:  # the upper layers must run after all
                prefix = capture(base, batch, site.layer)
            row_P, kept_R, first = torch.tensor(list(row), device=device), None, 0
        rest_BSD = hidden_BSD[:0]
        if layers is not None:
            # in the masters' precision: in bfloat16, subtracting the output and adding it again
            # would not restore the sum
            wide = base.master_dtype
            rest_BSD = (hidden_BSD.to(wide) - output_BSO.to(wide))[:, first:]
            rest_BSD = rest_BSD if kept_R is None else rest_BSD[kept_R]
        return cls(
            base,
            site,
            batch,
            entered_BSI,
            output_BSO,
            hidden_BSD,
            row_P,
            column_P,
            first,
            layers,
            rest_BSD,
            kept_R,
            prefix,
        )

    def hidden(self, output_BSO: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm at the positions that are read, (P, D).

        ``output_BSO``: the map's current output from column ``first`` on; None: the site's module
        computes it.
        """
        if self._layers is None:
            answer = output_BSO
            with (
                override_forward(self.site.module, lambda *_: answer) if answer is not None else nullcontext()
            ):
                return replay(self.base, self._prefix)[self.row_P, self.column_P]
        if output_BSO is None:
            output_BSO = self.site.module(self.input_BSI[:, self.first :])
        output_RSO = output_BSO if self._kept_R is None else output_BSO[self._kept_R]
        hidden_RSD = (self._rest_BSD + output_RSO.to(self._rest_BSD.dtype)).to(self.base.dtype)
        start = self.first
        for layer in self._layers:
            hidden_RSD = layer(hidden_RSD)
            start += layer.given
        normed: Tensor = self.base.norm(hidden_RSD[self.row_P, self.column_P - start])
        return normed

    def part(self, row_B: Sequence[int], batch: Batch, read_P: Sequence[int]) -> Suffix:
        """The same suffix for rows ``row_B`` of the batch and reads ``read_P``. ``batch``: the new
        batch of these rows."""
        index = torch.tensor(list(row_B), device=self.row_P.device)
        chosen = torch.tensor(list(read_P), device=self.row_P.device)
        old_row_P = self.row_P[chosen] if self._kept_R is None else self._kept_R[self.row_P[chosen]]
        place = torch.full((self.batch.size,), -1, dtype=torch.long, device=index.device)
        place[index] = torch.arange(len(row_B), device=index.device)
        row_P = place[old_row_P]
        kept_R, inner = None, index
        if self._kept_R is not None:
            inside = torch.full((self.batch.size,), -1, dtype=torch.long, device=index.device)
            inside[self._kept_R] = torch.arange(len(self._kept_R), device=index.device)
            inner = inside[index]
            kept_R = torch.nonzero(inner >= 0)[:, 0]
            inner = inner[kept_R]
            among = torch.full((len(row_B),), -1, dtype=torch.long, device=index.device)
            among[kept_R] = torch.arange(len(kept_R), device=index.device)
            row_P = among[row_P]
        return replace(
            self,
            batch=batch,
            input_BSI=self.input_BSI[index],
            output_BSO=self.output_BSO[index],
            layer_BSD=self.layer_BSD[index],
            row_P=row_P,
            column_P=self.column_P[chosen],
            _layers=None if self._layers is None else tuple(layer.part(inner) for layer in self._layers),
            _rest_BSD=self._rest_BSD if self._layers is None else self._rest_BSD[inner],
            _kept_R=kept_R,
            _prefix=self._prefix.part(index) if self._layers is None else self._prefix,
        )


@dataclass(frozen=True)
class _Layer:
    """One decoder layer with its constant arguments.

    The first ``given`` columns give only keys and values. ``arguments`` belong to the columns after
    them, ``key_arguments`` to these first ones. ``past`` holds keys and values of columns that
    never change.
    """

    module: nn.Module
    compiled: Compiled
    cache: str
    arguments: Mapping[str, Any]
    key_arguments: Mapping[str, Any] | None
    given: int
    past: tuple[Tensor, Tensor] | None
    query: nn.Module | None
    """The attention's query projection, if it is a separate map: skipped for columns that give only
    keys and values."""

    def __call__(self, hidden_RSD: Tensor) -> Tensor:
        past = self.past
        if self.key_arguments is not None:
            recorder = _Recorder(stop=True)
            with (
                override_forward(self.query, _zeros_forward(self.query))
                if self.query is not None
                else nullcontext()
            ):
                try:
                    self.module(hidden_RSD[:, : self.given], **{**self.key_arguments, self.cache: recorder})
                except StopRecording:
                    past = recorder.joined(past)
            hidden_RSD = hidden_RSD[:, self.given :]
        if past is not None:
            return _hidden(self.module(hidden_RSD, **self.arguments, **{self.cache: _Past(*past)}))
        return _hidden(self.compiled.layer(self.module)(hidden_RSD, **self.arguments))

    def part(self, index_R: Tensor) -> _Layer:
        rows = self.past[0].shape[0] if self.past is not None else None
        chosen = {name: _rows_of(value, index_R, name) for name, value in self.arguments.items()}
        keys = self.key_arguments
        return replace(
            self,
            arguments=chosen,
            key_arguments=None if keys is None else {k: _rows_of(v, index_R, k) for k, v in keys.items()},
            past=None
            if rows is None or self.past is None
            else (self.past[0][index_R], self.past[1][index_R]),
        )


def _prepare(
    base: BaseModel,
    batch: Batch,
    prefix: Prefix,
    above: int,
    kept_R: Tensor | None,
    first: int,
    read_from: int,
    recorders: Mapping[int, _Recorder],
) -> tuple[_Layer, ...] | None:
    """The layers from ``above`` on with their arguments cut to the needed rows and columns; None if
    an argument is unknown."""
    prepared = []
    for i in range(above, len(base.layers)):
        module = base.layers[i]
        args, kwargs = prefix.calls[i - above + 1]
        names = list(inspect.signature(module.forward).parameters)
        arguments = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        cache = next((name for name in _CACHES if name in names), None)
        if cache is None or "attention_mask" not in names:
            return None
        arguments = {k: v for k, v in arguments.items() if k not in (*_CACHES, "use_cache") and v is not None}
        if "attention_mask" not in arguments:
            if base.model.config._attn_implementation != "sdpa":
                return None
            arguments["attention_mask"] = _causal(batch)
        if not all(_can_cut(name, value) for name, value in arguments.items()):
            return None
        if kept_R is not None:
            arguments = {name: _rows_of(value, kept_R, name, batch.size) for name, value in arguments.items()}
        given = read_from - first if i == len(base.layers) - 1 else 0
        past = None
        if first:
            past = recorders[i].joined(None)
            past = (past[0][:, :, :first], past[1][:, :, :first])
            past = past if kept_R is None else (past[0][kept_R], past[1][kept_R])
        key_arguments = None
        if given:
            key_arguments = {
                name: _columns(value, name, first, first + given) for name, value in arguments.items()
            }
        cut = {name: _columns(value, name, first + given, None) for name, value in arguments.items()}
        attention = base.arch.attn_in
        query = module.get_submodule(attention[0]) if len(attention) == 3 else None  # query, key, value
        prepared.append(_Layer(module, base.compiled, cache, cut, key_arguments, given, past, query))
    return tuple(prepared)


def _causal(batch: Batch) -> Tensor:
    """The causal mask that applies where a layer gets no mask, (B, 1, S, S)."""
    real_BS = batch.attention_mask_BS.bool()
    size = real_BS.shape[1]
    triangle_SS = torch.ones(size, size, dtype=torch.bool, device=real_BS.device).tril()
    return triangle_SS[None, None] & real_BS[:, None, None]


def _can_cut(name: str, value: Any) -> bool:
    """Return whether rows and columns of an argument can be cut: a tensor of known name and shape,
    or no tensor."""
    tensors = [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, Tensor)]
    if not tensors:
        return True
    if name == "attention_mask":
        return all(t.dim() == 4 for t in tensors)
    return name in _COLUMN_AXIS


def _columns(value: Any, name: str, start: int, stop: int | None) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_columns(v, name, start, stop) for v in value)
    if not isinstance(value, Tensor):
        return value
    axis = _COLUMN_AXIS[name]
    return value[(slice(None),) * axis + (slice(start, stop),)]


def _rows_of(value: Any, index_R: Tensor, name: str, size: int | None = None) -> Any:
    """Some rows of an argument; an argument that all rows share is returned unchanged."""
    if isinstance(value, tuple | list):
        return tuple(_rows_of(v, index_R, name, size) for v in value)
    shared = not isinstance(value, Tensor) or name == "cache_position" or value.shape[0] == 1 != size
    return value if shared else value[index_R]


class StopRecording(Exception):
    """Raised when keys and values are known, to skip the rest of the layer."""


class _Recorder:
    """Takes the place of a layer's key-value cache and stores the keys and values it is given."""

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop
        self.pair: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.pair = (keys, values)
        if self.stop:
            raise StopRecording
        return keys, values

    def joined(self, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Its keys and values, after those of ``past``. Axes: (rows, heads, columns, head size)."""
        assert self.pair is not None
        if past is None:
            return self.pair
        return torch.cat([past[0], self.pair[0]], 2), torch.cat([past[1], self.pair[1]], 2)


class _Past:
    """Takes the place of a layer's key-value cache: constant keys and values of earlier columns."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


def _record(layer: nn.Module, recorder: _Recorder) -> Any:
    """Record keys and values of a layer's next forwards; return a function that ends the
    recording."""
    names = list(inspect.signature(layer.forward).parameters)
    cache = next((name for name in _CACHES if name in names), None)

    def give(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if cache is None:
            return args, kwargs
        at = names.index(cache)
        if len(args) > at:
            return (*args[:at], recorder, *args[at + 1 :]), kwargs
        return args, {**kwargs, cache: recorder}

    return layer.register_forward_pre_hook(give, with_kwargs=True).remove


def _zeros_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward that returns zeros of the module's output shape, which take no memory."""
    width = int(module.get_parameter("weight").shape[0])
    return lambda x_BSD: x_BSD.new_zeros(()).expand(*x_BSD.shape[:-1], width)


def _hidden(out: Any) -> Tensor:
    """A decoder layer's hidden states."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden
