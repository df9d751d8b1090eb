"""Planning sweeps of 1,000, 10,000 and 100,000 cells, seconds and memory; and how near a plan's
schedule comes to its bound.

    python benchmarks/bench_plan.py

The schedule is that of ``sweeps/wise_table2.yaml`` on 64 actors, simulated, against the longest
shard or an even share of all work, whichever is more; with LLaMA-2-7B's geometry without its
weights, and the embedded requests.

Five method variants, four T, and as many seeds as the number of cells asks for; N = 1000, so that
ten thousand cells are ten million edits in tens of thousands of shards. Each size runs in a process
of its own, whose peak memory is taken with and without the plan. Timed is
:func:`orchestrator.planning.plan.make_plan` of an empty results folder: reading the data set,
hashing the model, cells, shards, launch order. Importing torch is not (it does not grow).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import yaml
from common import LOG, Report, parser

from orchestrator.planning.makespan import Simulation

VARIANTS = 5
T_VALUES = (1, 10, 100, 1000)
ACTORS = 64
SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"


def plan_once(cells: int) -> dict[str, float]:
    """Plan ``cells`` cells in this process."""
    from orchestrator.planning.plan import make_plan
    from orchestrator.planning.spec import parse_spec
    from workers import methods, stream

    assert methods.method_names() and stream.Stream  # torch is imported before the clock starts
    raw = {
        "name": "plan",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": 1000},
        "grid": {"T": list(T_VALUES), "seeds": list(range(cells // (VARIANTS * len(T_VALUES))))},
        "methods": [
            {"method": "ft", "label": f"ft-{i}", "hparams": {"num_steps": 10 + i}} for i in range(VARIANTS)
        ],
    }
    spec = parse_spec(yaml.safe_dump(raw), "bench_plan", Path("/"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, busy = time.perf_counter(), time.process_time()
    plan = make_plan(spec)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(plan.cells) == cells
    return {
        "seconds": seconds,
        "processor": busy,
        "megabytes": (after - before) / 1024,
        "shards": len(plan.shards),
    }


def makespan(actors: int) -> Simulation:
    """How `wise_table2.yaml` would end."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from orchestrator.planning.plan import make_plan
    from orchestrator.planning.spec import parse_spec
    from workers.model.config import ModelConfig, resolve
    from workers.model.tokenizer import load_tokenizer

    raw = yaml.safe_load((SWEEPS / "wise_table2.yaml").read_text(encoding="utf-8"))
    raw["dataset"] = {"kind": "tinyworld", "edits": 1000}
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(
            folder
        )  # its defaults are LLaMA-2-7B's sizes
        save_file({"x": torch.zeros(1)}, Path(folder) / "model.safetensors")
        load_tokenizer(resolve(ModelConfig()), "embedded").save_pretrained(folder)
        raw["model"]["name"] = folder
        return make_plan(parse_spec(yaml.safe_dump(raw), "bench_plan", Path("/"))).simulate(actors)


def in_own_process(cells: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", str(cells)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.one is not None:
        sys.stdout.write(json.dumps(plan_once(args.one)) + "\n")
        return
    report = Report("bench_plan", args)
    found = makespan(ACTORS)
    longest, even = (f"{part / found.makespan:.0%}" for part in (found.longest, found.total / ACTORS))
    note = f"of its time, the longest shard takes {longest}, an even share of all work {even}"
    report.at_most(
        f"wise_table2.yaml, simulated on {ACTORS} actors, against its bound", found.ratio, 1.1, "x", note
    )
    sizes = (20, 200, 2000) if args.smoke else (1000, 10_000, 100_000)
    repeats = 1 if args.smoke else 3 if args.quick else 5
    seconds: dict[int, float] = {}
    processor: dict[int, float] = {}
    for cells in sizes:
        once = args.quick and cells == sizes[-1]  # it takes long enough to even out what disturbs it
        runs = [in_own_process(cells) for _ in range(1 if once else repeats)]
        seconds[cells] = statistics.median(run["seconds"] for run in runs)
        processor[cells] = min(run["processor"] for run in runs)
        LOG.info(
            "%7d cells, %7d shards: %6.2f s (%.2f s processor), %6.0f MB more",
            cells,
            runs[0]["shards"],
            seconds[cells],
            processor[cells],
            runs[0]["megabytes"],
        )
    (low, middle), (_, high) = pairwise(sizes)
    report.at_most(f"planning {middle:,} cells", seconds[middle], 5, "s")
    # what every plan costs, reading the data set and hashing the model, cancels in the differences
    more = [(processor[b] - processor[a]) / (b - a) for a, b in pairwise(sizes)]
    report.at_most(
        f"processor seconds of a further cell, {middle:,} to {high:,} cells against {low:,} to {middle:,} "
        f"(linear: 1)",
        more[1] / more[0],
        1.5,
        "x",
    )
    report.close()


if __name__ == "__main__":
    main()
