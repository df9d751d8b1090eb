"""The central table at size: appending a step, gathering finished shards, asking questions of 10 M
rows.

    python benchmarks/bench_table.py

- append: ``Attempt.commit`` of a step of 50 edits (50 or 100 rows, every column filled), fsyncs
  included, without an edit state and with one of 1 MB.
- gather: 1,000 finished shards of 250 edits (500 rows each), 64 at a time, as the driver does; the
  sum of the calls.
- query: a table of 10 M rows in files as gathering leaves them (64 shards of 500 rows a file),
  asked for a mean by (method, T) through :meth:`orchestrator.results.query.Results.sql`, each time
  by a fresh reader: files are listed, footers read, page checksums verified; Arrow and DuckDB use
  every core, as they do for a user. The files are encoded and published by the project's own code;
  only the way through a hundred thousand single parts is left out. Scores are as coarse as real
  ones, seconds and log-probabilities random.

Processor seconds stand beside the wall clock: on a machine that does other work, they tell how much
of it was ours.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import LOG, Report, alternate, clock, parser

from orchestrator.results.columns import COLUMNS, sort_rows
from orchestrator.results.journal import Journal
from orchestrator.results.manifest import ShardManifest
from orchestrator.results.parquet import encode
from orchestrator.results.query import Results
from orchestrator.results.table import CentralTable, TableShard, table_meta
from orchestrator.storage.local import LocalStore
from orchestrator.storage.paths import ResultsPaths
from workers.job import Lane, StreamCell, StreamJob
from workers.timeline import cut_steps, timeline

METHODS = ("ft", "rome", "grace", "wise-merge", "wise-retrieve", "memit", "alphaedit", "mend")
T_VALUES = (1, 10, 100, 1000)
SHARD_EDITS, STEP_EDITS, LANES = 250, 50, 10
QUESTION = "SELECT method, T, avg(reliability_exact), count(*) FROM edits GROUP BY ALL ORDER BY ALL"


def manifest_of(number: int) -> ShardManifest:
    """A shard of 25 groups of T=10, ten lanes wide."""
    groups = SHARD_EDITS // 10
    cell = f"{number:016x}"
    waves = [range(i, min(i + LANES, groups)) for i in range(0, groups, LANES)]
    job = StreamJob(
        method="ft",
        config={},
        cells=(StreamCell(cell_id=cell, seed=number),),
        T=10,
        waves=tuple(tuple(Lane(group=g, stop_group=g + 1) for g in wave) for wave in waves),
    )
    columns = {
        "sweep": "bench",
        "model": "embedded",
        "dataset": "tinyworld",
        "method": METHODS[number % len(METHODS)],
        "algorithm": "ft",
        "hparams_id": "12345678",
        "T": 10,
        "seed": number,
        "batch_size": 1,
        "rollback": "group",
        "training_overlap": None,
    }
    return ShardManifest(
        shard_id=f"{number:016x}", job=job, bounds=cut_steps(job, STEP_EDITS), columns={cell: columns}
    )


def steps_of(manifest: ShardManifest, rng: random.Random) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Start, stop and rows of every step, as a stream gives them."""
    job, start = manifest.job, 0
    ticks = timeline(job)
    for stop in manifest.bounds:
        rows = [
            row_of(job.cells[0].cell_id, lane.group, position, tick.edits_applied, moment, rng)
            for tick in ticks[start:stop]
            for lane in job.waves[tick.wave]
            for position in range(tick.start, tick.stop)
            for moment in ["immediate" if tick.kind == "edit" else "final"]
        ]
        yield start, stop, rows
        start = stop


