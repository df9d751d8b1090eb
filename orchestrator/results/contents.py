"""The central table: columns declared as data, sealed Parquet files, gathering, scanning.

The table is a folder of immutable, numbered Parquet files. Each holds the rows of whole shards and lists them in its
footer; a shard is in the table if and only if a file lists it. Nothing is ever compacted, updated or renamed. Any tool
that reads Parquet reads the table; this module adds what plain readers do not do: the rows of shards that are still
running, and checksums of whole files.
Knows nothing of torch or Ray, and of DuckDB only that it exists (:mod:`orchestrator.query`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, starmap
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.paths import ResultsPaths
from orchestrator.store import (
    Damaged,
    Entry,
    Missing,
    Store,
    StoreError,
    put_aside,
    seal_json,
    sha256_of,
    unseal_json,
    unseal_line,
)
from workers.job import StreamJob, Tick, moments, timeline
from workers.types import JSON, EditSweepError

if TYPE_CHECKING:
    from orchestrator.journal import FinishedShard, Journal

log = logging.getLogger(__name__)

Kind = Literal["identity", "moment", "score", "cost", "provenance"]
Source = Literal["stream", "cell", "attempt"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table. ``source``: who fills it, the stream per row, the plan per cell, or the attempt."""

    name: str
    type: Literal["string", "int32", "int64", "double"]
    unit: str
    meaning: str
    kind: Kind
    source: Source = "stream"
    nullable: bool = False


def _score_columns() -> Iterator[Column]:
    probes = {
        "reliability": "on the edit prompt",
        "generalization": "on the rephrased prompts (mean)",
        "locality": "on the locality prompts, against the base model's answers (mean)",
        "portability": "on the portability prompts (mean)",
    }
    protocols = {
        "token": "share of target tokens predicted under teacher forcing",
        "exact": "1 if every target token is predicted under teacher forcing",
        "generated": "1 if greedy generation with a natural stop gives the normalised target",
    }
    for base in (False, True):
        for probe, where in probes.items():
            if base and probe == "locality":
                continue  # 1 by definition
            for protocol, what in protocols.items():
                name = f"{probe}_{protocol}{'_base' if base else ''}"
                meaning = f"{what}, {where}{'; the unedited model' if base else ''}"
                yield Column(name, "double", "0..1", meaning, "score", nullable=True)


def _later_score_columns() -> Iterator[Column]:
    """Scores that only some data or settings have: null elsewhere, and in files from before they were declared."""
    several = "the best of the portability prompts that are phrasings of one question"
    at_end = "not in immediate rows, and off unless the spec asks for it"
    scores = {
        "portability_any_exact": ("0..1", f"{several}: 1 if every target token is predicted under teacher forcing"),
        "portability_any_generated": (
            "0..1",
            f"{several}: 1 if greedy generation with a natural stop gives the normalised target or an alias",
        ),
        "ood_token": ("0..1", "share of the tokens of an out-of-distribution text predicted, the first one aside"),
        "ood_confident": ("0..1", "share of its tokens that get a probability above 0.8, the first one aside"),
        "perplexity": (
            "",
            "exp of the target's mean negative log-probability per token after the prompt, for passages",
        ),
        "fluency": (
            "bits",
            f"weighted mean entropy of bi- and trigrams of the edit prompt and its continuation; {at_end}",
        ),
        "ability_perplexity": ("", f"perplexity of the held-out text, the same in all rows of a group; {at_end}"),
    }
    for suffix, which in (("", ""), ("_base", "; the unedited model")):
        for name, (unit, meaning) in scores.items():
            yield Column(f"{name}{suffix}", "double", unit, meaning + which, "score", nullable=True)


