"""Read the table with Arrow, pandas, or SQL in a restricted DuckDB.

Queries come from users, scripts and shared notebooks, and column values from data sets; nothing in
a query may reach files, the network or this process. Hence an in-memory database that sees the
tables as views, ``edits`` (the rows that count, :mod:`orchestrator.results.live`), ``edits_all``
(all of them) and so on, and nothing else, takes one SELECT at a time, and can be stopped. Knows
nothing of torch or Ray.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, overload

from orchestrator.results.beside import GROUPS, REQUESTS, STORED
from orchestrator.results.cells import as_query, cells
from orchestrator.results.code import cell_codes
from orchestrator.results.columns import EDITS, Declaration, check_columns, rows_to_table, schema
from orchestrator.results.journal import Journal
from orchestrator.results.live import NEEDED, Live
from orchestrator.results.parquet import reading
from orchestrator.results.records import is_results, read_plan
from orchestrator.results.requests import read_requests
from orchestrator.results.table import CentralTable, TableFile
from orchestrator.storage.base import Missing, Store
from orchestrator.storage.local import LocalStore
from orchestrator.storage.open import open_store
from orchestrator.storage.paths import ResultsPaths
from workers.optional import optional
from workers.types import JSON, EditSweepError

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

Answer = TypeVar("Answer")

ALL = "_all"
"""Ends the name of a view that holds superseded rows, too."""

VIEWS: tuple[str, ...] = (*chain.from_iterable((name, name + ALL) for name in STORED), "cells")
"""The tables of a query: of each stored table the rows that count, and all rows; and the cells."""

FORMATS: tuple[str, ...] = ("csv", "json", "parquet")
_BATCH_ROWS = 65_536
_IN_MEMORY_BYTES = 64 << 20
"""Parquet files of less than this in total are read whole: faster than to import pyarrow.dataset
(0.3 s)."""

_FEW_VALUES = frozenset({"sweep", "model", "dataset", "method", "algorithm", "rollback", "scored", "device"})
"""Columns with few distinct texts, read as Arrow dictionaries: this halves the reading time. Ids
are not among them: Arrow skips files by a column's smallest and largest text, but does not do so
for dictionary columns."""


class QueryError(EditSweepError):
    """A query is invalid, not allowed, or took too long. The message contains DuckDB's message and
    the valid columns."""


class Reader(ABC):
    """Questions to one results folder or to several: :class:`Results` and :class:`Union`.

    Everything is asked of the rows that count, unless the superseded ones are asked for too: in
    SQL by the view ``edits_all``, in Python by ``superseded=True``. Both have a column
    ``superseded``. The same holds for the other tables.
    """

    @abstractmethod
    def table(
        self, columns: Sequence[str] | None = None, superseded: bool = False, of: str = EDITS.name
    ) -> pa.Table:
        """Every row exactly once, of running shards too; all columns, or those asked for. ``of``:
        edits, outputs, groups, requests or cells."""

    @abstractmethod
    def register(
        self, connection: duckdb.DuckDBPyConnection, names: Collection[str], suffix: str = ""
    ) -> None:
        """Make those of the :data:`VIEWS` that are among ``names``, their own names followed by
        ``suffix``."""

    def to_pandas(
        self, columns: Sequence[str] | None = None, superseded: bool = False, of: str = EDITS.name
    ) -> pd.DataFrame:
        """The same as :meth:`table`, as a pandas data frame."""
        optional("pandas", "pandas", "to_pandas()")
        frame: pd.DataFrame = self.table(columns, superseded, of).to_pandas()
        return frame

    def sql(self, query: str, time_limit: float | None = 300.0) -> pa.Table:
        """Answers one SELECT (or EXPLAIN, DESCRIBE, SUMMARIZE) over the :data:`VIEWS`.

        ``time_limit`` in seconds; None means no limit. Raises :class:`QueryError`.
        """
        with self._restricted_connection(query) as connection:
            return _run_query(connection, query, time_limit, lambda found: found.to_arrow_table())

    def first_rows(self, query: str, limit: int, time_limit: float | None = 300.0) -> tuple[pa.Table, int]:
        """The first ``limit`` rows of an answer, and its total number of rows. The other rows are
        counted but not kept in memory."""
        import pyarrow as pa

        def read(found: duckdb.DuckDBPyRelation) -> tuple[pa.Table, int]:
            reader = found.to_arrow_reader(_BATCH_ROWS)
            kept: list[pa.RecordBatch] = []
            total = 0
            for batch in reader:
                if total < limit:
                    kept.append(batch.slice(0, limit - total))
                total += batch.num_rows
            return pa.Table.from_batches(kept, schema=reader.schema), total

        with self._restricted_connection(query) as connection:
            return _run_query(connection, query, time_limit, read)

    @contextlib.contextmanager
    def _restricted_connection(self, query: str) -> Iterator[duckdb.DuckDBPyConnection]:
        import duckdb

        if not isinstance(query, str):
            raise QueryError(f"SQL: expected a text, found {query!r}")
        connection = duckdb.connect(
            ":memory:",
            config={
                "enable_external_access": False,
                "python_enable_replacements": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "allow_persistent_secrets": False,
                "temp_directory": "",
            },
        )
        try:
            # only what the query can mean is made: a large folder's rows need not be opened for its cells
            text = query.lower()
            self.register(connection, [view for view in VIEWS if re.search(rf"\b{view}\b", text)] or VIEWS)
            connection.execute("SET lock_configuration = true")
            yield connection
        finally:
            connection.close()


class Results(Reader):
    """A results folder, finished or still being written. Made by :func:`open_results`.

    >>> results = open_results("results/demo")                        # doctest: +SKIP
    >>> results.sql("select method, T, avg(locality_exact) from edits group by all")    # doctest: +SKIP
    >>> results.to_pandas()                                           # doctest: +SKIP
    """

    def __init__(self, store: Store, paths: ResultsPaths | None = None) -> None:
        self.store = store
        self.paths = paths or ResultsPaths()
        self.journal = Journal(store, self.paths)
        self.central = CentralTable(store, self.paths)

    def plan(self) -> tuple[dict[str, JSON], list[str]]:
        """Definitions of all cells this folder ever planned, by id, and the ids of those the last
        run asked for."""
        found = read_plan(self.store, self.paths)
        return ({}, []) if found is None else (found["cells"], found["current"])

    def live(self) -> Live:
        """The rows of this folder that count."""
        return Live.of_plan(*self.plan())

    def table(
        self, columns: Sequence[str] | None = None, superseded: bool = False, of: str = EDITS.name
    ) -> pa.Table:
        if of == "cells":
            found = self.sql("FROM cells")
            return found if columns is None else found.select(list(columns))
        declared = _declared(of)
        live = self.live()
        check_columns(columns, declared)
        if declared is REQUESTS:
            rows = read_requests(self.store, self.paths)
        elif declared is GROUPS:
            rows = self.central.scan(self.journal, of=declared)
            rows = self._with_failed(rows)
        else:
            read = columns if columns is None else list(dict.fromkeys((*columns, *NEEDED)))
            rows = self.central.scan(self.journal, read, declared)
        if superseded:
            rows = rows.append_column("superseded", live.superseded(rows))
        else:
            rows = live.rows(rows)
        return rows if columns is None else rows.select([*columns, *(["superseded"] if superseded else [])])

    def register(
        self, connection: duckdb.DuckDBPyConnection, names: Collection[str], suffix: str = ""
    ) -> None:
        if "cells" in names:
            found = cells(self.plan()[0], self.live(), self.central, cell_codes(self))
            connection.execute(f"CREATE TABLE cells{suffix} AS {as_query(found)}")
        for name, declared in STORED.items():
            if name in names or name + ALL in names:
                if declared is REQUESTS:
                    rows = self.table(superseded=True, of=name)
                    connection.register(f"{name}_all{suffix}", rows)
                    connection.execute(
                        f"CREATE VIEW {name}{suffix} AS "
                        f"SELECT * EXCLUDE superseded FROM {name}_all{suffix} WHERE NOT superseded"
                    )
                else:
                    self._register_rows(connection, suffix, declared)

    def _register_rows(
        self, connection: duckdb.DuckDBPyConnection, suffix: str, declared: Declaration
    ) -> None:
        import pyarrow as pa

        live = self.live()
        view, name = declared.name, f"_{declared.name}{suffix}"
        if self._bytes(declared) < _IN_MEMORY_BYTES:
            files, parts = self.central.snapshot(self.journal, declared)
            rows = pa.concat_tables([*self.central.read_files(files, of=declared), parts])
            connection.register(name, self._with_failed(rows) if declared is GROUPS else rows)
            source = f"FROM {name}"
        else:
            table = _ScannedTable(self.store, self.paths)
            files, parts = table.snapshot(self.journal, declared)
            connection.register(f"{name}_table", table.dataset(files, declared))
            if declared is GROUPS:
                parts = self._with_failed(parts)
            connection.register(f"{name}_parts", parts)
            given = "* REPLACE (coalesce(failed, false) AS failed)" if declared is GROUPS else "*"
            source = f"FROM (SELECT {given} FROM {name}_table UNION ALL SELECT * FROM {name}_parts)"
        begun = {*zip(*(parts[column].to_pylist() for column in NEEDED), strict=True)}
        if live.cover(chain((end for file in files for end in file.ends), ((c, g + 1) for c, g in begun))):
            connection.execute(f"CREATE VIEW {view}{suffix} AS SELECT * {source}")
            connection.execute(f"CREATE VIEW {view}_all{suffix} AS SELECT *, false AS superseded {source}")
            return
        # not by way of Arrow, which imports pandas to make an array of a list
        values = ", ".join(f"({_quoted(cell_id)}, {groups})" for cell_id, groups in live.limits())
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS _live{suffix} AS FROM (VALUES {values}) v(cell_id, groups)"
        )
        join = f'{source} e LEFT JOIN _live{suffix} l ON e.cell_id = l.cell_id AND e."group" < l.groups'
        connection.execute(f"CREATE VIEW {view}{suffix} AS SELECT e.* {join} WHERE l.cell_id IS NOT NULL")
        connection.execute(
            f"CREATE VIEW {view}_all{suffix} AS SELECT e.*, l.cell_id IS NULL AS superseded {join}"
        )

    def _bytes(self, declared: Declaration) -> int:
        """Bytes of a table's rows in the files of the central table."""
        if declared is EDITS:
            return sum(entry.size for entry in self.store.list(self.paths.table))
        return sum(
            file.places[declared.name][1] for file in self.central._files() if declared.name in file.places
        )

    def _with_failed(self, rows: pa.Table) -> pa.Table:
        """Rows of ``groups`` with one more for each group that failed and was not run since."""
        import pyarrow as pa
        import pyarrow.compute as pc

        at = rows.column_names.index("failed")
        rows = rows.set_column(at, rows.schema.field(at), pc.fill_null(rows["failed"], False))
        failures = self.central.failed()
        for shard_id in self.journal.begun():
            with contextlib.suppress(Missing):
                progress = self.journal.progress(shard_id)
                failures += progress.failures
        if not failures:
            return rows
        definitions, _ = self.plan()
        known = set(zip(rows["cell_id"].to_pylist(), rows["group"].to_pylist(), strict=True))
        found = {}
        for failure in failures:
            key = (failure["cell_id"], failure["group"])
            if key not in known:
                cell = definitions.get(str(failure["cell_id"]), {})
                found[key] = dict.fromkeys(c.name for c in GROUPS.columns) | {
                    "cell_id": failure["cell_id"],
                    **{name: cell.get(name) for name in ("method", "T", "seed")},
                    "group": failure["group"],
                    "failed": True,
                    "cause": f"{failure['kind']}: {failure['message']}",
                }
        return pa.concat_tables([rows, rows_to_table(list(found.values()), GROUPS.columns)])


