"""What an engine adds to every shard, measured on shards that do next to nothing.

    python benchmarks/bench_engine.py                 # 1,000 shards

A shard is the least the real thing can do: one group of one edit by GRACE with a single
optimisation step on the embedded model, its final score only, one step, one commit. Nothing is
replaced by a stand-in: a real spec is planned, attempts are claimed, parts fsynced, shards gathered
64 at a time. The overhead of a shard is

    (wall time to the end of the run, last gather included
     - seconds the streams themselves spent editing and scoring) / shards

with one actor, where the two can be subtracted because they follow each other. The clock starts
after a quarter of the shards: what an actor does once (importing torch, loading the model) is not
paid per shard. With two actors on two cores driver and streams compete; there wall time per shard
is printed and nothing is subtracted. Three ways to run the same plan:

- ray: ``orchestrator.engine.ray_engine.run``, one Tune trial per shard;
- bare: Ray actors that are handed manifests one after another, without Tune (what Ray itself
  costs);
- local: ``orchestrator.engine.local``, in this process.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from common import LOG, Report, parser

from orchestrator.engine.local import run_local
from orchestrator.engine.ray_engine.run import run_ray
from orchestrator.engine.run_state import Engine, RunState
from orchestrator.engine.sweep import run_sweep
from orchestrator.engine.worker import StepReport, Worker
from orchestrator.planning.plan import Plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.planning.work import Shard
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.query import open_results
from orchestrator.storage.local import LocalStore


class Watch:
    """A view that notes when each shard ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.problems: list[str] = []

    def begin(self, plan: Plan) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None:
        self.problems.append(text)

    def artifact_step(self, title: str, done: int, total: int, what: str) -> None: ...
    def artifact_ended(self, title: str) -> None: ...
    def shard_started(self, shard: Shard, title: str) -> None: ...
    def shard_step(self, step: StepReport) -> None: ...
    def shard_ended(self, shard_id: str, ok: bool) -> None:
        self.ends.append(time.perf_counter())

    def end(self) -> None: ...


def spec_of(shards: int) -> SweepSpec:
    """A sweep of ``shards`` shards with one edit each."""
    edits = min(shards, 500)
    raw = {
        "name": "engine",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": edits},
        "grid": {"T": [1], "seeds": list(range(-(-shards // edits)))},
        "methods": [{"method": "grace", "hparams": {"n_iter": 1}}],
        "scoring": {"generated": False, "immediate": False},
        "engine": {"lanes": 1, "shard_edits": 1, "step_edits": 1},
    }
    return parse_spec(yaml.safe_dump(raw), "bench_engine", Path("/"))


def bare_actors(run_state: RunState, max_actors: int | None) -> None:
    """The same shards on plain Ray actors: no Tune, no trials; the driver hands out one manifest
    after another."""
    import ray

    with _plain_ray():
        make = ray.remote(num_cpus=1)(_BareActor)
        actors = [make.remote(run_state.store.where(), run_state.run_id) for _ in range(max_actors or 1)]
        ray.get([actor.ready.remote() for actor in actors])
        left = [run_state.plan.manifest(shard) for shard in run_state.plan.shards][::-1]
        busy = {}
        for actor in actors:
            run_state.started(left[-1].shard_id)
            busy[actor.run.remote(left.pop())] = actor
        while busy:
            done, _ = ray.wait(list(busy), num_returns=1)
            actor = busy.pop(done[0])
            run_state.finished(ray.get(done[0]))
            if left:
                busy[actor.run.remote(left.pop())] = actor


@contextlib.contextmanager
def _plain_ray() -> Iterator[None]:
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


class _BareActor:
    def __init__(self, root: str, run_id: str) -> None:
        self.worker = Worker(root, run_id)

    def ready(self) -> None: ...

    def run(self, manifest: ShardManifest) -> str:
        for _ in self.worker.run(manifest):
            pass
        return manifest.shard_id


def measure(name: str, engine: Engine, shards: int, actors: int) -> float:
    """Run the sweep; seconds per shard that were neither editing nor scoring (for one actor), else
    wall seconds."""
    spec = spec_of(shards)
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as folder:
        began = time.perf_counter()
        outcome = run_sweep(spec, LocalStore(folder), engine, watch, actors)
        ended = time.perf_counter()
        if outcome.exit_code:
            raise RuntimeError(f"{name}: the sweep did not finish: {watch.problems[:3]} {outcome.errors}")
        listed = open_results(folder).central.shards().values()
    warm = len(listed) // 4
    start = watch.ends[warm - 1]
    count = len(listed) - warm
    wall = ended - start
    stream = sum(shard.edit_seconds + shard.score_seconds for shard in listed) / len(listed)
    overhead = wall / count - (stream if actors == 1 else 0)
    LOG.info(
        "%-5s %d actor%s %4d shards in %6.1f s after %4.1f s; a shard: stream %5.1f ms, %s %5.1f ms",
        name,
        actors,
        "s," if actors > 1 else ", ",
        count,
        wall,
        start - began,
        1000 * stream,
        "overhead" if actors == 1 else "wall",
        1000 * overhead,
    )
    return overhead


def main() -> None:
    args = parser(__doc__).parse_args()
    report = Report("bench_engine", args)
    shards, others, paired = (
        (6, 6, 6) if args.smoke else (1000, 100, 200) if args.quick else (1000, 1000, 1000)
    )
    local = measure("local", run_local, others, 1)
    bare = measure("bare", bare_actors, others, 1)
    ray = measure("ray", run_ray, shards, 1)
    pair = measure("ray", run_ray, paired, 2)
    LOG.info("\na trial of Tune costs %.1f ms more than a bare actor's call, Ray %.1f ms more than this "
             "process",
             1000 * (ray - bare), 1000 * (bare - local))  # fmt: skip
    report.at_most(f"overhead of a shard, {shards} no-op shards on Ray, one actor", 1000 * ray, 80, "ms")
    report.at_most(f"wall time of a no-op shard, {paired} shards on Ray, two actors", 1000 * pair, 80, "ms")
    report.close()


if __name__ == "__main__":
    main()
