"""The central table: numbered Parquet files, moving finished shards into them, reading them.

The table is a folder of immutable, numbered Parquet files. Each holds the rows of whole shards and
lists these shards in its footer. A shard is in the table if and only if a file lists it. The rows
of the tables ``outputs`` and ``groups`` are in the same file, behind its own. Files are never
merged or renamed, and rewritten only by :meth:`CentralTable.forget` and to replace a damaged one.
Any tool that reads Parquet can read the table. This module also reads the rows of unfinished shards
and verifies checksums of whole files. Independent of torch, Ray and DuckDB.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, starmap
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.results.beside import COMMITTED, GROUPS
from orchestrator.results.columns import (
    EDITS,
    KEY,
    Declaration,
    TableError,
    check_columns,
    has_duplicates,
    no_rows,
    sort_rows,
)
from orchestrator.results.contents import complete_rows, expected_contents
from orchestrator.results.parquet import (
    PLACES,
    VERSION,
    Place,
    check_seal,
    conform,
    decode,
    decode_beside,
    encode,
    read_beside,
    read_meta,
    read_places,
    read_seal,
    reading,
)
from orchestrator.results.records import read_identity, tell_foreign
from orchestrator.storage.base import Damaged, Entry, Missing, Store, StoreError, put_aside
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import unseal_json, unseal_line
from workers.types import JSON, EditSweepError

if TYPE_CHECKING:
    from orchestrator.results.journal import FinishedShard, Journal

log = logging.getLogger(__name__)


_FILE_ROWS = 1_000_000
_SEALED_BYTES = 8 << 20
_MOST_MISSING = 1000


@dataclass(frozen=True, slots=True)
class TableShard:
    """A shard's entry in the footer of a table file.

    ``cells``: cell id -> groups of which all rows are in the file. ``failed``: cell id -> groups of
    the shard of which no row is in the file. ``score``: the :class:`workers.job.ScoreConfig` that
    its rows were scored with.
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
        """JSON for the footer. Group numbers are written as half-open ranges."""
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

    def without(self, limits: Mapping[str, int], rows: int) -> TableShard:
        """The same shard with nothing of each cell's groups from its limit on; ``rows`` are
        left."""
        return replace(
            self,
            cells=_below(self.cells, limits),
            failed=_below(self.failed, limits),
            failures=tuple(
                failure
                for failure in self.failures
                if int(failure["group"]) < limits.get(str(failure["cell_id"]), int(failure["group"]) + 1)
            ),
            rows=rows,
        )

    def reaches(self, limits: Mapping[str, int]) -> bool:
        """Return whether the shard has any group from its cell's limit on."""
        both = chain(self.cells.items(), self.failed.items())
        return any(cell in limits and max(groups, default=-1) >= limits[cell] for cell, groups in both)

    @classmethod
    def from_json(cls, value: Mapping[str, JSON], file: int) -> TableShard:
        cells, failed = _groups(value["cells"]), _groups(value["failed"])
        return cls(
            **{**value, "cells": cells, "failed": failed, "failures": tuple(value["failures"]), "file": file}
        )