class Union(Reader):
    """Several results folders as one table, with a first column ``results``: the folder as it was
    named. Made by :func:`open_results`."""

    def __init__(self, folders: Mapping[str, Results]) -> None:
        self.folders = folders

    def table(
        self, columns: Sequence[str] | None = None, superseded: bool = False, of: str = EDITS.name
    ) -> pa.Table:
        import pyarrow as pa

        pieces = []
        for name, folder in self.folders.items():
            rows = folder.table(columns, superseded, of)
            pieces.append(rows.add_column(0, "results", pa.repeat(name, rows.num_rows)))
        return pa.concat_tables(pieces)

    def register(
        self, connection: duckdb.DuckDBPyConnection, names: Collection[str], suffix: str = ""
    ) -> None:
        for i, folder in enumerate(self.folders.values()):
            folder.register(connection, names, f"_{i}")
        made = [view for view in VIEWS if view in names]
        pairs = [(name, name + ALL) for name in STORED if name in made or name + ALL in made]
        made = list(dict.fromkeys((*made, *chain.from_iterable(pairs))))
        for view in made:
            pieces = [
                f"SELECT {_quoted(name)} AS results, * FROM {view}_{i}" for i, name in enumerate(self.folders)
            ]
            connection.execute(f"CREATE VIEW {view}{suffix} AS {' UNION ALL '.join(pieces)}")


