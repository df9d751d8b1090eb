"""How soon a sweep is at work again after its driver was killed, and how soon its state is told.

    python benchmarks/bench_resume.py

- resume: a real `editsweep run` of shards of one edit each (those of bench_engine.py) gets SIGKILL
  when 200 shards are finished, some gathered, some not. Then, in turn, the same command on that
  folder and on an empty one, each until its first new edit is durable, and each ended by SIGKILL
  again. Clocked from the start of the process, Python's imports included; an edit that a worker of
  the killed run still commits does not count. With both engines.
- status: `editsweep status`, as a process, on a folder where 10,000 cells of N = 1000 are planned
  (2,000 with --quick), a tenth or nine tenths of them finished, 64 shards under way and 60 finished
  and not gathered. The folder is made by the project's own planner, journal and table; table files
  list real shards but hold one row each, because `status` reads footers alone.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import yaml
from bench_engine import Watch, spec_of
from bench_plan import T_VALUES, VARIANTS
from bench_table import entry_of, random_rows, row_of
from common import LOG, Report, clock, parser

from orchestrator.engine.sweep import run_sweep
from orchestrator.planning.plan import Plan
from orchestrator.planning.spec import SweepSpec, parse_spec
from orchestrator.planning.work import Shard
from orchestrator.results.columns import sort_rows
from orchestrator.results.journal import Journal
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.parquet import encode
from orchestrator.results.table import CentralTable, table_meta
from orchestrator.storage.base import Missing
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import unseal_json
from workers.job import StreamJob
from workers.timeline import moments, timeline

UNDER_WAY, WAITING = 64, 60
"""Shards that have begun, and that are finished and not gathered: of 64 actors, just before the
next gather."""
FILE_SHARDS = 64
PATIENCE = 180.0


# --- resume ---------------------------------------------------------------------------------


def command(spec: Path, folder: Path, engine: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "run",
        str(spec),
        "--results",
        str(folder),
        "--engine",
        engine,
    ]


@contextlib.contextmanager
def driver(spec: Path, folder: Path, engine: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a process of its own; killed at the end, alone at first, then what is left of all it
    has started."""
    said = spec.with_name("said.txt")
    with said.open("wb") as file:
        process = subprocess.Popen(command(spec, folder, engine), stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        if process.wait() != -signal.SIGKILL:
            LOG.error("%s", said.read_text(encoding="utf-8")[-2000:])
        time.sleep(2.0 if engine == "ray" else 0.0)  # what is left of the cluster notices on its own
        for other in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()


class TooSoon(RuntimeError):
    """A run ended before it could be killed."""


def wait_for(process: subprocess.Popen[bytes], done: Callable[[], bool], every: float) -> float:
    """Wait until ``done()``; seconds that took. Raises if the process ends before."""
    began = time.perf_counter()
    while not done():
        if process.poll() is not None:
            kind = RuntimeError if process.returncode else TooSoon
            raise kind(f"the run ended with exit code {process.returncode} before it could be killed")
        if time.perf_counter() - began > PATIENCE:
            raise RuntimeError(f"nothing happened within {PATIENCE:.0f} s")
        time.sleep(every)
    return time.perf_counter() - began


def finished(folder: Path) -> int:
    """Shards that are in the table, or whose last part is there."""
    store = LocalStore(folder)
    return len(CentralTable(store).shards()) + len(Journal(store).finished())


def _have(folder: Path, shards: int) -> bool:
    return finished(folder) >= shards


def first_edit(spec: Path, folder: Path, engine: str) -> float:
    """Seconds from the start of a run until a part of it is durable; then it is killed."""
    store, paths = LocalStore(folder), ResultsPaths()
    before = {entry.name for entry in store.list(paths.runs)}
    others: set[Path] = set()
    """Attempts of earlier runs."""

    def reached() -> bool:
        for attempt in {
            Path(part).parent for part in glob.glob(f"{folder}/{paths.parts}/*/*/*.parquet")
        } - others:
            key = f"{attempt.relative_to(folder).as_posix()}/attempt.json"
            try:
                info = unseal_json(store.read(key), key)
            except Missing:
                continue  # gathered meanwhile
            if info["run_id"] not in before:
                return True
            others.add(attempt)
        return False

    with driver(spec, folder, engine) as process:
        return wait_for(process, reached, 0.01)


def resuming(report: Report, work: Path, shards: int, rounds: dict[str, int]) -> None:
    """Kill a run with ``shards`` finished, and compare going on with starting."""
    spec = work / "spec.yaml"
    # so many more that the run is not done before it is killed, and that every later one has
    # something left
    for more in (60, 600, 6000):
        killed = work / f"killed-{more}"
        spec.write_text(yaml.safe_dump(spec_of(2 * shards + more).model_dump(mode="json")), encoding="utf-8")
        try:
            with driver(spec, killed, "local") as process:
                seconds = wait_for(process, partial(_have, killed, shards), 0.05)
            break
        except TooSoon:
            LOG.info(
                "resume: the run ended before this process, on a busy machine, had its turn; once more "
                "with more shards"
            )
    else:
        raise RuntimeError("every run ended before it could be killed")
    there = finished(killed)
    waiting = len(Journal(LocalStore(killed)).finished())
    LOG.info(
        "resume: killed after %.0f s with %d shards finished, %d of them not gathered",
        seconds,
        there,
        waiting,
    )
    for engine, count in rounds.items():
        if engine == "ray":
            first_edit(spec, work / "warm-up", engine)  # reads Ray from the disk
        fresh, again = [], []
        for i in range(count):
            fresh.append(first_edit(spec, work / f"fresh-{engine}-{i}", engine))
            again.append(first_edit(spec, killed, engine))
        more = statistics.median(b - a for a, b in zip(fresh, again, strict=True))
        LOG.info("resume, %s: first edit after %s s; fresh %s s", engine, _listed(again), _listed(fresh))
        report.at_most(
            f"first new edit with {there} shards done, later than a fresh start's, {engine}", more, 10, "s"
        )


def _listed(seconds: Sequence[float]) -> str:
    return ", ".join(f"{s:.1f}" for s in seconds)


# --- status ---------------------------------------------------------------------------------


def sweep_of(cells: int) -> SweepSpec:
    """The sweep that bench_plan.py plans."""
    raw = {
        "name": "status",
        "model": {"name": "embedded", "device": "cpu"},
        "dataset": {"kind": "tinyworld", "edits": 1000},
        "grid": {"T": list(T_VALUES), "seeds": list(range(cells // (VARIANTS * len(T_VALUES))))},
        "methods": [
            {"method": "ft", "label": f"ft-{i}", "hparams": {"num_steps": 10 + i}} for i in range(VARIANTS)
        ],
    }
    return parse_spec(yaml.safe_dump(raw), "bench_resume", Path("/"))


def fill_table(store: LocalStore, plan: Plan, shards: Sequence[Shard], first: int) -> int:
    """Table files from number ``first`` on that list ``shards`` as finished; the next number."""
    paths, rng = ResultsPaths(), np.random.default_rng(first)
    number = first
    for number, low in enumerate(range(0, len(shards), FILE_SHARDS), start=first):
        entries = [
            replace(
                entry_of(shard.shard_id, number, 1),
                cells=groups_of(plan.manifest(shard).job),
            )
            for shard in shards[low : low + FILE_SHARDS]
        ]
        rows = sort_rows(random_rows(rng, number, len(entries), len(entries)))
        store.publish_new(paths.table_file(number), encode(rows, table_meta(number, entries, len(entries))))
    return number + 1


def groups_of(job: StreamJob) -> dict[str, tuple[int, ...]]:
    """Per cell, the groups a job reports."""
    groups: dict[str, list[int]] = {}
    for share in (share for wave in job.waves for lane in wave for share in lane.shares):
        groups.setdefault(job.cells[share.cell].cell_id, []).extend(range(share.group, share.stop_group))
    return {cell: tuple(sorted(found)) for cell, found in groups.items()}


def commit(journal: Journal, manifest: ShardManifest, steps: int | None) -> None:
    """Begin a shard and commit its first ``steps`` steps (None: all)."""
    job, rng = manifest.job, random.Random(0)
    ticks = timeline(job)
    journal.begin(manifest)
    attempt = journal.claim(manifest.shard_id, "bench")
    start = 0
    for stop in manifest.bounds[:steps]:
        rows = [
            row_of(job.cells[share.cell].cell_id, share.group, position, tick.edits_applied, moment, rng)
            for tick in ticks[start:stop]
            for lane in job.waves[tick.wave]
            for share in lane.shares
            for position in range(tick.start, tick.stop)
            for moment in moments(job, tick, share)
        ]
        stats = {"edits": 50, "edit_seconds": 1.0, "score_seconds": 1.0}
        attempt.commit(start, stop, rows, [], b"state" if stop != manifest.bounds[-1] else None, stats)
        start = stop


def ask(folder: Path, repeats: int) -> tuple[float, float]:
    """Median seconds of `editsweep status`; processor seconds of one call."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder.parent / "said.txt").open("wb") as said:
        seconds = [
            clock(
                lambda: subprocess.run(
                    [sys.executable, "-m", "orchestrator.cli", "status", str(folder)], stdout=said, check=True
                )
            )
            for _ in range(repeats)
        ]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return statistics.median(seconds), busy / repeats


def status(report: Report, work: Path, cells: int, repeats: int) -> None:
    """Ask after a folder with ``cells`` cells, near its begin and near its end."""
    folder = work / "status"
    store = LocalStore(folder)
    # a run whose engine does nothing: the lock, the plan, what is written into the folder, and the
    # end are real
    plan = run_sweep(sweep_of(cells), store, lambda run_state, actors: None, Watch()).plan
    journal = Journal(store)
    for number, shard in enumerate(plan.shards[-UNDER_WAY - WAITING :]):
        commit(journal, plan.manifest(shard), 1 if number < UNDER_WAY else None)
    done, next_file = 0, 1
    for share in (0.1, 0.9):
        shards = plan.shards[done : round(share * len(plan.shards))]
        next_file = fill_table(store, plan, shards, next_file)
        done += len(shards)
        seconds, busy = ask(folder, repeats)
        LOG.info(
            "status: %d shards, %d of them in %d files: %.2f s",
            len(plan.shards),
            done,
            next_file - 1,
            seconds,
        )
        report.at_most(
            f"status of {cells:,} cells, {100 * share:.0f}% of their shards in the table",
            seconds,
            2,
            "s",
            f"{busy:.2f} s of processor time",
        )


def main() -> None:
    args: argparse.Namespace = parser(__doc__).parse_args()
    report = Report("bench_resume", args)
    shards, rounds, cells, repeats = 200, {"local": 5, "ray": 5}, 10_000, 7
    if args.quick:
        rounds, cells, repeats = {"local": 2, "ray": 1}, 2000, 3
    if args.smoke:
        shards, rounds, cells, repeats = 4, {"local": 1, "ray": 1}, 200, 1
    with tempfile.TemporaryDirectory(prefix="bench-resume-", ignore_cleanup_errors=True) as temporary:
        status(report, Path(temporary), cells, repeats)
        resuming(report, Path(temporary), shards, rounds)
    report.close()


if __name__ == "__main__":
    main()
