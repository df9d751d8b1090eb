"""What every benchmark shares: its arguments, the state of the machine, measurements side by side,
and targets.

    args = parser(__doc__).parse_args()
    report = Report("bench_x", args)                  # logging to stdout, the machine's state
    seconds = alternate({"ours": ours, "field": field}, repeats=5)
    report.at_least("ours against the field, 2 M parameters", median_ratio(seconds["field"], seconds["ours"]), 10, "x")
    report.close()  # PASS|SHORT  target  measured  (goal), one line each

Ratios are taken in one process, round by round: what else the machine does hits both sides alike.
Figures of different runs are not compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LOG = logging.getLogger("benchmark")
PACKAGES = ("torch", "transformers", "ray", "pyarrow", "duckdb")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments every benchmark takes; add others to it."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--quick", action="store_true", help="fewer repeats and sizes; the targets are still judged"
    )
    made.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that the code runs; figures mean nothing"
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="append one JSON line per target to FILE")
    made.add_argument("--threads", type=int, default=1, help="torch threads (default: 1, as one actor has)")
    return made


class Report:
    """Collects what a benchmark finds about its targets. Making one sets up logging and describes
    the machine."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        torch.set_num_threads(args.threads)
        self.name = name
        self.out: Path | None = args.out
        self.lines: list[dict[str, Any]] = []
        LOG.info("# %s%s", name, " --smoke" if args.smoke else " --quick" if args.quick else "")
        LOG.info("%s\n", machine())

    def at_most(self, target: str, measured: float, goal: float, unit: str, note: str = "") -> None:
        """The target is met if ``measured`` is not above ``goal``; ``note`` says what else a reader
        should know."""
        self._add(target, measured, goal, unit, "<=", measured <= goal, note)

    def at_least(self, target: str, measured: float, goal: float, unit: str, note: str = "") -> None:
        self._add(target, measured, goal, unit, ">=", measured >= goal, note)

    def skipped(self, target: str, why: str) -> None:
        """A target that cannot be judged here: it is told, not left out."""
        self._keep({"benchmark": self.name, "verdict": "SKIP", "target": target, "note": why})

    def _add(
        self, target: str, measured: float, goal: float, unit: str, sign: str, met: bool, note: str
    ) -> None:
        self._keep(
            {
                "benchmark": self.name,
                "verdict": "PASS" if met else "SHORT",
                "target": target,
                "measured": measured,
                "goal": goal,
                "sign": sign,
                "unit": unit,
                "note": note,
            }
        )

    def _keep(self, line: dict[str, Any]) -> None:
        """At once into ``--out``, so that a benchmark that is stopped for its time has told what it
        found."""
        self.lines.append(line)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """The verdicts: one line per target."""
        LOG.info("\nload at the end: %s", _load())
        for line in self.lines:
            LOG.info("%s", verdict(line))


def verdict(line: Mapping[str, Any]) -> str:
    """One target as people read it."""
    note = f"  [{line['note']}]" if line["note"] else ""
    if line["verdict"] == "SKIP":
        return f"SKIP   {line['target']}{note}"
    unit = f" {line['unit']}" if line["unit"] else ""
    goal = f"({line['sign']} {line['goal']:g}{unit})"
    return f"{line['verdict']:<5}  {line['target']}  {line['measured']:.3g}{unit}  {goal}{note}"


def machine() -> str:
    """Processor, load, threads, versions, GPUs: what a figure cannot be read without."""
    versions = [f"Python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    lines = [
        f"processor: {_processor()}, {os.cpu_count()} cores; load {_load()}",
        f"torch threads: {torch.get_num_threads()}; {'; '.join(versions)}",
    ]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        lines.append(
            f"GPU {i}: {found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    return "\n".join(lines if torch.cuda.is_available() else [*lines, "GPU: none"])


def _load() -> str:
    return ", ".join(f"{value:.2f}" for value in os.getloadavg()) + " (1, 5, 15 minutes)"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown"


def clock(function: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def alternate(
    functions: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn: A B C A B C ... A function that returns a float
    timed itself."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            own = function()
            spent = time.perf_counter() - began
            if i >= warm_up:
                seconds[name].append(own if isinstance(own, float) else spent)
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of ``above / below``."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