COLUMNS: tuple[Column, ...] = (
    Column("sweep", "string", "", "name of the sweep", "identity", "cell"),
    Column("cell_id", "string", "", "hash of everything the cell's numbers depend on", "identity"),
    Column("shard_id", "string", "", "unit of scheduling that produced the row", "identity", "attempt"),
    Column("model", "string", "", "base model as named in the spec", "identity", "cell"),
    Column("dataset", "string", "", "data set as named in the spec", "identity", "cell"),
    Column("method", "string", "", "label of the method variant", "identity", "cell"),
    Column("algorithm", "string", "", "name of the method in the registry", "identity", "cell"),
    Column("hparams_id", "string", "", "hash of the method's hyperparameters", "identity", "cell"),
    Column("T", "int32", "edits", "consecutive edits before final scoring and rollback", "identity", "cell"),
    Column("seed", "int64", "", "seed of the cell", "identity", "cell"),
    Column("batch_size", "int32", "edits", "requests edited in one call", "identity", "cell"),
    Column("rollback", "string", "", "group: after every T edits; never: continual editing", "identity", "cell"),
    Column("group", "int32", "", "index of the group of T requests the request belongs to", "identity"),
    Column("position", "int32", "", "place of the request within its group", "identity"),
    Column("case_id", "string", "", "id of the request in the data set", "identity"),
    Column("edits_applied", "int32", "edits", "edits the state had when the request was scored", "moment"),
    Column(
        "scored",
        "string",
        "",
        "immediate: after the edit; final: at the group's end; checkpoint: at a score_at mark",
        "moment",
    ),
    *_score_columns(),
    Column(
        "target_logprob",
        "double",
        "nats",
        "mean log-probability of the target tokens after the edit prompt",
        "score",
        nullable=True,
    ),
    Column("target_logprob_base", "double", "nats", "the same for the unedited model", "score", nullable=True),
    Column("min_margin", "double", "logits", "smallest top-2 margin over the target tokens", "score", nullable=True),
    *_later_score_columns(),
    Column("edit_seconds", "double", "s", "wall time of the edit, shared among the active lanes", "cost"),
    Column("score_seconds", "double", "s", "wall time of the scoring, shared among the scored requests", "cost"),
    Column("lanes", "int32", "", "lanes that ran in lockstep", "cost"),
    Column("iterations", "int32", "", "optimisation steps of the edit", "cost"),
    Column("loss", "double", "", "final loss of the edit", "cost", nullable=True),
    Column("device", "string", "", "device the stream ran on", "cost"),
    Column("peak_memory_bytes", "int64", "bytes", "peak memory of the actor so far", "cost", nullable=True),
    Column("overlay_bytes", "int64", "bytes", "size of the lane's overlay", "cost"),
    Column("delta_norm", "double", "", "relative Frobenius norm of the change", "cost", nullable=True),
    Column("details", "string", "JSON", "further figures of the method", "cost", nullable=True),
    Column(
        "score_splits",
        "int32",
        "",
        "times the scoring batch was halved because memory ran out; above 0 scores agree up to rounding only",
        "provenance",
        nullable=True,
    ),
    Column("run_id", "string", "", "call of `editsweep run` that produced the row", "provenance", "attempt"),
    Column("attempt", "int32", "", "attempt of the shard that produced the row", "provenance", "attempt"),
    Column(
        "training_overlap",
        "int32",
        "requests",
        "requests trained on that the sweep edits, with `allow_overlap: true`; null: refused, or nothing is trained",
        "provenance",
        "cell",
        nullable=True,
    ),
)

STREAM_COLUMNS: frozenset[str] = frozenset(c.name for c in COLUMNS if c.source == "stream")
CELL_COLUMNS: frozenset[str] = frozenset(c.name for c in COLUMNS if c.source == "cell")
KEY: tuple[str, ...] = ("cell_id", "group", "scored", "edits_applied", "position")
"""Identifies a row, and orders the rows of a file."""

VARYING: frozenset[str] = frozenset({"edit_seconds", "score_seconds", "peak_memory_bytes", "run_id", "attempt"})
"""Columns in which two runs of the same plan may differ; all others are equal bit for bit."""

_REPEATING = frozenset(c.name for c in COLUMNS if c.type != "double" or c.unit == "0..1")
"""Columns whose values repeat, written as dictionaries: half the time to read, a tenth less to store. Not so times and losses:
hardly two are equal."""

VERSION = 1
_SEAL = b"editsweep.sha256\x18\x40"  # key of the footer entry, then the thrift header of a 64-byte string
_BLANK = b"0" * 64
_FILE_ROWS = 1_000_000


class TableError(EditSweepError):
    """Rows do not fit the declared columns, or the table was used wrongly."""


def schema() -> pa.Schema:
    """The Arrow schema of the table, from :data:`COLUMNS`."""
    types = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64(), "double": pa.float64()}
    return pa.schema([pa.field(c.name, types[c.type], nullable=c.nullable) for c in COLUMNS])


def no_rows() -> pa.Table:
    """A table without rows. (Arrow's own ``empty_table`` imports pandas, which takes longer than most queries.)"""
    return pa.Table.from_arrays([pa.nulls(0, field.type) for field in schema()], schema=schema())


