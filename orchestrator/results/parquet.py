"""Encode and decode sealed Parquet files: Parquet files with a checksum of the whole file.

A sealed file may hold rows of further tables. They lie between its own rows and its footer, each as
a whole Parquet file, and the footer names their places. So rows of several tables appear, are
replaced and are damaged together; other readers of Parquet see the first table alone.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.results.beside import COMMITTED
from orchestrator.results.columns import EDITS, REPEATING, Declaration, TableError, no_rows, schema
from orchestrator.storage.base import ONE_OBJECT_ERRORS, Damaged, StoreError, Unreadable
from orchestrator.storage.sealed import seal_json, sha256_of, unseal_json
from workers.types import JSON

VERSION = 1
_SEAL = b"editsweep.sha256\x18\x40"  # key of the footer entry, then the thrift header of a 64-byte string
_BLANK = b"0" * 64


_NONE: Mapping[str, pa.Table] = MappingProxyType({})

Compression = Literal["zstd", "snappy"]

Place = tuple[int, int, int]
"""Where the rows of another table lie in a file: first byte, bytes, rows."""

PLACES = b"editsweep.beside"
"""Key of the footer's entry that lists these places."""


def encode(
    table: pa.Table,
    meta: Mapping[str, JSON],
    compression: Compression = "zstd",
    beside: Mapping[str, pa.Table] = _NONE,
    whole: bool = False,
) -> bytes:
    """A Parquet file with ``meta`` and a checksum of the whole file in its footer. The same input
    gives the same bytes. ``beside``: rows of further tables, by name; of one without rows only the
    name is noted. ``whole``: the rows are read as a whole, so they are compressed harder, without
    statistics.

    For a hundred rows snappy gives the same size as zstd and is twice as fast in both directions,
    because zstd is initialised again for each of fifty columns.

    Other readers verify Parquet's page checksums, which do not cover the footer; so there is one
    more checksum over all bytes. It is computed with its own 64 digits replaced by zeros.
    """
    sink = pa.BufferOutputStream()
    few = [name for name in table.schema.names if name in REPEATING]
    notes = {"editsweep": seal_json(meta, line=True), "editsweep.sha256": _BLANK}
    more: dict[str, Any] = {"compression_level": 15, "write_statistics": False} if whole else {}
    with _writer(sink, table, compression, few, **more) as writer:
        writer.write_table(table)
        places: dict[str, JSON] = {}
        for name, other in beside.items():
            data = _encode_other(COMMITTED[name], other, compression) if other.num_rows else b""
            places[name] = [sink.tell(), len(data), other.num_rows]
            sink.write(data)
        if places:
            notes[PLACES.decode()] = seal_json(places, line=True)
        writer.add_key_value_metadata(notes)
    return _seal(bytearray(sink.getvalue()))


def _writer(
    sink: pa.BufferOutputStream,
    table: pa.Table,
    compression: Compression,
    few: list[str],
    **more: Any,
) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        sink,
        table.schema,
        compression=compression,
        use_dictionary=few,
        write_page_checksum=True,
        store_schema=False,
        **more,
    )


_COUNTED = ("group", "position")
"""Whole numbers that ascend: their differences take hardly any room."""


def _encode_other(of: Declaration, table: pa.Table, compression: Compression) -> bytes:
    """Rows of another table, as a Parquet file without a seal of its own. They are few, so what is
    the same for any number of rows counts: columns without a value are left out (readers add them),
    and only cells have statistics, by which readers skip files."""
    table = table.select([name for name in table.column_names if table[name].null_count < table.num_rows])
    texts = {c.name for c in of.columns if c.kind == "text"}
    ascending = [name for name in table.column_names if name in _COUNTED]
    few = [
        field.name
        for field in table.schema
        if not pa.types.is_floating(field.type) and field.name not in (*texts, *ascending)
    ]
    sink = pa.BufferOutputStream()
    with _writer(
        sink,
        table,
        compression,
        few,
        compression_level=9 if compression == "zstd" else None,
        column_encoding=dict.fromkeys(ascending, "DELTA_BINARY_PACKED"),
        write_statistics=["cell_id"],
    ) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _seal(data: bytearray) -> bytes:
    at = data.rfind(_SEAL + _BLANK)
    if at < 0:
        raise TableError(
            "this version of pyarrow writes Parquet footers in another layout: no place for the checksum"
        )
    at += len(_SEAL)
    data[at : at + 64] = sha256_of(data).encode()
    return bytes(data)


