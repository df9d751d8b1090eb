"""Questions to the table: Arrow, pandas, or SQL in a locked-down DuckDB.

Queries come from users, scripts and shared notebooks, and column values from data sets; nothing in
a query may reach files, the network or this process. Hence an in-memory database that sees the
table as the view ``edits`` and nothing else, takes one SELECT at a time, and can be stopped. Knows
nothing of torch or Ray.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from orchestrator.results.columns import COLUMNS, schema
from orchestrator.results.journal import Journal
from orchestrator.results.parquet import reading
from orchestrator.results.table import CentralTable, TableFile
from orchestrator.storage.base import Missing, Store
from orchestrator.storage.local import LocalStore
from orchestrator.storage.open import open_store
from orchestrator.storage.paths import ResultsPaths
from orchestrator.storage.sealed import unseal_json
from workers.optional import optional
from workers.types import JSON, EditSweepError

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

Answer = TypeVar("Answer")

FORMATS: tuple[str, ...] = ("csv", "json", "parquet")
_BATCH_ROWS = 65_536
_IN_MEMORY_BYTES = (
    64 << 20
)  # of Parquet files: below, reading all is faster than importing pyarrow.dataset (0.3 s)
_FEW_VALUES = frozenset({"sweep", "model", "dataset", "method", "algorithm", "rollback", "scored", "device"})
"""Columns of a few texts repeated in every row: kept as the dictionaries they lie in, they are read
in half the time. Not ids: Arrow passes over files by the least and greatest text of a column, but
not where it is a dictionary."""


class QueryError(EditSweepError):
    """A query is wrong, not allowed, or took too long. The message holds DuckDB's own and the valid
    columns."""


class Results:
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
        try:
            found = unseal_json(self.store.read(self.paths.plan), self.store.where(self.paths.plan))
        except Missing:
            return {}, []
        return found["cells"], found["current"]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Every row exactly once, of running shards too; all columns, or those asked for."""
        return self.central.scan(self.journal, columns)

    def to_pandas(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The same as a pandas data frame."""
        optional("pandas", "pandas", "to_pandas()")
        frame: pd.DataFrame = self.table(columns).to_pandas()
        return frame

    def sql(self, query: str, time_limit: float | None = 300.0) -> pa.Table:
        """Answers one SELECT (or EXPLAIN, DESCRIBE, SUMMARIZE) over the view ``edits``.

        ``time_limit`` in seconds; None waits forever. Raises :class:`QueryError`.
        """
        with self._locked_down() as connection:
            return _answer(connection, query, time_limit, lambda found: found.to_arrow_table())

    def first_rows(self, query: str, limit: int, time_limit: float | None = 300.0) -> tuple[pa.Table, int]:
        """The first ``limit`` rows of an answer, and how many it has. The rest is counted as it
        comes and never held."""
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

        with self._locked_down() as connection:
            return _answer(connection, query, time_limit, read)

    @contextlib.contextmanager
    def _locked_down(self) -> Iterator[duckdb.DuckDBPyConnection]:
        import duckdb

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
            self._register(connection)
            connection.execute("SET lock_configuration = true")
            yield connection
        finally:
            connection.close()

    def _register(self, connection: duckdb.DuckDBPyConnection) -> None:
        import pyarrow as pa

        if sum(entry.size for entry in self.store.list(self.paths.table)) < _IN_MEMORY_BYTES:
            files, parts = self.central.snapshot(self.journal)
            pieces = [self.central.read_file(file) for file in files]
            connection.register("edits", pa.concat_tables([*pieces, parts]))
            return
        table = _ScannedTable(self.store, self.paths)
        files, parts = table.snapshot(self.journal)
        connection.register("_table", table.dataset(files))
        connection.register("_parts", parts)
        connection.execute("CREATE VIEW edits AS SELECT * FROM _table UNION ALL SELECT * FROM _parts")


class _ScannedTable(CentralTable):
    """A table too large to be loaded: Arrow scans it, with the footers that its listing has
    read."""

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
            kept = self._schema.field(at).with_type(pa.dictionary(pa.int32(), pa.string()))
            self._schema = self._schema.set(at, kept)

    def _metadata(self, key: str, name: str) -> pq.FileMetaData:
        with reading(name):
            fragment = self._fragments[key] = self._format.make_fragment(
                f"{self._root}/{key}", self._filesystem
            )
            fragment.ensure_complete_metadata()
            return fragment.metadata

    def dataset(self, files: Sequence[TableFile]) -> ds.Dataset:
        """The rows of ``files``, which this object has listed."""
        import pyarrow.dataset as ds

        fragments = [self._fragments[file.key] for file in files]
        return ds.FileSystemDataset(fragments, self._schema, self._format, self._filesystem)


def open_results(folder: str | os.PathLike[str]) -> Results:
    """Opens a results folder for reading. Raises :class:`~workers.types.EditSweepError` if it is
    none."""
    paths = ResultsPaths()
    store = open_store(folder)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        what = "it is a file" if store.root.exists() else "no such folder"
        raise EditSweepError(f"{store.root} is not a results folder: {what}")
    if not store.exists(paths.sweep):
        raise EditSweepError(
            f"{store.where()} is not a results folder: it has no {paths.sweep} (`editsweep run` makes one)"
        )
    return Results(store, paths)


def _answer(
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

    timer = threading.Timer(time_limit, stop) if time_limit is not None else None
    try:
        _allow(connection, query)
        if timer is not None:
            timer.daemon = True
            timer.start()
        return read(connection.sql(query))
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # Arrow's where the rows are being fetched
        if stopped.is_set():
            raise QueryError(f"the query took longer than {time_limit:g} s and was stopped") from error
        message = f"SQL: {error}"
        if isinstance(error, duckdb.BinderException) and "column" in str(error):
            message += f"\nColumns of edits: {', '.join(c.name for c in COLUMNS)}"
        elif isinstance(error, duckdb.CatalogException) and "Table" in str(error):
            message += "\nThe only table is called edits."
        raise QueryError(message) from error
    finally:
        if timer is not None:
            timer.cancel()


def _allow(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """One statement that only reads. The locked configuration stands behind this; this gives the
    clearer message."""
    import duckdb

    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise QueryError(f"SQL: one statement at a time, not {len(statements)}")
    kind = statements[0].type
    if kind not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        raise QueryError(f"SQL: {kind.name} is not allowed, the table can only be read: use SELECT")


def write(table: pa.Table, file_format: str, stream: BinaryIO) -> None:
    """Writes a query's answer as ``csv``, ``json`` (one object per line) or ``parquet`` to a binary
    stream.

    Raises :class:`QueryError` for another format.
    """
    if file_format == "csv":
        from pyarrow import csv

        csv.write_csv(_plain(table), stream)
    elif file_format == "json":
        _write_json(table, stream)
    elif file_format == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, stream, compression="zstd")
    else:
        raise QueryError(f"unknown format {file_format!r}; valid are: {', '.join(FORMATS)}")


def _plain(table: pa.Table) -> pa.Table:
    """Lists, structs and the like as JSON text: CSV has no notation for them."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            values = [None if value is None else _json(value) for value in table.column(i).to_pylist()]
            table = table.set_column(i, field.name, pa.array(values, pa.string()))
    return table


def _write_json(table: pa.Table, stream: BinaryIO) -> None:
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            stream.write(_json(row).encode() + b"\n")


def _json(value: Any) -> str:
    return json.dumps(_finite(value), default=_number_or_text, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """Null for what is not a number, which has no JSON notation."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _number_or_text(value: Any) -> JSON:
    """DuckDB sums integers and writes 0.5 as decimals; times, dates and bytes become text."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)
