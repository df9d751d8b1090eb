"""The held-out text of the general-ability probe."""

from __future__ import annotations

from pathlib import Path

from workers.data.records import read_text
from workers.types import DataError


def read_held_out(path: Path) -> str:
    """The text of a file, stripped. Raises DataError for a file that is missing, not UTF-8, or
    empty."""
    text = read_text(path).strip()
    if not text:
        raise DataError(f"{path}: `scoring.ability_text` is empty")
    return text
