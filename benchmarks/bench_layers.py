"""Decoder layers written out (workers/kernels/llama_cpu.py) against the same layers run by their modules, as an edit's
inner loop runs them.

    python benchmarks/bench_layers.py [--quick]

Forward and backward of what is left of the embedded model above an edited layer, for the batches that FT, ROME and WISE bring:
how many rows, how many of their columns change, how many are read. There is no target: the figures say what it gains here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import LOG, Report, alternate, median_ratio, parser

from workers.inner_loop.suffix import Suffix
from workers.model.base import BaseModel
from workers.model.batch import Encoded, collate
from workers.model.config import ModelConfig
from workers.session import Session


@dataclass(frozen=True)
class LayerBatch:
    title: str
    layer: int
    rows: int
    columns: int
    changed: int
    """The last columns at which the edited map's answer changes."""
    read: int
    """The last columns whose hidden states the loss reads."""


BATCHES = (
    LayerBatch("FT, 50 short rows", layer=3, rows=50, columns=13, changed=13, read=1),
    LayerBatch("ROME, 4 requests in 12 contexts", layer=0, rows=48, columns=27, changed=4, read=3),
    LayerBatch("WISE, 4 requests in 11 contexts", layer=4, rows=44, columns=26, changed=26, read=3),
)


def steps(base: BaseModel, batch: LayerBatch) -> dict[str, Callable[[], object]]:
    """One forward and backward each way."""
    ids = torch.randint(3, base.vocab, (batch.rows, batch.columns), generator=torch.Generator().manual_seed(0))
    rows = collate([Encoded(tuple(row), batch.columns) for row in ids.tolist()], [0] * batch.rows, base.encoder.pad_id)
    places = [(row, batch.columns - 1 - i) for row in range(batch.rows) for i in range(batch.read)]
    reads = ([row for row, _ in places], [column for _, column in places])
    first = batch.columns - batch.changed
    written_out = Suffix.capture(base, base.site(batch.layer), rows, reads, first)
    assert written_out._layers is not None and all(layer.quick is not None for layer in written_out._layers)
    modules = replace(written_out, _layers=tuple(replace(layer, quick=None) for layer in written_out._layers))
    answer_BSO = written_out.output_BSO[:, first:].clone().requires_grad_()

    def step(suffix: Suffix) -> object:
        out_PD = suffix.hidden(answer_BSO)
        return torch.autograd.grad(out_PD, answer_BSO, torch.ones_like(out_PD))

    return {"modules": lambda: step(modules), "written out": lambda: step(written_out)}


def main(args: argparse.Namespace) -> None:
    report = Report("bench_layers", args)
    base = Session.open(ModelConfig(device="cpu"), args.threads).base
    for batch in BATCHES:
        seconds = alternate(steps(base, batch), 1 if args.smoke else 15 if args.quick else 60)
        ms = {name: 1e3 * sorted(s)[len(s) // 2] for name, s in seconds.items()}
        LOG.info(
            "%s, %d layers, %d x %d columns: modules %.1f ms a step, written out %.1f ms (%.2fx)",
            *(batch.title, len(base.layers) - 1 - batch.layer, batch.rows, batch.changed),
            *(ms["modules"], ms["written out"], median_ratio(seconds["modules"], seconds["written out"])),
        )
    report.close()


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
