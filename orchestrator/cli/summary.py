"""Print the summary table of a results folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.cli.console import Output

if TYPE_CHECKING:
    from orchestrator.results.query import Results


def show_summary(out: Output, results: Results, partial: str | None) -> None:
    from orchestrator.results.report import CAPTION, HEADER, cells, summary

    rows = summary(results)
    if not rows:
        return
    out.table("so far" if partial else "", HEADER, cells(rows), right=range(1, len(HEADER)))
    out.say(CAPTION)
