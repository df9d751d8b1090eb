"""JSON with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from orchestrator.storage.base import Damaged
from workers.types import JSON


def sha256_of(*data: bytes | bytearray | memoryview) -> str:
    """The SHA-256 checksum of the concatenated pieces, hexadecimal."""
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    return digest.hexdigest()


_HEAD, _MIDDLE = b'{"sha256": "', b'", "value": '
"""The text before and after the checksum of a value sealed in one line."""


def seal_json(value: Mapping[str, JSON], line: bool = False) -> bytes:
    """A JSON object with its checksum. ``line``: write one line instead of an indented text; it is
    read in half the time (0.05 s instead of 0.11 s for the metadata of ten million rows)."""
    body = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    digest = sha256_of(body)
    if line:
        return _HEAD + digest.encode() + _MIDDLE + body + b"}"
    return json.dumps(
        {"sha256": digest, "value": value}, sort_keys=True, indent=1, ensure_ascii=False
    ).encode()


def unseal_line(data: bytes) -> bytes | None:
    """The JSON text of a value that was sealed with ``line=True``, not parsed. None if the format
    or the checksum is wrong."""
    digest, middle, body = data[len(_HEAD) :].partition(_MIDDLE)
    whole = (
        data.startswith(_HEAD) and middle and data.endswith(b"}") and sha256_of(body[:-1]).encode() == digest
    )
    return body[:-1] if whole else None


def unseal_json(data: bytes, name: str, *fields: str) -> dict[str, JSON]:
    """The value given to :func:`seal_json`. Raises :class:`Damaged`, naming ``name``, for one that
    is altered, or of another kind: without one of ``fields``."""
    line = unseal_line(data)
    try:
        if line is not None:
            value = json.loads(line.decode())
            whole = True
        else:  # indented: the checksum is that of the compact text
            sealed = json.loads(data.decode())
            value = sealed["value"]
            body = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
            whole = sha256_of(body) == sealed["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{name}: not one of our JSON files ({type(error).__name__})") from error
    if not isinstance(value, dict) or not whole:
        raise Damaged(f"{name}: checksum does not match its contents")
    if lacking := [field for field in fields if field not in value]:
        raise Damaged(f"{name}: another file under this name, it lacks {', '.join(lacking)}")
    return value