def _declared(name: str) -> Declaration:
    """The declaration of a stored table. Raises :class:`QueryError` for another name."""
    if name not in STORED:
        raise QueryError(f"of: no table {name!r}; the tables are {', '.join(STORED)} and cells")
    return STORED[name]


class _Piece(io.RawIOBase):
    """A piece of a stored object, read as a file of its own."""

    def __init__(self, open_object: Callable[[], BinaryIO], at: int, size: int) -> None:
        self._open, self._at, self._size, self._place = open_object, at, size, 0
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._place)
        if self._file is None:
            self._file = self._open()
        self._file.seek(self._at + self._place)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._place += len(data)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def _quoted(text: str) -> str:
    """The text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


class _ScannedTable(CentralTable):
    """A table too large to be loaded into memory. Arrow scans its files and reuses the footers that
    were read when the files were listed."""

    def __init__(self, store: Store, paths: ResultsPaths) -> None:
        import pyarrow as pa
        import pyarrow.dataset as ds

        super().__init__(store, paths)
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        self._format = ds.ParquetFileFormat(
            default_fragment_scan_options=options, dictionary_columns=_FEW_VALUES
        )
        self._filesystem, self._root = store.filesystem()
        self._fragments: dict[str, ds.ParquetFileFragment] = {}
        self._schema = schema()
        for name in _FEW_VALUES:
            at = self._schema.get_field_index(name)
            encoded = self._schema.field(at).with_type(pa.dictionary(pa.int32(), pa.string()))
            self._schema = self._schema.set(at, encoded)

    def _metadata(self, key: str, name: str) -> pq.FileMetaData:
        import pyarrow as pa

        with reading(name):
            fragment = self._fragments[key] = self._format.make_fragment(
                f"{self._root}/{key}", self._filesystem
            )
            try:
                fragment.ensure_complete_metadata()
            except (pa.ArrowException, OSError):
                super()._metadata(key, name)  # the store knows what passes, and what is no file
                fragment.ensure_complete_metadata()
            return fragment.metadata

    def dataset(self, files: Sequence[TableFile], declared: Declaration = EDITS) -> ds.Dataset:
        """Arrow data set of ``files``, which must come from this object's listing."""
        import pyarrow.dataset as ds

        if declared is not EDITS:
            places = [
                (file.key, file.places[declared.name]) for file in files if declared.name in file.places
            ]
            fragments = [
                self._format.make_fragment(_Piece(partial(self.store.open, key), at, size))
                for key, (at, size, _) in places
            ]
            return ds.FileSystemDataset(fragments, schema(declared.columns), self._format)
        fragments = [self._fragments[file.key] for file in files]
        return ds.FileSystemDataset(fragments, self._schema, self._format, self._filesystem)


