"""Encode and decode sealed Parquet files: Parquet files with a checksum of the whole file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.results.columns import REPEATING, TableError, schema
from orchestrator.storage.base import ONE_OBJECT_ERRORS, Damaged, StoreError, Unreadable
from orchestrator.storage.sealed import seal_json, sha256_of, unseal_json
from workers.types import JSON

VERSION = 1
_SEAL = b"editsweep.sha256\x18\x40"  # key of the footer entry, then the thrift header of a 64-byte string
_BLANK = b"0" * 64


def encode(
    table: pa.Table, meta: Mapping[str, JSON], compression: Literal["zstd", "snappy"] = "zstd"
) -> bytes:
    """A Parquet file with ``meta`` and a checksum of the whole file in its footer. The same input
    gives the same bytes.

    For a hundred rows snappy gives the same size as zstd and is twice as fast in both directions,
    because zstd is initialised again for each of fifty columns.

    Other readers verify Parquet's page checksums, which do not cover the footer; so there is one
    more checksum over all bytes. It is computed with its own 64 digits replaced by zeros.
    """
    sink = pa.BufferOutputStream()
    few = [name for name in table.schema.names if name in REPEATING]
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=compression,
        use_dictionary=few,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"editsweep": seal_json(meta, line=True), "editsweep.sha256": _BLANK})
    data = bytearray(sink.getvalue())
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


def decode(data: bytes, name: str) -> tuple[pa.Table, dict[str, JSON]]:
    """Rows and metadata of a sealed file. Raises :class:`~orchestrator.storage.base.Damaged`,
    naming ``name``."""
    check_seal(data, name)
    with reading(name), pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        return conform(file.read(use_threads=False), name), read_meta(read_seal(file.metadata, name), name)


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


def conform(table: pa.Table, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """``table`` with the declared columns in the declared order. A column that an older file lacks
    is null."""
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