def docs() -> str:
    """The columns as a markdown table."""
    lines = ["| column | type | unit | kind | may be null | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for c in COLUMNS:
        lines.append(f"| `{c.name}` | {c.type} | {c.unit} | {c.kind} | {'yes' if c.nullable else ''} | {c.meaning} |")
    return "\n".join(lines) + "\n"


def rows_to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as dicts -> Arrow table. ``details`` may be a dict; it becomes JSON.

    Raises :class:`TableError` for an unknown or missing column, a null that is not allowed, or a value of another type:
    a column that silently turned into nulls would be noticed days later.
    """
    names = {c.name for c in COLUMNS}
    for number, row in enumerate(rows):
        if row.keys() != names:
            unknown, missing = sorted(row.keys() - names), sorted(names - row.keys())
            raise TableError(f"row {number}: unknown columns {unknown}, missing columns {missing}")
    none = type(None)
    accepted: dict[str, set[type]] = {
        "string": {str, none},
        "int32": {int, none},
        "int64": {int, none},
        "double": {float, int, none},
    }
    arrays = []
    for field in schema():
        values = [row[field.name] for row in rows]
        if field.name == "details":
            values = [None if v is None else v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in values]
        strange = {type(v) for v in values} - accepted[str(field.type)]
        if strange:
            raise TableError(f"column {field.name} ({field.type}): a value of type {min(t.__name__ for t in strange)}")
        try:
            array = pa.array(values, field.type)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise TableError(f"column {field.name} ({field.type}): {error}") from error
        if array.null_count and not field.nullable:
            raise TableError(f"column {field.name} must not be null")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema())


def sort_rows(table: pa.Table) -> pa.Table:
    """The rows ordered by :data:`KEY`."""
    return table.take(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in KEY]))


def has_duplicates(ordered: pa.Table) -> bool:
    """Whether two rows of a table ordered by :data:`KEY` share a key."""
    same = None
    for name in KEY:
        column = ordered.column(name)
        equal = pc.equal(column.slice(1), column.slice(0, max(len(column) - 1, 0)))
        same = equal if same is None else pc.and_(same, equal)
    return bool(pc.any(same).as_py())


def encode(table: pa.Table, meta: Mapping[str, JSON], compression: Literal["zstd", "snappy"] = "zstd") -> bytes:
    """A Parquet file with ``meta`` and a checksum of the whole file in its footer. The same input gives the same bytes.

    For a hundred rows snappy is as small and twice as fast both ways: zstd sets itself up anew for each of fifty columns.

    Page checksums, which other readers verify, leave the footer unprotected; hence one more over all bytes. It is
    computed with its own 64 digits read as zeros.
    """
    sink = pa.BufferOutputStream()
    few = [name for name in table.schema.names if name in _REPEATING]
    with pq.ParquetWriter(
        sink, table.schema, compression=compression, use_dictionary=few, write_page_checksum=True, store_schema=False
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"editsweep": seal_json(meta, line=True), "editsweep.sha256": _BLANK})
    data = bytearray(sink.getvalue())
    at = data.rfind(_SEAL + _BLANK)
    if at < 0:
        raise TableError("this version of pyarrow lays Parquet footers out differently: the seal has no place")
    at += len(_SEAL)
    data[at : at + 64] = sha256_of(data).encode()
    return bytes(data)


def check_seal(data: bytes, name: str) -> None:
    """Raises :class:`~orchestrator.store.Damaged`, naming ``name``, unless all bytes are as :func:`encode` made it."""
    at = data.rfind(_SEAL)
    if at < 0 or at + len(_SEAL) + 64 > len(data):
        raise Damaged(f"{name}: truncated, or not one of our Parquet files")
    at += len(_SEAL)
    view = memoryview(data)
    if sha256_of(view[:at], _BLANK, view[at + 64 :]).encode() != data[at : at + 64]:
        raise Damaged(f"{name}: checksum does not match its contents")


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Inside, a file called ``name`` is read.

    Arrow reports damage as ArrowInvalid or as OSError without a number; a number comes from the operating system.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise StoreError("read", name, error.strerror or str(error)) from error
        raise Damaged(f"{name}: {error}") from error


def decode(data: bytes, name: str) -> tuple[pa.Table, dict[str, JSON]]:
    """Rows and metadata of a sealed file. Raises :class:`~orchestrator.store.Damaged`, naming ``name``."""
    check_seal(data, name)
    with reading(name), pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        return _conform(file.read(use_threads=False), name), _meta(_sealed(file.metadata, name), name)


def read_footer(file: BinaryIO, name: str) -> tuple[dict[str, JSON], int]:
    """Metadata and number of rows, without reading the rows. Raises :class:`~orchestrator.store.Damaged`."""
    with reading(name):
        metadata = pq.read_metadata(file)
    return _meta(_sealed(metadata, name), name), metadata.num_rows


def _sealed(metadata: pq.FileMetaData, name: str) -> bytes:
    sealed: bytes | None = (metadata.metadata or {}).get(b"editsweep")
    if sealed is None:
        raise Damaged(f"{name}: not one of our Parquet files")
    return sealed


def _meta(sealed: bytes, name: str) -> dict[str, JSON]:
    meta = unseal_json(sealed, name)
    if meta.get("version") != VERSION:
        raise TableError(f"{name}: written in format {meta.get('version')}, this editsweep reads format {VERSION}")
    return meta


def _conform(table: pa.Table, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The declared columns in the declared order. A column added to the declaration later is null in older files."""
    declared = schema()
    wanted = declared if columns is None else pa.schema([declared.field(c) for c in columns])
    if table.schema.equals(wanted):
        return table
    present = set(table.column_names)
    unknown = sorted(present - set(declared.names))
    if unknown:
        raise TableError(f"{name}: columns {unknown} are unknown; was it written by a newer editsweep?")
    arrays = []
    for field in wanted:
        if field.name in present:
            column = table.column(field.name)
            arrays.append(column if column.type == field.type else column.cast(field.type))
        else:
            arrays.append(pa.nulls(table.num_rows, field.type))
    return pa.Table.from_arrays(arrays, schema=wanted)


def complete_rows(table: pa.Table, job: StreamJob, failures: Iterable[Mapping[str, JSON]]) -> pa.Table:
    """Without the rows of failed groups, which a later shard may write in full.

    In continual editing a failure ends the lane: what was scored after its group began goes too.
    """
    keep = None
    T_of = {cell.cell_id: cell.T or job.T for cell in job.cells}
    for cell, group in sorted(_first_failures(job, failures)):
        bad = pc.and_(pc.equal(table["cell_id"], cell), pc.equal(table["group"], group))
        if job.rollback == "never":
            later = pc.or_(
                pc.greater_equal(table["group"], group), pc.greater(table["edits_applied"], group * T_of[cell])
            )
            bad = pc.and_(pc.equal(table["cell_id"], cell), later)
        keep = pc.invert(bad) if keep is None else pc.and_(keep, pc.invert(bad))
    return table if keep is None else table.filter(keep)


def _first_failures(job: StreamJob, failures: Iterable[Mapping[str, JSON]]) -> set[tuple[str, int]]:
    failed = {(str(f["cell_id"]), int(f["group"])) for f in failures}
    if job.rollback == "group":
        return failed
    first: dict[str, int] = {}
    for cell, group in failed:
        first[cell] = min(group, first.get(cell, group))
    return set(first.items())


@dataclass(frozen=True, slots=True)
class Expected:
    """What a finished shard must have written. All is per cell; ``rows`` are those of ``groups``."""

    groups: dict[str, tuple[int, ...]]
    failed: dict[str, tuple[int, ...]]
    rows: dict[str, int]


def expected_contents(job: StreamJob, failures: Iterable[Mapping[str, JSON]]) -> Expected:
    """Derives :class:`Expected` from the job alone and from the groups whose lane was frozen."""
    planned: dict[str, set[int]] = {cell.cell_id: set() for cell in job.cells}
    groups: dict[str, set[int]] = {cell.cell_id: set() for cell in job.cells}
    rows: Counter[str] = Counter({cell.cell_id: 0 for cell in job.cells})
    failed = _first_failures(job, failures)
    ends: dict[str, int] = dict(failed) if job.rollback == "never" else {}
    ticks: dict[int, list[Tick]] = {}
    for tick in timeline(job):
        ticks.setdefault(tick.wave, []).append(tick)
    # lanes that serve the same groups, or any group of one T, write as many
    counted: dict[tuple[int, int, int, int], int] = {}
    for w, wave in enumerate(job.waves):
        for lane in wave:
            for share in lane.shares:
                cell, T = job.cells[share.cell].cell_id, job.T_of(share)
                planned[cell].update(range(share.group, share.stop_group))
                if job.rollback == "group":
                    end = share.group + ((cell, share.group) not in failed)
                else:
                    end = min(share.stop_group, ends.get(cell, share.stop_group))
                if end > share.group:
                    groups[cell].update(range(share.group, end))
                    key = (w, T, 0, 0) if job.rollback == "group" else (w, T, share.group, end)
                    if key not in counted:
                        counted[key] = sum(
                            (tick.stop - tick.start) * len(moments(job, tick, share))
                            for tick in ticks[w]
                            if job.rollback == "group" or tick.edits_applied <= end * T
                        )
                    rows[cell] += counted[key]
    return Expected(
        groups={cell: tuple(sorted(found)) for cell, found in groups.items()},
        failed={cell: tuple(sorted(planned[cell] - found)) for cell, found in groups.items()},
        rows=dict(rows),
    )


@dataclass(frozen=True, slots=True)
class TableShard:
    """A shard as a table file lists it.

    ``cells``: cell id -> groups of which all rows are in the file. ``failed``: cell id -> groups that the shard was to
    run and of which no row is in the file. ``score``: the :class:`workers.job.ScoreConfig` its rows were scored with.
    """

    shard_id: str
    file: int
    cells: dict[str, tuple[int, ...]]
    failed: dict[str, tuple[int, ...]]
    failures: tuple[dict[str, JSON], ...]
    rows: int
    attempts: int
    edits: int
    edit_seconds: float
    score_seconds: float
    commit_seconds: float
    score: dict[str, JSON]

    def to_json(self) -> dict[str, JSON]:
        """For the footer; group numbers become ranges, of which there are few."""
        return {
            "shard_id": self.shard_id,
            "cells": {cell: _ranges(groups) for cell, groups in self.cells.items()},
            "failed": {cell: _ranges(groups) for cell, groups in self.failed.items()},
            "failures": list(self.failures),
            "rows": self.rows,
            "attempts": self.attempts,
            "edits": self.edits,
            "edit_seconds": self.edit_seconds,
            "score_seconds": self.score_seconds,
            "commit_seconds": self.commit_seconds,
            "score": self.score,
        }

    @classmethod
    def empty(cls, shard_id: str, file: int) -> TableShard:
        """A shard that ended without rows."""
        return cls(shard_id, file, {}, {}, (), 0, 0, 0, 0.0, 0.0, 0.0, {})

    def without(self, cells: AbstractSet[str], rows: int) -> TableShard:
        """The same shard with nothing of ``cells``; ``rows`` are left."""
        return replace(
            self,
            cells={cell: groups for cell, groups in self.cells.items() if cell not in cells},
            failed={cell: groups for cell, groups in self.failed.items() if cell not in cells},
            failures=tuple(failure for failure in self.failures if failure["cell_id"] not in cells),
            rows=rows,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, JSON], file: int) -> TableShard:
        cells, failed = _groups(value["cells"]), _groups(value["failed"])
        return cls(**{**value, "cells": cells, "failed": failed, "failures": tuple(value["failures"]), "file": file})