@overload
def open_results(folder: str | os.PathLike[str], /) -> Results: ...


@overload
def open_results(folder: str | os.PathLike[str], /, *more: str | os.PathLike[str]) -> Results | Union: ...


def open_results(folder: str | os.PathLike[str], /, *more: str | os.PathLike[str]) -> Results | Union:
    """Open a results folder for reading, or several as one table. Raises
    :class:`~workers.types.EditSweepError` if one is none, or is given twice."""
    if not more:
        return _open(folder)
    names = [os.fspath(one) for one in (folder, *more)]
    opened = {name: _open(name) for name in names}
    places = Counter(results.store.where() for results in opened.values())
    if len(opened) < len(names) or len(places) < len(opened):
        raise EditSweepError(f"the same results folder is given twice: {', '.join(names)}")
    return Union(opened)


def _open(folder: str | os.PathLike[str]) -> Results:
    paths = ResultsPaths()
    store = open_store(folder)
    if isinstance(store, LocalStore) and not store.is_folder():
        what = "it is a file" if store.exists("") else "no such folder"
        raise EditSweepError(f"{store.root} is not a results folder: {what}")
    if not is_results(store, paths):
        raise EditSweepError(
            f"{store.where()} is not a results folder: it has no {paths.sweep} (`editsweep run` makes one)"
        )
    return Results(store, paths)


