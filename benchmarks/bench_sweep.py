"""Whole sweeps through Ray on the embedded model: against the field's loop, one actor against two,
and the overhead.

    python benchmarks/bench_sweep.py [--quick]

The field's side is benchmarks/reference.py and the one-at-a-time scoring of bench_score.py,
measured on a sample of each variant just before the sweep, scaled to its edits and scored requests,
and divided by the actors (as if its loops ran on all of them without loss; it generates no texts
and scores base models anew as its scripts do). Ours is the wall time from the first shard's start
to the last shard's end; outside it are only starting Ray and loading the model, which are told
apart. ``--quick`` runs ``sweeps/continual.yaml`` with N=100 and T=1, 10, 100; without it N=1000,
all four T.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from bench_score import one_at_a_time
from common import LOG, Report, clock, parser
from reference import LOOPS, as_it_comes

from orchestrator.engine.ray_engine.run import run_ray
from orchestrator.engine.run_state import Outcome
from orchestrator.engine.sweep import run_sweep
from orchestrator.engine.worker import StepReport
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.spec import SweepSpec, load_spec
from orchestrator.planning.work import Shard
from orchestrator.results.columns import VARYING, sort_rows
from orchestrator.results.query import open_results
from orchestrator.storage.local import LocalStore
from workers.data.tinyworld import load_dataset
from workers.methods import get_method
from workers.methods.base import ArtifactContext
from workers.model.config import fingerprint_model
from workers.model.overlay import DenseOverlay
from workers.rng import RandomStreams
from workers.session import Session, build_inputs

SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"


@dataclass
class Clock:
    """A view that shows nothing and notes when the work began and ended."""

    began: float = 0.0
    ended: float = 0.0
    notes: list[str] = field(default_factory=list)

    def begin(self, plan: Plan) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        LOG.warning("%s", text)

    def artifact_step(self, title: str, done: int, total: int, what: str) -> None: ...
    def artifact_ended(self, title: str) -> None: ...
    def shard_started(self, shard: Shard, title: str) -> None: ...

    def shard_step(self, step: StepReport) -> None:
        """An attempt's first report comes when its actor is there and has begun to load the
        model."""
        self.began = self.began or time.monotonic()

    def shard_ended(self, shard_id: str, ok: bool) -> None:
        self.ended = time.monotonic()

    def end(self) -> None: ...

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def sweep(spec: SweepSpec, folder: Path, actors: int) -> tuple[float, float, Outcome]:
    """Seconds of work, seconds of the whole call, and how it ended."""
    view = Clock()
    began = time.monotonic()
    outcome = run_sweep(spec, LocalStore(folder), run_ray, view, actors)
    if outcome.unfinished:
        raise RuntimeError(f"{len(outcome.unfinished)} cells did not finish: {outcome.errors}")
    return view.seconds, time.monotonic() - began, outcome


def comparable(folder: Path) -> pa.Table:
    """The rows of a results folder in their order, without what two runs may differ in."""
    return sort_rows(open_results(folder).table()).drop_columns(sorted(VARYING))


def inside(folder: Path) -> float:
    """Actor seconds of editing and scoring."""
    shards = open_results(folder).central.shards().values()
    return sum(shard.edit_seconds + shard.score_seconds for shard in shards)


def plain_seconds(spec: SweepSpec, sample: int) -> float:
    """What the field's loop takes for all cells of the sweep, on one core."""
    plan = make_plan(spec)
    session = Session.open(spec.model)
    base = as_it_comes(session.base)
    requests = list(load_dataset("tune").requests)[:sample]
    site = base.site(len(base.layers) - 1)
    scoring = (
        clock(lambda: one_at_a_time(base, DenseOverlay([site], 1, base.master_dtype), requests)) / sample
    )
    total = 0.0
    for v, variant in enumerate(plan.variants):
        kind = get_method(variant.algorithm)
        config = kind.Config.model_validate(variant.config)
        specs = config.artifacts(ArtifactContext(fingerprint_model(spec.model), spec.model, 0))
        inputs = build_inputs(base, specs)
        loop = LOOPS[variant.algorithm](base, config, inputs)
        seconds = []
        for i, request in enumerate(requests):
            draws = RandomStreams(variant.algorithm, variant.config, 0, i, 0)
            began = time.perf_counter()
            loop.edit(request, draws)
            loop.restore()
            seconds.append(time.perf_counter() - began)
        cells = [cell for cell in plan.cells if cell.variant == v]
        edits = sum(cell.groups * cell.T for cell in cells)
        # T=1 is scored once; longer groups right after each edit and again at their end
        scored = sum(cell.groups * cell.T * (1 if cell.T == 1 else 2) for cell in cells)
        mean = statistics.mean(seconds[1:])
        LOG.info(
            "the plain loop, %s: %.0f ms an edit, %.0f ms a scored request",
            variant.label,
            1e3 * mean,
            1e3 * scoring,
        )
        total += edits * mean + scored * scoring
    return total


def main(args: argparse.Namespace) -> None:
    report = Report("bench_sweep", args)
    grid = ("dataset.edits=100", "grid.T=[1,10,100]") if args.quick else ()
    if args.smoke:
        grid = ("dataset.edits=4", "grid.T=[1,4]")
    continual = load_spec(SWEEPS / "continual.yaml", grid)
    demo = load_spec(SWEEPS / "demo.yaml", ("dataset.edits=4", "grid.T=[1,4]") if args.smoke else ())
    with tempfile.TemporaryDirectory() as folder:
        work_two, whole, _ = sweep(demo, Path(folder) / "two", 2)
        work_one, _, _ = sweep(demo, Path(folder) / "one", 1)
        LOG.info(
            "demo: two actors %.1f s of work (%.1f s in all), one actor %.1f s", work_two, whole, work_one
        )
        report.at_most("demo: the whole sweep, two actors", whole, 120, "s")
        report.at_least("demo: two actors against one", work_one / work_two, 1.7, "x")
        rows = [comparable(Path(folder) / name) for name in ("one", "two")]
        differ = sum(a != b for a, b in zip(*(table.to_pylist() for table in rows), strict=True))
        report.at_most(
            "demo: rows that differ between one actor and two", differ, 0, "", f"of {rows[0].num_rows}"
        )
        plain = plain_seconds(continual, 2 if args.smoke else 6 if args.quick else 12)
        work, _, outcome = sweep(continual, Path(folder) / "continual", 2)
        edits = outcome.plan.edits
        LOG.info(
            "continual: %d edits in %.0f s; the plain loop on two cores would take %.0f s",
            edits,
            work,
            plain / 2,
        )
        name = f"continual (N={continual.dataset.edits}, T={','.join(map(str, continual.grid.T))})"
        report.at_least(f"{name}: two actors against the plain loop on two cores", plain / 2 / work, 4.5, "x")
        outside = 100 * (1 - inside(Path(folder) / "continual") / (2 * work))
        target = f"{name}: actors' time outside editing and scoring"
        if args.quick:
            why = (
                f"{outside:.1f} %, of a sweep a tenth as long: mostly its actors' start; judged at "
                f"N=1000, without --quick"
            )
            report.skipped(target, why)
        else:
            report.at_most(target, outside, 5, "%")
    report.close()


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
