"""Shards for tests of journal and table: a stand-in for a stream whose numbers depend on its whole
past.

Every score is drawn from a hash over all edits since the lane was pristine, so a resume from a
wrong state, a step that is skipped and a step that is done twice all change the table. Functions at
module level are targets of real processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchestrator.results.beside import COMMITTED, GROUPS, OUTPUTS
from orchestrator.results.columns import EDITS, STREAM_COLUMNS, VARYING, Declaration, sort_rows
from orchestrator.results.journal import Attempt, Journal
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.table import CentralTable
from orchestrator.storage.local import LocalStore
from orchestrator.storage.open import open_store
from tests.waiting import hold
from workers.job import Lane, Rollback, ScoreConfig, Share, StreamCell, StreamJob
from workers.timeline import Tick, cut_steps, moments, timeline

Row = dict[str, Any]


def make_manifest(
    shard_id: str = "s0",
    T: int = 6,
    groups: int = 4,
    seeds: Sequence[int] = (0, 1),
    first_group: int = 0,
    rollback: Rollback = "group",
    step_edits: int = 4,
    score_at: tuple[int, ...] = (),
    cell: str = "cell",
    batch_size: int = 1,
    also_T: tuple[int, ...] = (),
) -> ShardManifest:
    """A shard that runs ``groups`` groups of one cell per seed, the seeds being the lanes of each
    wave.

    Its lanes may report the same edits to cells of other T, named ``<cell>-<seed>-T<T>``: with
    rollback, where a group of that T starts with theirs.
    """
    cells = tuple(StreamCell(cell_id=f"{cell}-{seed}", seed=seed) for seed in seeds)
    cells += tuple(
        StreamCell(cell_id=f"{cell}-{seed}-T{t}", seed=seed, T=t) for t in also_T for seed in seeds
    )
    stop = first_group + groups
    spans = [(g, g + 1) for g in range(first_group, stop)] if rollback == "group" else [(first_group, stop)]

    def also(i: int, low: int, high: int) -> tuple[Share, ...]:
        numbers = [(t, (n + 1) * len(seeds) + i) for n, t in enumerate(also_T)]
        if rollback == "group":
            starts = [(c, low * T // t) for t, c in numbers if low * T % t == 0]
            return tuple(Share(cell=c, group=group, stop_group=group + 1) for c, group in starts)
        return tuple(Share(cell=c, group=low * T // t, stop_group=high * T // t) for t, c in numbers)

    waves = tuple(
        tuple(Lane(cell=i, group=low, stop_group=high, also=also(i, low, high)) for i in range(len(seeds)))
        for low, high in spans
    )
    score = ScoreConfig(score_at=score_at, requests_per_tick=4)
    job = StreamJob(
        method="ft",
        config={},
        cells=cells,
        T=T,
        batch_size=batch_size,
        rollback=rollback,
        waves=waves,
        score=score,
    )
    columns = {
        c.cell_id: {
            "sweep": "test",
            "model": "embedded",
            "dataset": "tinyworld",
            "method": "ft",
            "algorithm": "ft",
            "hparams_id": "h",
            "T": c.T or T,
            "seed": c.seed,
            "batch_size": batch_size,
            "rollback": rollback,
            "training_overlap": None,
        }
        for c in cells
    }
    return ShardManifest(shard_id=shard_id, job=job, bounds=cut_steps(job, step_edits), columns=columns)


def run_steps(
    manifest: ShardManifest, start: int = 0, state: bytes | None = None, fail: tuple[str, int] | None = None
) -> Iterator[tuple[int, int, list[Row], list[Row], bytes | None]]:
    """start, stop, rows, failures, state of every step from tick ``start`` on. Group ``fail``
    (cell, group) fails."""
    job = manifest.job
    ticks = timeline(job)
    lanes: dict[str, str] = json.loads(state) if state else {}
    for stop in (bound for bound in manifest.bounds if bound > start):
        rows: list[Row] = []
        failures: list[Row] = []
        for tick in ticks[start:stop]:
            for lane in job.waves[tick.wave]:
                cell = job.cells[lane.cell].cell_id  # names the lane
                past = lanes.get(cell, "pristine")
                if past == "failed":
                    continue
                if tick.kind == "edit":
                    seed, first = (
                        job.cells[lane.cell].seed,
                        lane.group * job.T if job.rollback == "group" else 0,
                    )
                    for position in range(tick.start, tick.stop):
                        past = hashlib.sha256(f"{past} {seed} {first} {position}".encode()).hexdigest()
                    lanes[cell] = past
                    group = lane.group if job.rollback == "group" else tick.start // job.T
                    if fail == (cell, group) and tick.start % job.T >= job.T // 2:
                        lanes[cell] = "failed"
                        failures += _failures(job, tick, lane)
                        continue
                for share in lane.shares:
                    rows.extend(_rows(job, tick, share, past))
            if tick.last:
                lanes = {}
        yield start, stop, rows, failures, json.dumps(lanes).encode() if lanes else None
        start = stop


def _failures(job: StreamJob, tick: Tick, lane: Lane) -> Iterator[Row]:
    """What a stream reports for a lane that is frozen at ``tick``."""
    for share in lane.shares:
        reached = tick.start // job.T_of(share) + (share.group if job.rollback == "group" else 0)
        for group in range(max(share.group, reached), share.stop_group):
            yield {
                "cell_id": job.cells[share.cell].cell_id,
                "group": group,
                "position": tick.start,
                "kind": "nan",
                "message": "loss is nan",
            }


def _rows(job: StreamJob, tick: Tick, share: Share, past: str) -> Iterator[Row]:
    T, cell = job.T_of(share), job.cells[share.cell].cell_id
    for place in range(tick.start, tick.stop):
        group = share.group if job.rollback == "group" else place // T
        for moment in moments(job, tick, share):
            number = int(hashlib.sha256(f"{past} {place} {moment}".encode()).hexdigest()[:12], 16) / 16**12
            row: Row = dict.fromkeys(STREAM_COLUMNS)
            yield row | {
                "cell_id": cell,
                "group": group,
                "position": place % T,
                "case_id": f"case-{group * T + place % T}",
                "edits_applied": tick.edits_applied,
                "scored": moment,
                "reliability_token": number,
                "target_logprob": -number,
                "edit_seconds": 0.5,
                "score_seconds": 0.25,
                "lanes": len(job.waves[tick.wave]),
                "iterations": 3,
                "device": "cpu",
                "overlay_bytes": 10,
                "details": {"past": past[:4]} if moment == "final" else None,
            }


def beside_of(manifest: ShardManifest, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What a stream reports with the rows of a step: two outputs of every final row, and every group
    at its end."""
    job = manifest.job
    final = [row for row in rows if row["scored"] == "final"]
    outputs = [
        {name: row[name] for name in OUTPUTS.of("stream") if name in row}
        | {"probe": probe, "number": 0, "how": "teacher_forced"}
        | {"text": f"{row['reliability_token']:.6f}", "ending": None}
        | {"correct": row["reliability_token"] > 0.5}
        | {"text_base": "base", "ending_base": None, "correct_base": False}
        for row in final
        for probe in ("reliability", "locality")
    ]
    sizes = {cell.cell_id: cell.T or job.T for cell in job.cells}
    groups = [
        {name: row.get(name) for name in GROUPS.of("stream")} | {"delta_norm": row["reliability_token"]}
        for row in final
        if row["position"] == sizes[row["cell_id"]] - 1
    ]
    return {"outputs": outputs, "groups": groups}


