"""Selection of cells by a condition such as ``method=wise,T=1000``.

>>> chosen = select(["method=wise,T=1000", "seed=3"], cells)      # of either kind      # doctest: +SKIP

Within one text all keys must match; a key given twice matches either value. Of several texts, a
cell must match at least one. Independent of torch and Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from workers.types import JSON, SpecError

KEYS = ("method", "algorithm", "T", "seed", "cell")
"""Valid keys. ``cell`` is a cell id or its beginning (at least four characters), as is a text
without ``=``."""

_SHOWN = 12
_PREFIX = 4


def select(texts: Sequence[str], cells: Iterable[Mapping[str, JSON]], option: str) -> frozenset[str]:
    """Ids of the cells that match any of ``texts``. Each of ``cells`` has cell_id, method,
    algorithm, T and seed.

    Raises :class:`SpecError`, naming ``option``, for an invalid text, and for one that matches no
    cell.
    """
    known = list(cells)
    chosen: set[str] = set()
    for text in texts:
        wanted = _parse(text, option)
        found = {
            str(cell["cell_id"]) for cell in known if all(_matches(cell, key, wanted[key]) for key in wanted)
        }
        if not found:
            raise SpecError(f"{option} {text!r} fits no cell; {_existing_values(known, wanted)}")
        chosen |= found
    return frozenset(chosen)


def _parse(text: str, option: str) -> dict[str, set[str]]:
    wanted: dict[str, set[str]] = {}
    for piece in text.split(","):
        key, sign, value = (part.strip() for part in piece.partition("="))
        if not sign:
            key, value = "cell", key
        if key not in KEYS:
            raise SpecError(f"{option} {text!r}: {key!r} is unknown; valid are: {', '.join(KEYS)}")
        if not value:
            raise SpecError(f"{option} {text!r}: expected key=value, for example method=wise,T=1000")
        if key == "cell" and len(value) < _PREFIX:
            raise SpecError(f"{option} {text!r}: give at least {_PREFIX} characters of a cell's id")
        wanted.setdefault(key, set()).add(value)
    return wanted


def _matches(cell: Mapping[str, JSON], key: str, values: set[str]) -> bool:
    if key == "cell":
        return any(str(cell["cell_id"]).startswith(value) for value in values)
    return str(cell[key]) in values


def _existing_values(cells: Sequence[Mapping[str, JSON]], wanted: Mapping[str, set[str]]) -> str:
    """List the values that the cells have for the keys of ``wanted``, for an error message."""
    if not cells:
        return "there are no cells"
    parts = []
    for key in wanted:
        found = {cell["cell_id" if key == "cell" else key] for cell in cells}
        values = [str(value) for value in sorted(found)]  # numbers by size
        more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
        parts.append(f"{key}: {', '.join(values[:_SHOWN])}{more}")
    return f"there are {'; '.join(parts)}"