def _run_query(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    time_limit: float | None,
    read: Callable[[duckdb.DuckDBPyRelation], Answer],
) -> Answer:
    import duckdb
    import pyarrow as pa

    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        connection.interrupt()

    if time_limit is not None and not 0 < time_limit <= threading.TIMEOUT_MAX:
        raise QueryError(f"time_limit: expected a positive, finite number of seconds, found {time_limit}")
    timer = threading.Timer(time_limit, stop) if time_limit is not None else None
    try:
        _check_statement(connection, query)
        if timer is not None:
            timer.daemon = True
            timer.start()
        return read(connection.sql(query))
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # Arrow raises while rows are fetched
        if stopped.is_set():
            raise QueryError(f"the query took longer than {time_limit:g} s and was stopped") from error
        message = f"SQL: {error}"
        if isinstance(error, duckdb.BinderException) and "column" in str(error):
            asked = [of for name, of in STORED.items() if re.search(rf"\b{name}(_all)?\b", query.lower())]
            for of in asked or [EDITS]:
                message += f"\nColumns of {of.name}: {', '.join(c.name for c in of.columns)}"
        elif isinstance(error, duckdb.CatalogException) and "Table" in str(error):
            message += (
                f"\nThe tables are {', '.join(STORED)} (the rows that count), "
                f"{', '.join(name + ALL for name in STORED)} (with superseded ones) and cells."
            )
        raise QueryError(message) from error
    finally:
        if timer is not None:
            timer.cancel()