def check_seal(data: bytes, name: str) -> None:
    """Verify the checksum of a file made by :func:`encode`. Raises
    :class:`~orchestrator.storage.base.Damaged`, naming ``name``."""
    at = data.rfind(_SEAL)
    if at < 0 or at + len(_SEAL) + 64 > len(data):
        raise Damaged(f"{name}: truncated, or not one of our Parquet files")
    at += len(_SEAL)
    view = memoryview(data)
    if sha256_of(view[:at], _BLANK, view[at + 64 :]).encode() != data[at : at + 64]:
        raise Damaged(f"{name}: checksum does not match its contents")


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Convert the errors of a block that reads the file ``name``.

    Arrow reports a damaged file as ArrowInvalid, or as OSError without ``errno``: these become
    :class:`~orchestrator.storage.base.Damaged`. An OSError with ``errno`` comes from the operating
    system and becomes :class:`~orchestrator.storage.base.StoreError`.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            kind = Unreadable if error.errno in ONE_OBJECT_ERRORS else StoreError
            raise kind("read", name, error.strerror or str(error)) from error
        raise Damaged(f"{name}: {error}") from error


def decode(data: bytes, name: str, of: Declaration = EDITS) -> tuple[pa.Table, dict[str, JSON]]:
    """Rows and metadata of a sealed file whose own table is ``of``. Raises :class:`~orchestrator.storage.base.Damaged`,
    naming ``name``."""
    check_seal(data, name)
    with reading(name), pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        rows = conform(file.read(use_threads=False), name, of=of)
        return rows, read_meta(read_seal(file.metadata, name), name)


def decode_beside(data: bytes, name: str, of: Declaration) -> pa.Table | None:
    """Rows of another table in a sealed file; None if it was written by a version that did not know
    the table. Raises :class:`~orchestrator.storage.base.Damaged`, naming ``name``."""
    check_seal(data, name)
    with reading(name):
        metadata = pq.read_metadata(pa.BufferReader(data))
    place = read_places((metadata.metadata or {}).get(PLACES), name).get(of.name)
    return None if place is None else read_beside(io.BytesIO(data), name, of, place)


def read_places(noted: bytes | None, name: str) -> dict[str, Place]:
    """Where the rows of further tables lie in a file, by table. ``noted``: the entry
    :data:`PLACES` of its footer."""
    if noted is None:
        return {}
    found = unseal_json(noted, name)
    return {table: (int(at), int(size), int(rows)) for table, (at, size, rows) in found.items()}


def read_beside(
    file: BinaryIO, name: str, of: Declaration, place: Place, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of another table from their place in an open file. Page checksums are verified."""
    at, size, rows = place
    if not rows:
        return conform(no_rows(of), name, columns, of)
    file.seek(at)
    with (
        reading(name),
        pq.ParquetFile(pa.BufferReader(file.read(size)), page_checksum_verification=True) as parquet,
    ):
        present = set(parquet.schema_arrow.names)
        wanted = None if columns is None else [c for c in columns if c in present]
        found = conform(parquet.read(columns=wanted, use_threads=False), name, columns, of)
    if found.num_rows != rows:
        raise Damaged(f"{name}: has {found.num_rows} rows of {of.name} where {rows} were listed")
    return found


def read_footer(file: BinaryIO, name: str) -> tuple[dict[str, JSON], int]:
    """Metadata and number of rows, without reading the rows. Raises
    :class:`~orchestrator.storage.base.Damaged`."""
    with reading(name):
        metadata = pq.read_metadata(file)
    return read_meta(read_seal(metadata, name), name), metadata.num_rows


def read_seal(metadata: pq.FileMetaData, name: str) -> bytes:
    sealed: bytes | None = (metadata.metadata or {}).get(b"editsweep")
    if sealed is None:
        raise Damaged(f"{name}: not one of our Parquet files")
    return sealed


def read_meta(sealed: bytes, name: str) -> dict[str, JSON]:
    meta = unseal_json(sealed, name)
    if meta.get("version") != VERSION:
        raise TableError(
            f"{name}: written in format {meta.get('version')}, this editsweep reads format {VERSION}"
        )
    return meta


def conform(
    table: pa.Table, name: str, columns: Sequence[str] | None = None, of: Declaration = EDITS
) -> pa.Table:
    """``table`` with the declared columns in the declared order. A column that an older file lacks
    is null."""
    declared = schema(of.columns)
    if columns is not None:
        table = table.select([c for c in columns if c in table.column_names])
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