def _below(groups_of: Mapping[str, tuple[int, ...]], limits: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    kept = {
        cell: groups if cell not in limits else tuple(group for group in groups if group < limits[cell])
        for cell, groups in groups_of.items()
    }
    return {cell: groups for cell, groups in kept.items() if groups}


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
    """Result of one call of :meth:`CentralTable.gather`.

    ``shards`` are in the table now. ``again``: shards with a damaged part, which must be run again
    from that part on. ``refused``: shard -> the difference between its rows and its manifest; to
    run it again does not help.
    """

    files: tuple[int, ...] = ()
    shards: tuple[str, ...] = ()
    rows: int = 0
    again: tuple[str, ...] = ()
    refused: dict[str, str] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class TableFile:
    """A table file, described by its footer.

    The metadata is parsed when it is first used: to read the rows of a finished sweep, none of it
    is needed, and for a running sweep only the shards' ids. The objects from a few hundred footers
    cost as much time in the garbage collector as reading the footers.
    """

    number: int
    key: str
    rows: int
    sealed: bytes
    """The metadata as sealed JSON."""
    noted: bytes | None = None
    """The places of other tables' rows as sealed JSON."""

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where the rows of other tables lie in the file."""
        return read_places(self.noted, self.key)

    @cached_property
    def ids(self) -> frozenset[str]:
        return frozenset(shard["shard_id"] for shard in unseal_json(self.sealed, self.key)["shards"])

    @cached_property
    def ends(self) -> tuple[tuple[str, int], ...]:
        """The cells of each shard, and the first group beyond those whose rows are in the file."""
        return tuple(
            (cell_id, spans[-1][1])
            for shard in unseal_json(self.sealed, self.key)["shards"]
            for cell_id, spans in shard["cells"].items()
        )

    @cached_property
    def shards(self) -> tuple[TableShard, ...]:
        meta = unseal_json(self.sealed, self.key)
        return tuple(TableShard.from_json(shard, self.number) for shard in meta["shards"])


class CentralTable:
    """The numbered files of ``table/``.

    >>> table = CentralTable(store)                                  # doctest: +SKIP
    >>> table.verify()  # at the start of a run: damaged files are moved away, their shards run again
    >>> table.gather(journal)              # write finished shards to a new file, then delete their parts
    >>> table.done()["3f2a…"]              # the groups of a cell that need not run
    >>> table.scan(journal).num_rows       # every row, of running shards too

    Any number of processes may read or gather at the same time.
    """

    def __init__(self, store: Store, paths: ResultsPaths | None = None) -> None:
        self.store = store
        self.paths = paths or ResultsPaths()
        self._footers: dict[tuple[str, int], TableFile] = {}  # key: name and size

    # -- what is in the table

    def shards(self) -> dict[str, TableShard]:
        """Shard id -> entry of every shard in the table, read from the footers. Damaged files are
        skipped with a warning."""
        return {shard.shard_id: shard for file in self._files() for shard in file.shards}

    def done(self, shards: Mapping[str, TableShard] | None = None) -> dict[str, set[int]]:
        """Cell id -> groups of which every row is in the table. ``shards``: result of
        :meth:`shards`, if the caller has it already."""
        done: dict[str, set[int]] = {}
        for shard in (self.shards() if shards is None else shards).values():
            for cell, groups in shard.cells.items():
                done.setdefault(cell, set()).update(groups)
        return done

    def given_up(self) -> dict[str, set[int]]:
        """Cell id -> groups that failed and that no other shard finished. They run again only with
        ``retry_failed``."""
        shards = self.shards()
        done = self.done(shards)
        given_up: dict[str, set[int]] = {}
        for shard in shards.values():
            for cell, groups in shard.failed.items():
                given_up.setdefault(cell, set()).update(set(groups) - done.get(cell, set()))
        return {cell: groups for cell, groups in given_up.items() if groups}

    def failed(self, shards: Mapping[str, TableShard] | None = None) -> list[dict[str, JSON]]:
        """Failures of groups that no other shard finished. Each has the fields of the stream's
        failure, ``shard_id`` and ``attempts``."""
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
        """The files, for readers: a damaged file is left out with a warning and not moved."""
        entries = self._list()
        for number in self._missing(entries):
            log.warning("%s: missing; its rows are lacking", self.store.where(self.paths.table_file(number)))
        return self._read_listed(entries, self._skip_damaged)

    def _missing(self, entries: Mapping[int, Entry]) -> list[int]:
        """Numbers below the highest that no file has. There are none unless somebody deletes files
        (or gives one a number of their own: then none are told)."""
        missed = sorted(set(range(1, max(entries, default=0))) - entries.keys())
        if len(missed) > _MOST_MISSING:
            return []
        return [number for number in missed if not self._exists(number)]

    def _exists(self, number: int) -> bool:
        """Return whether a listing missed a file."""
        key = self.paths.table_file(number)
        return self.store.exists(key) and (self.store.folders_take_names or not self.store.list(key))

    def _listing(self) -> tuple[list[TableFile], int]:
        """The files, for writers, and the next free number. Damaged files are moved to
        ``table/bad``.

        Files and number must come from the same listing. Otherwise a file could appear between two
        listings and not be read, and its shards could be written a second time.
        """
        while True:
            entries = self._list(mine=True)
            highest = max(entries, default=0)
            # A listing taken while files appear may contain a later file but not an earlier one.
            # Such a file exists under its own name.
            missed = set(range(1, highest)) - entries.keys()
            if not any(map(self._exists, missed)):
                return self._read_listed(entries, self._move_aside), highest + 1

    def _list(self, mine: bool = False) -> dict[int, Entry]:
        """The entries that have a table file's name, but no folders. ``mine``: put these aside, for
        they block the name."""
        entries = self.store.list(self.paths.table)
        bad = self.paths.table_bad.rpartition("/")[2]
        foreign = [
            entry
            for entry in entries
            if entry.name != bad
            and (
                self.paths.table_number(entry.name) is None
                or (entry.folder and not self.store.folders_take_names)
            )
        ]
        tell_foreign(self.store, self.paths.table, foreign)
        found: dict[int, Entry] = {}
        for entry in entries:
            number = self.paths.table_number(entry.name)
            if number is not None and not entry.folder:
                found[number] = entry
            elif number is not None and self.store.folders_take_names:
                wrong = Damaged(f"{self.store.where(entry.key)}: a folder under a table file's name")
                if mine:
                    log.warning("%s; moved to %s", wrong, self.store.where(self.paths.table_bad))
                    put_aside(self.store, entry.key, self.paths.table_aside(number))
                else:
                    self._skip_damaged(number, wrong)
        return found

    def _read_listed(
        self, entries: Mapping[int, Entry], damaged: Callable[[int, Damaged], None]
    ) -> list[TableFile]:
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
    def _skip_damaged(_: int, error: EditSweepError) -> None:
        log.warning("%s; its rows are left out until `editsweep run` repairs it", error)

    def _metadata(self, key: str, name: str) -> pq.FileMetaData:
        """A file's footer. Raises :class:`~orchestrator.storage.base.Damaged`, naming it
        ``name``."""
        with self.store.open(key) as file, reading(name):
            return pq.read_metadata(file)

    def _read_footer(self, number: int, key: str) -> TableFile:
        name = self.store.where(key)
        metadata = self._metadata(key, name)
        sealed, rows = read_seal(metadata, name), metadata.num_rows
        line = unseal_line(sealed)
        if line is None or not any(_is_metadata_of(line, number, rows, seal) for seal in (self._seal, None)):
            meta = read_meta(sealed, name)
            if meta.get("kind") != "table" or meta.get("number") != number or meta.get("rows") != rows:
                raise Damaged(f"{name}: a foreign file, or one that was renamed")
            seal = meta.get("sweep")
            if None not in (seal, self._seal) and seal != self._seal:
                raise Damaged(f"{name}: a file of another results folder ({seal}, this is {self._seal})")
        return TableFile(number, key, rows, sealed, (metadata.metadata or {}).get(PLACES))

    @cached_property
    def _seal(self) -> str | None:
        """The folder's seal, which every table file carries since there is one. None if sweep.json
        cannot be read: until it is written anew, any file counts."""
        try:
            return read_identity(self.store, self.paths).seal
        except (Missing, Damaged):
            return None

    def seals(self) -> list[str | None]:
        """The seal that each table file carries."""
        found = []
        for number, entry in self._list().items():
            try:
                name = self.store.where(entry.key)
                meta = read_meta(read_seal(self._metadata(entry.key, name), name), name)
            except (Missing, Damaged) as error:
                self._skip_damaged(number, error)
                continue
            found.append(meta.get("sweep"))
        return found

    def _meta(self, number: int, shards: Sequence[TableShard], rows: int) -> dict[str, JSON]:
        return table_meta(number, shards, rows, self._seal)

    # -- writing

    def verify(self) -> list[int]:
        """Verify the checksum of every file. Move damaged ones to ``table/bad`` and return their
        numbers.

        Their shards run again. The caller must hold the folder's lock.
        """
        bad = []
        entries = self._list(mine=True)
        for number in self._missing(entries):
            key = self.paths.table_file(number)
            if self.store.publish_new(key, encode(no_rows(), self._meta(number, [], 0))):
                log.warning("%s: missing; its shards will run again", self.store.where(key))
        for number, entry in entries.items():
            try:
                check_seal(self.store.read(entry.key), self.store.where(entry.key))
                self._read_footer(number, entry.key)
            except Damaged as error:
                self._move_aside(number, error)
                bad.append(number)
        self.store.tidy(self.paths.table)
        return bad

    def _move_aside(self, number: int, error: Damaged) -> None:
        """Move a damaged file to ``table/bad`` and leave a file without rows in its place.

        The number must not become free: a process that listed the files earlier could take it
        without having read the higher numbers, and a shard would be listed twice.
        """
        key = self.paths.table_file(number)
        aside = self.paths.table_aside(number)
        log.warning("%s; moved to %s, its shards will run again", error, self.store.where(aside))
        put_aside(self.store, key, aside, instead=encode(no_rows(), self._meta(number, [], 0)))

    def gather(self, journal: Journal, shard_ids: Iterable[str] | None = None) -> Gathered:
        """Write the rows of finished shards (those of ``shard_ids``, or all) into new table files
        and delete their parts.

        A shard enters the table exactly once, even with several processes or after interruptions:
        a file is created without overwriting, after all files with lower numbers have been read.
        Unfinished shards are skipped. Parts are deleted only after the new file was read back and
        compared. Raises :class:`~orchestrator.storage.base.StoreError`.
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
        """Load finished shards until :data:`_FILE_ROWS` is reached. Return them, the ids of shards
        not examined yet, and the ids of shards with damaged parts."""
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
                continue  # another process has just gathered it
            except Damaged as error:
                log.warning("%s; the shard waits for the next run, which repairs it", error)
                continue
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
            done = {
                (c, g): s.shard_id
                for file in files
                for s in file.shards
                for c, gs in s.cells.items()
                for g in gs
            }
            entries: list[TableShard] = []
            pieces: dict[str, list[pa.Table]] = {name: [] for name in (EDITS.name, *COMMITTED)}
            for shard in batch:
                if shard.shard_id in listed:
                    continue
                try:
                    entry, found = _check_shard(shard, number, done)
                except TableError as error:
                    log.error("%s", error)
                    refused[shard.shard_id] = str(error)
                    continue
                entries.append(entry)
                for name, rows in found.items():
                    pieces[name].append(rows)
                done.update({(c, g): entry.shard_id for c, groups in entry.cells.items() for g in groups})
            if not entries:
                break
            rows = sort_rows(pa.concat_tables(pieces[EDITS.name]))
            beside = {
                name: sort_rows(pa.concat_tables(pieces[name]), of.key) for name, of in COMMITTED.items()
            }
            data = encode(rows, self._meta(number, entries, rows.num_rows), beside=beside)
            if not self.store.publish_new(self.paths.table_file(number), data):
                continue  # another process took the number: read its file, then try the next one
            self._read_back(number, {EDITS.name: rows, **beside})
            total = replace(
                total,
                files=(*total.files, number),
                shards=total.shards + tuple(entry.shard_id for entry in entries),
                rows=total.rows + rows.num_rows,
            )
            break
        journal.drop(*(shard.shard_id for shard in batch if shard.shard_id not in refused))
        return replace(total, refused=refused or None)

    def _read_back(self, number: int, written: Mapping[str, pa.Table]) -> None:
        key = self.paths.table_file(number)
        name = self.store.where(key)
        try:
            data = self.store.read(key)
            for of in (EDITS, *COMMITTED.values()):
                found = decode(data, name)[0] if of is EDITS else decode_beside(data, name, of)
                columns = list(of.key)
                if found is None or not found.select(columns).equals(written[of.name].select(columns)):
                    raise Damaged(f"{name}: holds other rows than were written")
        except Damaged as error:
            self._move_aside(number, error)
            raise StoreError(
                "write", name, f"what was read back differs from what was written ({error})"
            ) from error

    # -- forgetting

    def count(self, limits: Mapping[str, int]) -> int:
        """Rows in the table of each cell's groups from its limit on."""
        files = [file for file in self._files() if any(shard.reaches(limits) for shard in file.shards)]
        return sum(
            pc.sum(_from_limits(self.read_file(file, ["cell_id", "group"]), limits)).as_py() or 0
            for file in files
        )

    def forget(self, limits: Mapping[str, int], shard_ids: Sequence[str], journal: Journal) -> int:
        """Removes the rows and failures of each cell's groups from its limit on, and the unfinished
        shards ``shard_ids``; how many rows went.

        Call only as the folder's owner. A shard keeps its place in the list, without the groups:
        its id is not used again and what a worker believed dead may still write for it is dropped
        by the next gatherer.
        """
        removed = 0
        for file in self._listing()[0]:
            if not any(shard.reaches(limits) for shard in file.shards):
                continue
            table = self.read_file(file)
            kept = table.filter(pc.invert(_from_limits(table, limits)))
            counts = Counter(kept.column("shard_id").to_pylist())
            shards = [shard.without(limits, counts[shard.shard_id]) for shard in file.shards]
            beside = {}
            for name, of in COMMITTED.items():
                found = self.read_file(file, of=of)
                beside[name] = found.filter(pc.invert(_from_limits(found, limits)))
            meta = self._meta(file.number, shards, kept.num_rows)
            self.store.replace(file.key, encode(kept, meta, beside=beside))
            self._footers.clear()  # the new file may have the size of the old one
            removed += table.num_rows - kept.num_rows
        left = [shard_id for shard_id in shard_ids if shard_id not in self.shards()]
        while left:
            number = self._listing()[1]
            ended = [TableShard.empty(shard_id, number) for shard_id in left]
            if self.store.publish_new(
                self.paths.table_file(number), encode(no_rows(), self._meta(number, ended, 0))
            ):
                break
        journal.drop(*shard_ids)
        return removed

    # -- reading

    def scan(
        self,
        journal: Journal | None = None,
        columns: Sequence[str] | None = None,
        of: Declaration = EDITS,
    ) -> pa.Table:
        """All rows of the table and, with ``journal``, of shards not gathered yet, each exactly
        once. ``of``: the central table, or one whose rows are gathered with it.

        The rows are in the order of the files; :func:`sort_rows` sorts them by their key. Raises
        :class:`TableError` for an unknown column.
        """
        check_columns(columns, of)
        files, parts = self.snapshot(journal, of)
        pieces = [parts if columns is None else parts.select(list(columns))]
        pieces.extend(self.read_files(files, columns, of))
        return pa.concat_tables(reversed(pieces))

    def snapshot(self, journal: Journal | None, of: Declaration = EDITS) -> tuple[list[TableFile], pa.Table]:
        """The table files, and the rows of shards that none of the files lists.

        Parts are read before the final listing of the table. A shard that is gathered in between
        is then in both, and its parts are ignored. In the other order it could be in neither.
        """
        files = self._files()
        if journal is None:
            return files, no_rows(of)
        for _ in range(100):
            shard_ids = journal.shard_ids()
            listed = _ids(files) if shard_ids else set()
            read: dict[str, pa.Table] = {}
            vanished = False
            for shard_id in shard_ids:
                if shard_id not in listed:
                    try:
                        read[shard_id] = journal.committed_rows(shard_id, of)
                    except Missing:
                        vanished = True
                        break
            files = self._files()
            if not vanished:
                listed = _ids(files) if read else set()
                pieces = [rows for shard_id, rows in read.items() if shard_id not in listed]
                for shard_id, rows in read.items():
                    if shard_id not in listed and not rows.num_rows:
                        journal.tell_if_lost(shard_id)
                return files, pa.concat_tables([no_rows(of), *pieces])
        raise StoreError("read", self.store.where(self.paths.parts), "it keeps changing; try again")

    def read_files(
        self, files: Iterable[TableFile], columns: Sequence[str] | None = None, of: Declaration = EDITS
    ) -> Iterator[pa.Table]:
        """The rows of each file, for readers: a damaged file is left out with a warning."""
        for file in files:
            try:
                yield self.read_file(file, columns, of)
            except Damaged as error:
                self._skip_damaged(file.number, error)

    def read_file(
        self, file: TableFile, columns: Sequence[str] | None = None, of: Declaration = EDITS
    ) -> pa.Table:
        """Rows of one table file. Raises :class:`~orchestrator.storage.base.Damaged`, naming it.

        The checksum of a file of up to :data:`_SEALED_BYTES` is verified as a whole; of a larger
        one, those of the pages that are read.
        """
        name = self.store.where(file.key)
        if of is not EDITS:
            place = file.places.get(of.name, (0, 0, 0))
            with self.store.open(file.key) as opened:
                return read_beside(opened, name, of, place, columns)
        with (
            self.store.open(file.key) as opened,
            reading(name),
            _sealed(opened, name) as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as parquet,
        ):
            present = set(parquet.schema_arrow.names)
            wanted = None if columns is None else [c for c in columns if c in present]
            rows = conform(parquet.read(columns=wanted), name, columns)
        if rows.num_rows != file.rows:
            cause = (
                f"{rows.num_rows} rows where {file.rows} were listed: it was replaced meanwhile; try again"
            )
            raise StoreError("read", name, cause)
        return rows


@contextlib.contextmanager
def _sealed(opened: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The file again, verified as a whole unless it is large."""
    size = opened.seek(0, io.SEEK_END)
    opened.seek(0)
    if size > _SEALED_BYTES:
        yield opened
        return
    data = opened.read()
    check_seal(data, name)
    yield io.BytesIO(data)


def _from_limits(table: pa.Table, limits: Mapping[str, int]) -> pa.ChunkedArray:
    """A mask of the rows of each cell's groups from its limit on."""
    at = pc.index_in(table["cell_id"], pa.array(list(limits), pa.string()))
    limit = pc.take(pa.array([*limits.values(), None], pa.int64()), pc.fill_null(at, len(limits)))
    return pc.fill_null(pc.greater_equal(table["group"], limit), False)


def _ids(files: Iterable[TableFile]) -> set[str]:
    """Ids of the shards that the files list."""
    return set().union(*(file.ids for file in files))


def count_done(done: AbstractSet[int], groups: int) -> int:
    """Count the done groups among a cell's first ``groups``. The table may hold more, from a sweep
    with more edits."""
    return len(done) if max(done, default=-1) < groups else sum(group < groups for group in done)


def table_meta(
    number: int, shards: Sequence[TableShard], rows: int, seal: str | None = None
) -> dict[str, JSON]:
    """Metadata of a table file, for :func:`encode`: its number, its shards, its number of rows, and
    the seal of its folder (:class:`orchestrator.results.records.Identity`)."""
    listed = [shard.to_json() for shard in shards]
    meta = {"version": VERSION, "kind": "table", "number": number, "rows": rows, "shards": listed}
    return meta if seal is None else {**meta, "sweep": seal}


def _is_metadata_of(line: bytes, number: int, rows: int, seal: str | None) -> bool:
    """Return whether the metadata, as JSON text, belongs to table file ``number`` with so many
    rows. Only the beginning and the end of the text are compared.

    To parse the shards in the middle, which few readers use, would take 0.05 s of the 1 s for a
    mean over ten million rows.
    """
    whole = json.dumps(table_meta(number, [], rows, seal), sort_keys=True, ensure_ascii=False)
    begin, _, end = whole.partition("[]")
    return line.startswith(f"{begin}[".encode()) and line.endswith(f"]{end}".encode())


def _check_shard(
    shard: FinishedShard, number: int, done: Mapping[tuple[str, int], str]
) -> tuple[TableShard, dict[str, pa.Table]]:
    """Compare a finished shard's rows with its job; return its entry, and its rows by table.

    Raises :class:`TableError` if rows are missing, or if a group would be in the table twice.
    """
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
        raise TableError(
            f"{name}: group {group} of cell {cell} is in the table already, from shard {done[twice[0]]}"
        )
    beside = {}
    for of in COMMITTED.values():
        beside[of.name] = complete_rows(shard.beside.get(of.name, no_rows(of)), job, shard.progress.failures)
        lacking = _check_beside(name, beside[of.name], of, planned)
        if lacking and of is GROUPS and of.name in shard.whole:
            raise TableError(f"{name}: its rows of {of.name} lack {sorted(lacking)[:10]}")
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
    return entry, {EDITS.name: rows, **beside}


def _check_beside(
    name: str, rows: pa.Table, of: Declaration, planned: AbstractSet[tuple[str, int]]
) -> AbstractSet[tuple[str, int]]:
    """Raise :class:`TableError` for rows of another table that are there twice, or of groups that
    the shard does not have. Return the groups without a row."""
    if has_duplicates(sort_rows(rows, of.key), of.key):
        raise TableError(f"{name}: two of its rows of {of.name} have the same key {of.key}")
    found = set(zip(rows.column("cell_id").to_pylist(), rows.column("group").to_pylist(), strict=True))
    if strange := found - planned:
        raise TableError(f"{name}: rows of {of.name} for groups that are not its own: {sorted(strange)[:10]}")
    return planned - found