def row_of(
    cell: str, group: int, position: int, applied: int, moment: str, rng: random.Random
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in COLUMNS:
        if column.source == "stream":
            coarse = column.kind == "score" and column.unit == "0..1"
            number = rng.choice((0.0, 0.5, 1.0)) if coarse else rng.random()
            row[column.name] = {"double": number, "int32": 10, "int64": 1 << 29, "string": "cpu"}[column.type]
    return row | {
        "cell_id": cell,
        "group": group,
        "position": position,
        "case_id": f"person-{group * 10 + position:05d}-birthplace",
        "edits_applied": applied,
        "scored": moment,
        "details": {"first_loss": rng.random()},
    }


def append(folder: Path, commits: int) -> dict[str, float]:
    """Median seconds of one commit, without and with an edit state."""
    journal = Journal(LocalStore(folder))
    rng = random.Random(0)
    found = {}
    for name, state in (("no state", None), ("1 MB state", rng.randbytes(1 << 20))):
        seconds: list[float] = []
        number = 0
        while len(seconds) < commits:
            manifest = manifest_of(number := number + 1 + (state is not None) * 100_000)
            journal.begin(manifest)
            attempt = journal.claim(manifest.shard_id, "bench")
            for start, stop, rows in steps_of(manifest, rng):
                stats = {"edits": STEP_EDITS, "edit_seconds": 1.0, "score_seconds": 1.0}
                kept = None if stop == manifest.bounds[-1] else state
                seconds.append(clock(partial(attempt.commit, start, stop, rows, [], kept, stats)))
        found[name] = statistics.median(seconds)
    return found


def gather(folder: Path, shards: int) -> tuple[float, float, int]:
    """Seconds of gathering ``shards`` finished shards, 64 at a time; processor seconds of it; how
    many rows they had."""
    store = LocalStore(folder)
    journal, table = Journal(store), CentralTable(store)
    rng = random.Random(1)
    stats = {"edits": STEP_EDITS, "edit_seconds": 1.0, "score_seconds": 1.0}
    waiting: list[str] = []
    seconds = processor = 0.0
    for number in range(shards):
        manifest = manifest_of(number)
        journal.begin(manifest)
        attempt = journal.claim(manifest.shard_id, "bench")
        for start, stop, rows in steps_of(manifest, rng):
            attempt.commit(start, stop, rows, [], None, stats)
        waiting.append(manifest.shard_id)
        if len(waiting) == 64 or number == shards - 1:
            busy = time.process_time()
            seconds += clock(partial(table.gather, journal, waiting))
            processor += time.process_time() - busy
            waiting = []
    listed = table.shards()
    assert len(listed) == shards
    return seconds, processor, sum(shard.rows for shard in listed.values())


def fill(folder: Path, rows: int, file_rows: int) -> int:
    """A table of ``rows`` rows in files of ``file_rows``; its size in bytes."""
    store, paths = LocalStore(folder), ResultsPaths()
    first = random_rows(np.random.default_rng(2), 1, file_rows, -(-file_rows // (2 * SHARD_EDITS)))
    size = 0
    for number in range(1, -(-rows // file_rows) + 1):
        count = min(file_rows, rows - (number - 1) * file_rows)
        shards = -(-count // (2 * SHARD_EDITS))
        table = first.slice(0, count)  # the same scores in every file
        for name, values in identities(number, count, shards).items():
            at = table.schema.get_field_index(name)
            table = table.set_column(
                at, table.schema.field(at), pa.array(values, table.schema.field(at).type)
            )
        table = sort_rows(table)
        entries = [entry_of(f"{number:08x}{i:08x}", number, count // shards) for i in range(shards)]
        data = encode(table, table_meta(number, entries, count))
        store.publish_new(paths.table_file(number), data)
        size += len(data)
    return size


def identities(number: int, count: int, shards: int) -> dict[str, Any]:
    """The columns of ``count`` rows that differ from file to file: those of ``shards`` shards, each
    of one cell."""
    shard = np.repeat(np.arange(shards), -(-count // shards))[:count]
    edit = np.arange(count) % (2 * SHARD_EDITS) // 2
    T = np.array([T_VALUES[(number + i) % len(T_VALUES)] for i in range(shards)])[shard]
    return {
        "cell_id": np.array([f"{number:04x}{i:012x}" for i in range(shards)])[shard],
        "shard_id": np.array([f"{number:08x}{i:08x}" for i in range(shards)])[shard],
        "method": np.array([METHODS[(number * shards + i) % len(METHODS)] for i in range(shards)])[shard],
        "T": T,
        "group": edit // T,
        "position": edit % T,
    }


def random_rows(rng: np.random.Generator, number: int, count: int, shards: int) -> pa.Table:
    """``count`` rows of ``shards`` shards, each of one cell."""
    known = identities(number, count, shards)
    place = np.arange(count) % (2 * SHARD_EDITS)
    arrays = []
    for column in COLUMNS:
        values: Any
        if column.name in known:
            values = known[column.name]
        elif column.name == "scored":
            values = np.array(["immediate", "final"])[place % 2]
        elif column.name == "case_id":
            values = np.array([f"person-{i:05d}-birthplace" for i in range(SHARD_EDITS)])[place // 2]
        elif column.name == "details":
            values = np.array([f'{{"first_loss": {x:.15f}}}' for x in rng.random(SHARD_EDITS)])[place // 2]
        elif column.unit == "0..1":
            values = rng.choice([0.0, 0.5, 1.0], size=count)
        elif column.type == "double":
            values = rng.random(count)
        else:
            values = np.full(count, {"string": "embedded"}.get(column.type, 10))
        kind = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "double": pa.float64()}[
            column.type
        ]
        arrays.append(pa.array(values, kind))
    return pa.table(arrays, names=[c.name for c in COLUMNS])


def entry_of(shard_id: str, number: int, rows: int) -> TableShard:
    return TableShard(
        shard_id=shard_id,
        file=number,
        cells={shard_id: tuple(range(25))},
        failed={},
        failures=(),
        rows=rows,
        attempts=1,
        edits=SHARD_EDITS,
        edit_seconds=20.0,
        score_seconds=5.0,
        commit_seconds=0.1,
        score={},
    )


def ask(folder: Path, rows: int, repeats: int) -> float:
    """Median seconds of the question, by readers that open the folder afresh."""

    def fresh() -> None:
        answer = Results(LocalStore(folder)).sql(QUESTION)
        assert sum(answer.column(3).to_pylist()) == rows

    fresh()
    busy = time.process_time()
    seconds = alternate({"query": fresh}, repeats, warm_up=0)["query"]
    busy = (time.process_time() - busy) / repeats
    LOG.info("query: %s s; %.2f s processor each", ", ".join(f"{s:.2f}" for s in seconds), busy)
    return statistics.median(seconds)


def main() -> None:
    args: argparse.Namespace = parser(__doc__).parse_args()
    report = Report("bench_table", args)
    pa.set_cpu_count(
        os.cpu_count() or 1
    )  # OMP_NUM_THREADS is set for torch's sake and would bound Arrow's scan, too
    commits, shards, rows, file_rows = (40, 1000, 10_000_000, 32_000)
    if args.smoke:
        commits, shards, rows = 4, 66, 100_000
    with tempfile.TemporaryDirectory(prefix="bench-table-") as temporary:
        folder = Path(temporary)
        for name, seconds in append(folder / "append", commits).items():
            LOG.info("append: %.1f ms a step of %d edits, %s", 1000 * seconds, STEP_EDITS, name)
        seconds, processor, found = gather(folder / "gather", shards)
        LOG.info(
            "gather: %d shards, %d rows: %.1f s, of them %.1f s processor", shards, found, seconds, processor
        )
        report.at_most(f"gather of {shards:,} finished shards, 64 at a time", seconds, 60, "s")
        began = time.perf_counter()
        size = fill(folder / "query", rows, file_rows)
        LOG.info(
            "a table of %d rows, %.0f MB, written in %.0f s", rows, size / 1e6, time.perf_counter() - began
        )
        seconds = ask(folder / "query", rows, 3 if args.quick else 7)
        report.at_most(f"mean by (method, T) over {rows:,} rows in files of {file_rows:,}", seconds, 1, "s")
    report.close()


if __name__ == "__main__":
    main()
