"""The summary of a sweep: mean scores per method and T, read with SQL. Independent of torch and
Ray.

rows = summary(open_results("results/demo"))
markdown(rows)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workers.scoring.accuracy import KINDS
from workers.types import JSON

if TYPE_CHECKING:
    from orchestrator.results.query import Results

SCORES = tuple(KINDS)

Row = Mapping[str, JSON]


def summary(results: Results) -> list[Row]:
    """One row per method and T, in that order: mean scores on the final state, and reliability
    right after the edit.

    ``*_exact`` and ``*_token`` as in the table; a score that no request has is None. Cells of
    earlier definitions (for example with another value of a hyperparameter) stay in the table but
    are left out here, because a mean over different definitions has no meaning.
    """
    _, current = results.plan()
    if not current:
        return []
    wanted = ", ".join(f"'{cell_id}'" for cell_id in current)
    final = ", ".join(
        f"avg({score}_{protocol}) FILTER (scored = 'final') AS {score}_{protocol}"
        for score in SCORES
        for protocol in ("exact", "token")
    )
    table = results.sql(
        f"""
        SELECT method, T, count(DISTINCT cell_id) AS cells, count(*) FILTER (scored = 'final') AS edits, {final},
               avg(reliability_exact) FILTER (scored = 'immediate') AS immediate_exact,
               avg(reliability_token) FILTER (scored = 'immediate') AS immediate_token
        FROM edits WHERE cell_id IN ({wanted}) GROUP BY method, T ORDER BY method, T
        """
    )
    rows: list[Row] = table.to_pylist()
    return rows


HEADER = ("method", "T", "cells", "edits", *SCORES, "right after the edit")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The summary as text; each score as "exact / token"."""
    return [
        (
            str(row["method"]),
            str(row["T"]),
            str(row["cells"]),
            str(row["edits"]),
            *(_pair(row[f"{score}_exact"], row[f"{score}_token"]) for score in SCORES),
            _pair(row["immediate_exact"], row["immediate_token"]),
        )
        for row in rows
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The summary as a Markdown table."""
    body = [HEADER, tuple("---" for _ in HEADER), *cells(rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in body)


CAPTION = (
    "Means over requests, exact match / share of right tokens, scored on the final state of each group; "
    "the last column is reliability right after each edit, which hides what later edits undo."
)


def _pair(exact: float | None, token: float | None) -> str:
    return "-" if exact is None or token is None else f"{exact:.2f} / {token:.2f}"
