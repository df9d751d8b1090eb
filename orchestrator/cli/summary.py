"""What several commands print: the summary of a results folder, and failures by cause."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestrator.cli.console import Output
from orchestrator.results.causes import cause_of

if TYPE_CHECKING:
    from orchestrator.results.query import Results, Union
    from orchestrator.results.report import Layout, Row

Failure = tuple[str, str, int, str]
"""Where, why, in how many attempts, and the log."""

LAYOUTS: tuple[Layout, ...] = ("wide", "medium", "narrow")


def show_summary(out: Output, results: Results | Union, partial: str | None = None) -> list[Row]:
    """Print the summary in the widest layout that fits, and return its rows."""
    from orchestrator.results.report import CAPTION, cells, footnotes, header, summary

    rows = summary(results)
    if not rows:
        return rows
    layout: Layout = next((one for one in LAYOUTS if out.fits(header(rows, one), cells(rows, one))), "narrow")
    names = header(rows, layout)
    first = names.index("T")
    out.table("so far" if partial else "", names, cells(rows, layout), right=range(first, len(names)))
    out.say(CAPTION)
    for line in footnotes(rows):
        out.say(line)
    return rows


def by_cause(failures: Iterable[Failure]) -> dict[str, list[Failure]]:
    """Failures by the first message of their cause, the most frequent cause first."""
    found: dict[str, list[Failure]] = {}
    for failure in failures:
        found.setdefault(cause_of(failure[1]), []).append(failure)
    ordered = sorted(found.values(), key=lambda some: -len(some))
    return {(some[0][1].splitlines() or [""])[0]: some for some in ordered}
