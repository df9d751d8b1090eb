"""Products in float32: the way of workers/kernels/matmul.py against PyTorch's own, by the number of
rows.

    python benchmarks/bench_products.py [--quick]

Shapes are those of the linear maps of the embedded model and of a model of 512 hidden units,
forward and backward to the rows, as an edit's inner loop runs them. There is no target: the figures
say from how many rows the other library pays on this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import LOG, Report, alternate, median_ratio, parser
from torch import Tensor

from workers.kernels.matmul import linear

MAPS = ((128, 512), (512, 128), (128, 128), (512, 2048), (2048, 512))


def passes(product: Callable[[Tensor, Tensor], Tensor], x_NI: Tensor, weight_OI: Tensor, count: int) -> None:
    for _ in range(count):
        out_NO = product(x_NI, weight_OI)
        torch.autograd.grad(out_NO, x_NI, out_NO.detach())


def main(args: argparse.Namespace) -> None:
    report = Report("bench_products", args)
    rows = (64,) if args.smoke else (8, 16, 32, 64, 256, 1024)
    for in_features, out in MAPS[:1] if args.smoke else MAPS:
        weight_OI = torch.randn(out, in_features)
        for count in rows:
            x_NI = torch.randn(count, in_features, requires_grad=True)
            operations = 4 * count * in_features * out
            again = 1 if args.smoke else max(1, int(4e8 / operations))
            seconds = alternate(
                {
                    "torch": lambda x=x_NI, w=weight_OI, n=again: passes(F.linear, x, w, n),  # type: ignore[misc]
                    "ours": lambda x=x_NI, w=weight_OI, n=again: passes(linear, x, w, n),  # type: ignore[misc]
                },
                1 if args.smoke else 3 if args.quick else 7,
            )
            rate = {name: operations * again / sorted(s)[len(s) // 2] / 1e9 for name, s in seconds.items()}
            LOG.info(
                "%4d rows, %4d -> %4d: PyTorch %4.0f GFLOP/s, ours %4.0f GFLOP/s (%.2fx)",
                *(count, in_features, out, rate["torch"], rate["ours"]),
                median_ratio(seconds["torch"], seconds["ours"]),
            )
    report.close()


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
