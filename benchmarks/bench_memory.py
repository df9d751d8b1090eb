"""Peak memory of an actor against what `plan` states for it, and whether weights are held once.

    python benchmarks/bench_memory.py [--quick] [--models embedded llama-60m] [--methods ft rome ...]

Each case is a process of its own that imports everything, plans, loads the model and runs every
shard of the plan as an actor does (edits, scores, journal; the activation cache is off). Its peak
resident memory beyond what the imports took is compared with
:meth:`orchestrator.planning.memory.Memory.peak`. What the method needs is built before, by another
process; few optimisation steps are enough, for every step takes the same memory. The 60 M Llama has
random weights, is saved once and loaded as a user's model.

**The allowance** is what an actor takes beyond the imports and the weights when it holds no edit
and scores one request, sequence by sequence, on the embedded model (method `none`): code of
libraries that is first used then, their buffers, the data set. It is measured first, in a process
of its own, and added to every figure that is stated.

**Weights are held once**: the peak of loading and then reading every weight (pages of a mapped file
count as they are read) against 1.1 times their bytes.

Peaks are Linux's (VmHWM, set back between phases through /proc/self/clear_refs); elsewhere all
targets are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import LOG, Report, parser

MIB = 1 << 20
TEMPLATES = [[5, 5], [10, 5]]
DEPTH = 0.6
HPARAMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {},
        "ft": {"objective": "target_new", "num_steps": 3, "lr": 1e-4},
        "grace": {"n_iter": 3},
        "rome": {"v_num_grad_steps": 3, "context_template_length_params": TEMPLATES},
        "memit": {"v_num_grad_steps": 3, "context_template_length_params": TEMPLATES},
        "wise": {"n_iter": 3, "context_template_length_params": TEMPLATES},
        "lora": {"num_steps": 3},
    }
)
"""As short as an edit can be; layers, and the text for second moments, are added by
:func:`hparams`."""

NEEDING = ("rome", "memit", "wise")
"""Methods that need something built."""

LANES = (1, 8)
QUICK_LARGE = ("ft", "memit")
"""What a quick run measures on the larger model: the widest overlay, and the most that lanes
share."""


@dataclass(frozen=True)
class Case:
    """One process: a model (``embedded`` or a folder), a method and its lanes, and where it
    works."""

    model: str
    method: str
    hparams: dict[str, Any]
    lanes: int
    T: int
    root: str
    build: bool = False
    """Only build what the method needs."""
    least: bool = False
    """One sequence is scored at a time."""


def hparams(method: str, layers: int) -> dict[str, Any]:
    """Settings for a model of so many layers."""
    layer = int(DEPTH * layers)
    where: dict[str, dict[str, Any]] = {
        "ft": {"layers": [layer]},
        "grace": {"layer": layer},
        "rome": {"layer": 1, "corpus": "embedded", "samples": 400},
        "memit": {"layers": [1, 2], "corpus": "embedded", "samples": 400},
        "wise": {"layer": layer},
    }
    return {**HPARAMS[method], **where.get(method, {})}


def measured(case: Case) -> dict[str, float]:
    """Run a case in this process; mebibytes of what was stated and of what it took."""
    import yaml

    from orchestrator.engine.worker import Worker
    from orchestrator.planning.plan import make_plan
    from orchestrator.planning.spec import parse_spec
    from workers import methods, stream

    assert methods.method_names() and stream.Stream  # imported before the base line is taken
    raw = {
        "name": "memory",
        "model": {"name": case.model, "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": case.lanes * case.T},
        "grid": {"T": [case.T], "seeds": [0]},
        "methods": [{"method": case.method, "hparams": case.hparams}],
        "scoring": {"generated": False, **({"rows_per_batch": 1} if case.least else {})},
        "engine": {"lanes": case.lanes, "cache_bytes": 0},
    }
    plan = make_plan(parse_spec(yaml.safe_dump(raw), "bench_memory", Path("/")))
    bench = Worker(case.root, "bench")
    if case.build:
        for artifact in plan.artifacts.values():
            bench.build(artifact, plan.common.model, plan.common.threads)
        return {}
    before = resident()
    forget_peak()
    session = bench.session(plan.common.model, plan.common.threads)
    for weight in session.base.model.parameters():
        weight.sum()
    loaded = peak()
    forget_peak()
    for shard in plan.shards:
        for _ in bench.run(plan.manifest(shard)):
            pass
    need = plan.memory[0, case.T]
    return {
        "weights": need.weights / MIB,
        "stated": need.peak(plan.lanes) / MIB,
        "loaded": (loaded - before) / MIB,
        "measured": (max(loaded, peak()) - before) / MIB,
    }


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    """Most resident bytes since the last :func:`forget_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (found,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(found.split()[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def in_own_process(case: Case) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(asdict(case))],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def saved_llama(folder: Path) -> str:
    """The random 60 M Llama of bench_edit.py with the embedded tokenizer, as a model's folder."""
    from bench_edit import model

    base = model("llama-60m")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def cases(
    names: Sequence[str], chosen: Sequence[str], args: argparse.Namespace, folder: Path
) -> list[tuple[str, Case]]:
    """Every case with what its line is to say."""
    from workers.model.base import model_shape
    from workers.model.config import ModelConfig

    found = []
    for name in names:
        model = name if name == "embedded" else saved_llama(folder / name)
        layers = model_shape(ModelConfig(name=model, device="cpu")).layers
        for method in chosen:
            if args.quick and name != "embedded" and method not in QUICK_LARGE:
                continue
            for lanes in LANES[-1:] if args.quick and method != "ft" else LANES:
                root = str(folder / f"{name}-{method}")
                case = Case(
                    model, method, hparams(method, layers), lanes, 1 if args.quick or args.smoke else 3, root
                )
                found.append((f"{method}, {lanes} lane{'s' * (lanes > 1)}, {name}", case))
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--models", nargs="*", choices=("embedded", "llama-60m"), default=["embedded", "llama-60m"]
    )
    made.add_argument("--methods", nargs="*", choices=sorted(HPARAMS), default=list(HPARAMS))
    made.add_argument("--one", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.one is not None:
        sys.stdout.write(json.dumps(measured(Case(**json.loads(args.one)))) + "\n")
        return
    report = Report("bench_memory", args)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        report.skipped("peak memory of an actor", "this system does not tell a process's peak (Linux does)")
        report.close()
        return
    names, chosen = (["embedded"], ["ft"]) if args.smoke else (args.models, args.methods)
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as made_here:
        folder = Path(made_here)
        bare = in_own_process(Case("embedded", "none", {}, 1, 1, str(folder / "bare"), least=True))
        allowance = bare["measured"] - bare["weights"]
        LOG.info(
            "allowance: %.0f MiB (%.0f without edits, less %.0f of weights)",
            allowance,
            bare["measured"],
            bare["weights"],
        )
        loads: dict[str, tuple[float, float]] = {}
        built: set[str] = set()
        for title, case in cases(names, chosen, args, folder):
            if case.method in NEEDING and case.root not in built:
                in_own_process(Case(**{**asdict(case), "build": True}))
                built.add(case.root)
            found = in_own_process(case)
            LOG.info(
                "%-28s stated %6.0f MiB (%.0f of weights) + allowance, measured %6.0f",
                *(title, found["stated"], found["weights"], found["measured"]),
            )
            goal = found["stated"] + allowance
            note = (
                f"stated {found['stated']:.0f}; with the allowance {goal / found['measured']:.1f}x what "
                f"it took"
            )
            report.at_most(f"peak of {title}", found["measured"], round(goal), "MiB", note)
            name = title.rsplit(", ", 1)[1]
            worst = max(loads.get(name, (0.0, 0.0))[0], found["loaded"])
            loads[name] = worst, found["weights"]
        for name, (worst, weights) in loads.items():
            goal = round(1.1 * weights + allowance)
            report.at_most(
                f"loading {name} and reading every weight", worst, goal, "MiB", f"weights {weights:.0f}"
            )
    report.close()


if __name__ == "__main__":
    main()