STATS = {"edits": 2, "edit_seconds": 1.0, "score_seconds": 0.5}


def commit_steps(attempt: Attempt, steps: int | None = None, fail: tuple[str, int] | None = None) -> None:
    """Commits the next ``steps`` steps, or all that are left."""
    for number, step in enumerate(run_steps(attempt.manifest, attempt.position, attempt.state, fail)):
        if number == steps:
            return
        start, stop, rows, failures, state = step
        attempt.commit(start, stop, rows, failures, state, STATS, beside_of(attempt.manifest, rows))


def finish(journal: Journal, *manifests: ShardManifest, fail: tuple[str, int] | None = None) -> None:
    """Runs shards to their end."""
    for manifest in manifests:
        journal.begin(manifest)
        commit_steps(journal.claim(manifest.shard_id, "r1"), fail=fail)


def undisturbed(folder: Path, *manifests: ShardManifest) -> dict[str, pa.Table]:
    """The tables that nothing interfered with."""
    store = LocalStore(folder)
    journal = Journal(store)
    finish(journal, *manifests)
    CentralTable(store).gather(journal)
    return contents(CentralTable(store))


def contents(table: CentralTable, journal: Journal | None = None) -> dict[str, pa.Table]:
    """Every table whose rows are committed and gathered, in comparable form."""
    return {of.name: comparable(table.scan(journal, of=of), of) for of in (EDITS, *COMMITTED.values())}


def comparable(table: pa.Table, of: Declaration = EDITS) -> pa.Table:
    """Sorted rows without the columns that may differ between two runs."""
    rows = sort_rows(table, of.key)
    return rows.select([name for name in rows.column_names if name not in VARYING])


# -- what real processes do


def run_shard(root: str, manifest: str, steps: int | None = None, marker: str = "") -> None:
    """Resume a shard and run it to its end; made to be killed. After ``steps`` steps it is held at
    ``marker``."""
    shard = ShardManifest.model_validate_json(manifest)
    journal = Journal(open_store(root))
    journal.begin(shard)
    attempt = journal.claim(shard.shard_id, "r1", {"host": "h"})
    if steps is not None:
        commit_steps(attempt, steps)
        hold(Path(marker))
    commit_steps(attempt)


def gather_shards(
    root: str, shards: Sequence[Sequence[str]], barrier: Any = None, permits: Any = None
) -> None:
    """Gather batch after batch; each takes one of ``permits``, a semaphore, if there is one."""
    store = open_store(root)
    table, journal = CentralTable(store), Journal(store)
    if barrier is not None:
        barrier.wait()
    for batch in shards:
        if permits is not None:
            permits.acquire()
        table.gather(journal, batch)


def claim_attempts(root: str, shard_id: str, times: int, barrier: Any, answer: Any) -> None:
    """Claims a shard again and again."""
    journal = Journal(open_store(root))
    barrier.wait()
    answer.put([journal.claim(shard_id, "r1").number for _ in range(times)])


def publish_keys(root: str, me: str, keys: int, barrier: Any, answer: Any) -> None:
    """Tries to publish every key; answers which it got."""
    store = open_store(root)
    barrier.wait()
    answer.put((me, [key for key in range(keys) if store.publish_new(f"race/{key}", me.encode() * 1000)]))


def publish_unprivileged(root: str, answer: Any) -> None:
    """Writes as a user who may not."""
    import os

    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        open_store(root).publish_new("table/x", b"data")
    except Exception as error:
        answer.put((type(error).__name__, str(error)))


def publish_beyond_limit(root: str, answer: Any) -> None:
    """Writes more than the operating system lets this process write."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    store = open_store(root)
    try:
        store.publish_new("table/big", b"x" * 5000)
    except Exception as error:
        answer.put((type(error).__name__, str(error)))