def _groups(ranges: Mapping[str, Iterable[Sequence[int]]]) -> dict[str, tuple[int, ...]]:
    return {cell: tuple(chain.from_iterable(starmap(range, spans))) for cell, spans in ranges.items()}


def _ranges(groups: Sequence[int]) -> list[list[int]]:
    """[0, 1, 2, 5] -> [[0, 3], [5, 6]]"""
    ranges: list[list[int]] = []
    for group in groups:
        if ranges and ranges[-1][1] == group:
            ranges[-1][1] = group + 1
        else:
            ranges.append([group, group + 1])
    return ranges


@dataclass(frozen=True, slots=True)
class Gathered:
    """What one call of :meth:`CentralTable.gather` did.

    ``shards`` are in the table now. ``again`` were thought finished, but a damaged part was found: they must run again
    (from that part on). ``refused``: shard -> why its rows are not what its plan says, which running again cannot mend.
    """

    files: tuple[int, ...] = ()
    shards: tuple[str, ...] = ()
    rows: int = 0
    again: tuple[str, ...] = ()
    refused: dict[str, str] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class TableFile:
    """A table file by its footer.

    Who reads the rows of a finished sweep needs nothing of the metadata, who reads those of a running one the shards' ids alone.
    The rest stays as it was read until it is asked for: as objects, the footers of a few hundred files keep the garbage
    collector as busy as reading them.
    """

    number: int
    key: str
    rows: int
    sealed: bytes
    """The metadata."""

    @cached_property
    def ids(self) -> frozenset[str]:
        return frozenset(shard["shard_id"] for shard in unseal_json(self.sealed, self.key)["shards"])

    @cached_property
    def shards(self) -> tuple[TableShard, ...]:
        meta = unseal_json(self.sealed, self.key)
        return tuple(TableShard.from_json(shard, self.number) for shard in meta["shards"])