def _check_statement(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """Refuse everything but one reading statement. The locked configuration would refuse it too,
    with a less clear message."""
    import duckdb

    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise QueryError(f"SQL: one statement at a time, not {len(statements)}")
    kind = statements[0].type
    if kind not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        raise QueryError(f"SQL: {kind.name} is not allowed, the table can only be read: use SELECT")


def write(table: pa.Table, file_format: str, stream: BinaryIO, raw: bool = False) -> None:
    """Write a query's answer to a binary stream as ``csv``, ``json`` (one object per line) or
    ``parquet``.

    A control character of a text, which may steer a terminal, is written as JSON writes it
    (``\\u001b``), but for tabs and line breaks. JSON means the same by that; CSV has the text as it
    is if ``raw``. Raises :class:`QueryError` for another format.
    """
    if file_format == "csv":
        from pyarrow import csv

        table = _with_texts(table, _in_csv)
        csv.write_csv(table if raw else _without_controls(table), stream)
    elif file_format == "json":
        _write_json(table, stream)
    elif file_format == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(_with_texts(table, _in_parquet), stream, compression="zstd")
    else:
        raise QueryError(f"unknown format {file_format!r}; valid are: {', '.join(FORMATS)}")


def python_values(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """The values of a column for printing. One that Python cannot represent (an infinite date) is a
    text."""
    try:
        found = column.to_pylist()
        return [_interval(value) if isinstance(value, tuple) else value for value in found]
    except (OverflowError, ValueError, OSError):  # Arrow raises all three
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError, OSError):
        return f"<a {scalar.type} out of range>"


def _with_texts(table: pa.Table, fits: Callable[[pa.DataType], bool]) -> pa.Table:
    """Convert the columns of types that a format cannot represent: lists and structs to JSON,
    others to plain text."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if not fits(field.type):
            texts = [
                None if value is None else value if isinstance(value, str) else _json(value)
                for value in python_values(table.column(i))
            ]
            table = table.set_column(i, field.name, pa.array(map(_writable, texts), pa.string()))
    return table


def _writable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode()


def _in_csv(kind: pa.DataType) -> bool:
    import pyarrow.types as t

    primitive = t.is_primitive(kind) and not t.is_interval(kind)
    return primitive or t.is_string(kind) or t.is_null(kind) or t.is_decimal(kind)


def _in_parquet(kind: pa.DataType) -> bool:
    """Ask Arrow, which knows no list of what Parquet lacks (unions, intervals, empty maps, ...)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.table({"a": pa.array([], kind)}), pa.BufferOutputStream())
    except pa.ArrowException:
        return False
    return True


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape_controls(text: str) -> str:
    """A text with its control characters written out, but for tabs and line breaks. In JSON it means
    the same as before."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _without_controls(table: pa.Table) -> pa.Table:
    """The table with :func:`escape_controls` of every text and name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for i, field in enumerate(table.schema):
        if not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
            continue
        column = table.column(i)
        if pc.any(pc.match_substring_regex(column, _CONTROLS.pattern)).as_py():
            texts = [None if value is None else escape_controls(value) for value in column.to_pylist()]
            table = table.set_column(i, field.name, pa.array(texts, field.type))
    return table.rename_columns([escape_controls(name) for name in table.column_names])


def _write_json(table: pa.Table, stream: BinaryIO) -> None:
    names = table.column_names
    for batch in table.to_batches(max_chunksize=10_000):
        for row in zip(*map(python_values, batch.columns), strict=True):
            text = escape_controls(_json(dict(zip(names, row, strict=True))))
            stream.write(text.encode("utf-8", "replace") + b"\n")


def _json(value: Any) -> str:
    return json.dumps(_replace_nan(value), default=_number_or_text, ensure_ascii=False)


def _replace_nan(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON cannot represent them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_nan(item) for item in value]
    return _interval(value) if isinstance(value, tuple) else value


def _interval(value: Any) -> Any:
    """An interval, which Arrow gives as a tuple with names, as text: ``1 months 3 days``. The pairs
    of a map are tuples too."""
    if not hasattr(value, "months"):
        return [_replace_nan(item) for item in value]
    named = {name: getattr(value, name) for name in ("months", "days", "nanoseconds")}
    return " ".join(f"{number} {name}" for name, number in named.items() if number) or "0 days"


def _number_or_text(value: Any) -> JSON:
    """Convert a value that JSON does not support: decimals, which DuckDB returns for sums of
    integers and for literals such as 0.5, to numbers; times, dates and bytes to text."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)
