"""The held-out text of the general-ability probe."""

from __future__ import annotations

from pathlib import Path

from workers.data.records import read_text
from workers.types import DataError


def read_held_out(path: Path) -> str:
    """The text of a file, stripped. Raises DataError for a file that is missing, not UTF-8, or
    empty."""
    try:
        text = read_text(path).strip()
    except DataError as error:
        raise DataError(f"scoring.ability_text: {error}") from None
    if not text:
        raise DataError(f"scoring.ability_text: {path}: the file is empty")
    return text