class CentralTable:
    """The numbered files of ``table/``.

    >>> table = CentralTable(store)                                  # doctest: +SKIP
    >>> table.verify()                     # at the start of a run: damaged files are put aside, their shards run again
    >>> table.gather(journal)              # finished shards become one new file, then lose their parts
    >>> table.done()["3f2a…"]              # the groups of a cell that need not run
    >>> table.scan(journal).num_rows       # every row, of running shards too

    Any number of processes may read; gathering from two processes at once is harmless too.
    """

    def __init__(self, store: Store, paths: ResultsPaths | None = None) -> None:
        self.store = store
        self.paths = paths or ResultsPaths()
        self._footers: dict[tuple[str, int], TableFile] = {}  # by name and size: files are immutable

    # -- what is in the table

    def shards(self) -> dict[str, TableShard]:
        """Every shard in the table, from the files' footers alone. Damaged files are skipped with a warning."""
        return {shard.shard_id: shard for file in self._files() for shard in file.shards}

    def done(self, shards: Mapping[str, TableShard] | None = None) -> dict[str, set[int]]:
        """Cell id -> groups of which every row is in the table. ``shards``: what :meth:`shards` said, if it was asked."""
        done: dict[str, set[int]] = {}
        for shard in (self.shards() if shards is None else shards).values():
            for cell, groups in shard.cells.items():
                done.setdefault(cell, set()).update(groups)
        return done

    def given_up(self) -> dict[str, set[int]]:
        """Cell id -> groups that failed and that no other shard finished: nothing runs them again unasked."""
        shards = self.shards()
        done = self.done(shards)
        given_up: dict[str, set[int]] = {}
        for shard in shards.values():
            for cell, groups in shard.failed.items():
                given_up.setdefault(cell, set()).update(set(groups) - done.get(cell, set()))
        return {cell: groups for cell, groups in given_up.items() if groups}

    def failed(self, shards: Mapping[str, TableShard] | None = None) -> list[dict[str, JSON]]:
        """Failures of groups that no other shard finished: the stream's fields, ``shard_id`` and ``attempts``."""
        shards = self.shards() if shards is None else shards
        if not any(shard.failures for shard in shards.values()):
            return []
        done = self.done(shards)
        return [
            {**failure, "shard_id": shard.shard_id, "attempts": shard.attempts}
            for shard in shards.values()
            for failure in shard.failures
            if failure["group"] not in done.get(str(failure["cell_id"]), ())
        ]

    def _files(self) -> list[TableFile]:
        """For readers, who change nothing: a damaged file is left out with a warning."""
        return self._read_listed(self._list(), self._leave_out)

    def _listing(self) -> tuple[list[TableFile], int]:
        """For gatherers: the files, and the first number above all of them. Damaged ones are put aside.

        Number and contents must come from one listing: a file that appeared between two of them would be numbered over
        without having been read, and its shards could be listed twice.
        """
        while True:
            entries = self._list()
            highest = max(entries, default=0)
            # a listing taken while files appear may show a later one and miss an earlier one; by its name it is found
            missed = set(range(1, highest)) - entries.keys()
            if not any(self.store.exists(self.paths.table_file(number)) for number in missed):
                return self._read_listed(entries, self._put_aside), highest + 1

    def _list(self) -> dict[int, Entry]:
        numbered = {self.paths.table_number(entry.name): entry for entry in self.store.list(self.paths.table)}
        return {number: entry for number, entry in numbered.items() if number is not None and not entry.folder}

    def _read_listed(self, entries: Mapping[int, Entry], damaged: Callable[[int, Damaged], None]) -> list[TableFile]:
        files = []
        for number, entry in entries.items():
            known = self._footers.get((entry.name, entry.size))
            if known is None:
                try:
                    known = self._read_footer(number, entry.key)
                except Damaged as error:
                    damaged(number, error)
                    continue
                self._footers[(entry.name, entry.size)] = known
            files.append(known)
        return files

    @staticmethod
    def _leave_out(_: int, error: Damaged) -> None:
        log.warning("%s; its rows are left out until `editsweep run` mends it", error)

    def _metadata(self, key: str, name: str) -> pq.FileMetaData:
        """A file's footer. Raises :class:`~orchestrator.store.Damaged`, naming it ``name``."""
        with self.store.open(key) as file, reading(name):
            return pq.read_metadata(file)

    def _read_footer(self, number: int, key: str) -> TableFile:
        name = self.store.where(key)
        metadata = self._metadata(key, name)
        sealed, rows = _sealed(metadata, name), metadata.num_rows
        line = unseal_line(sealed)
        if line is None or not _written_as(line, number, rows):
            meta = _meta(sealed, name)
            if meta.get("kind") != "table" or meta.get("number") != number or meta.get("rows") != rows:
                raise Damaged(f"{name}: a foreign file, or one that was renamed")
        return TableFile(number, key, rows, sealed)

    # -- writing

    def verify(self) -> list[int]:
        """Reads every file, checks its checksum, puts damaged ones aside and returns their numbers.

        The shards of those run again. Call only as the folder's owner.
        """
        bad = []
        for number, entry in self._list().items():
            try:
                check_seal(self.store.read(entry.key), self.store.where(entry.key))
                self._read_footer(number, entry.key)
            except Damaged as error:
                self._put_aside(number, error)
                bad.append(number)
        self.store.tidy(self.paths.table)
        return bad

    def _put_aside(self, number: int, error: Damaged) -> None:
        """Leaves an empty file in its place: a number that became free could be taken by a gatherer that has read the
        higher numbers' absence long ago, and a shard would be listed twice."""
        key = self.paths.table_file(number)
        aside = self.paths.table_aside(number)
        log.warning("%s; put aside as %s, its shards will run again", error, self.store.where(aside))
        put_aside(self.store, key, aside, instead=encode(no_rows(), table_meta(number, [], 0)))

    def gather(self, journal: Journal, shard_ids: Iterable[str] | None = None) -> Gathered:
        """Moves finished shards (those of ``shard_ids``, or all) into new table files and drops their parts.

        A shard enters the table exactly once, whoever gathers and however often that is interrupted: files are created
        without overwriting, after all lower numbers have been read. Unfinished shards are passed over. Parts are
        dropped only after the new file was read back and compared. Raises :class:`~orchestrator.store.StoreError`.
        """
        began = time.perf_counter()
        asked = sorted(set(journal.shard_ids() if shard_ids is None else shard_ids))
        total = Gathered()
        while asked:
            listed = self._drop_listed(journal, asked)
            batch, asked, again = self._load(journal, [shard for shard in asked if shard not in listed])
            total = replace(total, again=total.again + again)
            if batch:
                total = self._write(journal, batch, total)
        return replace(total, seconds=time.perf_counter() - began)

    def _drop_listed(self, journal: Journal, asked: Iterable[str]) -> set[str]:
        found = _ids(self._listing()[0]).intersection(asked)
        journal.drop(*sorted(found))
        return found

    @staticmethod
    def _load(journal: Journal, asked: list[str]) -> tuple[list[FinishedShard], list[str], tuple[str, ...]]:
        """Finished shards up to a file's worth of rows, the shards not looked at yet, and those found damaged."""
        batch: list[FinishedShard] = []
        again: list[str] = []
        rows = 0
        for i, shard_id in enumerate(asked):
            if rows >= _FILE_ROWS:
                return batch, asked[i:], tuple(again)
            try:
                if not journal.progress(shard_id).finished:
                    continue
                shard = journal.load(shard_id)
            except Missing:
                continue  # another gatherer has just dropped it
            if shard is None:
                again.append(shard_id)
            else:
                batch.append(shard)
                rows += shard.rows.num_rows
        return batch, [], tuple(again)

    def _write(self, journal: Journal, batch: list[FinishedShard], total: Gathered) -> Gathered:
        refused = dict(total.refused or {})
        while True:
            files, number = self._listing()
            listed = _ids(files)
            done = {(c, g): s.shard_id for file in files for s in file.shards for c, gs in s.cells.items() for g in gs}
            entries: list[TableShard] = []
            pieces: list[pa.Table] = []
            for shard in batch:
                if shard.shard_id in listed:
                    continue
                try:
                    entry, rows = _check_shard(shard, number, done)
                except TableError as error:
                    log.error("%s", error)
                    refused[shard.shard_id] = str(error)
                    continue
                entries.append(entry)
                pieces.append(rows)
                done.update({(c, g): entry.shard_id for c, groups in entry.cells.items() for g in groups})
            if not entries:
                break
            rows = sort_rows(pa.concat_tables(pieces))
            data = encode(rows, table_meta(number, entries, rows.num_rows))
            if not self.store.publish_new(self.paths.table_file(number), data):
                continue  # another gatherer took the number: read again what is listed now
            self._read_back(number, rows)
            total = replace(
                total,
                files=(*total.files, number),
                shards=total.shards + tuple(entry.shard_id for entry in entries),
                rows=total.rows + rows.num_rows,
            )
            break
        journal.drop(*(shard.shard_id for shard in batch if shard.shard_id not in refused))
        return replace(total, refused=refused or None)

    def _read_back(self, number: int, rows: pa.Table) -> None:
        key = self.paths.table_file(number)
        name = self.store.where(key)
        try:
            found, _ = decode(self.store.read(key), name)
            if not found.select(list(KEY)).equals(rows.select(list(KEY))):
                raise Damaged(f"{name}: holds other rows than were written")
        except Damaged as error:
            self._put_aside(number, error)
            raise StoreError("write", name, f"what was read back differs from what was written ({error})") from error

    # -- forgetting

    def count(self, cells: AbstractSet[str]) -> int:
        """Rows of ``cells`` in the table."""
        files = [file for file in self._files() if any(cells & shard.cells.keys() for shard in file.shards)]
        return sum(_rows_of(self.read_file(file, ["cell_id"]), cells) for file in files)

    def forget(self, cells: AbstractSet[str], shard_ids: Sequence[str], journal: Journal) -> int:
        """Removes the rows and failures of ``cells``, and the unfinished shards ``shard_ids``; how many rows went.

        Call only as the folder's owner. A shard keeps its place in the list, without the cells: its id is not used again
        and what a worker believed dead may still write for it is dropped by the next gatherer.
        """
        removed = 0
        for file in self._listing()[0]:
            if not any(cells & (shard.cells.keys() | shard.failed.keys()) for shard in file.shards):
                continue
            table = self.read_file(file)
            kept = table.filter(pc.invert(pc.is_in(table["cell_id"], pa.array(sorted(cells), pa.string()))))
            counts = Counter(kept.column("shard_id").to_pylist())
            shards = [shard.without(cells, counts[shard.shard_id]) for shard in file.shards]
            self.store.replace(file.key, encode(kept, table_meta(file.number, shards, kept.num_rows)))
            self._footers.clear()  # the new file could be of the old one's size
            removed += table.num_rows - kept.num_rows
        left = [shard_id for shard_id in shard_ids if shard_id not in self.shards()]
        while left:
            number = self._listing()[1]
            ended = [TableShard.empty(shard_id, number) for shard_id in left]
            if self.store.publish_new(self.paths.table_file(number), encode(no_rows(), table_meta(number, ended, 0))):
                break
        journal.drop(*shard_ids)
        return removed

    # -- reading

    def scan(self, journal: Journal | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Every row exactly once: of the table, and (with ``journal``) of shards not gathered yet.

        The order of rows is that of the files; :func:`sort_rows` gives the canonical one. Raises :class:`TableError`
        for an unknown column.
        """
        check_columns(columns)
        files, parts = self.snapshot(journal)
        pieces = [parts if columns is None else parts.select(list(columns))]
        for file in files:
            pieces.append(self.read_file(file, columns))
        return pa.concat_tables(reversed(pieces))

    def snapshot(self, journal: Journal | None) -> tuple[list[TableFile], pa.Table]:
        """Table files, and in memory the rows of shards that none of the files lists.

        Parts are read before the table is listed for good: a shard that is gathered in between is in both, and its
        parts are then ignored; in the other order it could be in neither.
        """
        files = self._files()
        if journal is None:
            return files, no_rows()
        for _ in range(100):
            shard_ids = journal.shard_ids()
            listed = _ids(files) if shard_ids else set()
            read: dict[str, pa.Table] = {}
            vanished = False
            for shard_id in shard_ids:
                if shard_id not in listed:
                    try:
                        read[shard_id] = journal.committed_rows(shard_id)
                    except Missing:
                        vanished = True
                        break
            files = self._files()
            if not vanished:
                listed = _ids(files) if read else set()
                pieces = [rows for shard_id, rows in read.items() if shard_id not in listed]
                return files, pa.concat_tables([no_rows(), *pieces])
        raise StoreError("read", self.store.where(self.paths.parts), "it keeps changing; try again")

    def read_file(self, file: TableFile, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of one table file. Raises :class:`~orchestrator.store.Damaged`, naming it."""
        name = self.store.where(file.key)
        with (
            self.store.open(file.key) as opened,
            reading(name),
            pq.ParquetFile(opened, page_checksum_verification=True) as parquet,
        ):
            present = set(parquet.schema_arrow.names)
            wanted = None if columns is None else [c for c in columns if c in present]
            rows = _conform(parquet.read(columns=wanted), name, columns)
        if rows.num_rows != file.rows:
            raise Damaged(
                f"{name}: has {rows.num_rows} rows where {file.rows} were listed; was it put aside meanwhile?"
            )
        return rows


def _rows_of(table: pa.Table, cells: AbstractSet[str]) -> int:
    found: int = pc.sum(pc.is_in(table["cell_id"], pa.array(sorted(cells), pa.string()))).as_py() or 0
    return found


def _ids(files: Iterable[TableFile]) -> set[str]:
    """The shards that any of the files lists."""
    return set().union(*(file.ids for file in files))


def count_done(done: AbstractSet[int], groups: int) -> int:
    """How many of a cell's ``groups`` groups are done; more than these may be, from a sweep that was larger."""
    return len(done) if max(done, default=-1) < groups else sum(group < groups for group in done)


def check_columns(columns: Sequence[str] | None) -> None:
    """Raises :class:`TableError` with the valid names for an unknown column."""
    names = [c.name for c in COLUMNS]
    unknown = [c for c in columns or () if c not in names]
    if unknown:
        raise TableError(f"unknown columns {unknown}; valid are: {', '.join(names)}")


def table_meta(number: int, shards: Sequence[TableShard], rows: int) -> dict[str, JSON]:
    """What :func:`encode` is given for a table file: its number, and the shards of which it holds every row."""
    listed = [shard.to_json() for shard in shards]
    return {"version": VERSION, "kind": "table", "number": number, "rows": rows, "shards": listed}


def _written_as(line: bytes, number: int, rows: int) -> bool:
    """Whether the metadata, as JSON text, is that of table file ``number`` with so many rows. Its ends say so: parsing the shards
    between them, which few readers ask for, takes a quarter of the time that the mean of ten million rows does."""
    begin, _, end = json.dumps(table_meta(number, [], rows), sort_keys=True).partition("[]")
    return line.startswith(begin.encode()) and line.endswith(end.encode())


def _check_shard(shard: FinishedShard, number: int, done: Mapping[tuple[str, int], str]) -> tuple[TableShard, pa.Table]:
    """Compares a finished shard's rows with its job: the table is never silently short, and no group is in it twice."""
    job = shard.manifest.job
    rows = complete_rows(shard.rows, job, shard.progress.failures)
    expected = expected_contents(job, shard.progress.failures)
    cells, counts = expected.groups, expected.rows
    name = f"shard {shard.shard_id}"
    found = Counter(rows.column("cell_id").to_pylist())
    if {cell: found.get(cell, 0) for cell in counts} != counts or found.keys() - counts.keys():
        raise TableError(f"{name}: its plan asks for rows per cell {counts}, its parts hold {dict(found)}")
    if has_duplicates(sort_rows(rows)):
        raise TableError(f"{name}: two of its rows have the same key {KEY}")
    planned = {(cell, group) for cell, groups in cells.items() for group in groups}
    in_rows = set(zip(rows.column("cell_id").to_pylist(), rows.column("group").to_pylist(), strict=True))
    if planned - in_rows or (job.rollback == "group" and in_rows - planned):
        raise TableError(f"{name}: groups in its rows differ from its plan: {sorted(planned ^ in_rows)[:10]}")
    twice = sorted(pair for pair in planned if pair in done)
    if twice:
        cell, group = twice[0]
        raise TableError(f"{name}: group {group} of cell {cell} is in the table already, from shard {done[twice[0]]}")
    progress = shard.progress
    entry = TableShard(
        shard_id=shard.shard_id,
        file=number,
        cells={cell: groups for cell, groups in cells.items() if groups},
        failed={cell: groups for cell, groups in expected.failed.items() if groups},
        failures=progress.failures,
        rows=rows.num_rows,
        attempts=progress.attempts,
        edits=progress.edits,
        edit_seconds=progress.edit_seconds,
        score_seconds=progress.score_seconds,
        commit_seconds=progress.commit_seconds,
        score=job.score.model_dump(mode="json"),
    )
    return entry, rows
