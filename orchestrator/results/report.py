"""The summary of a sweep: methods x T with mean scores, how certain they are, and what is missing.
Knows nothing of torch or Ray.

rows = summary(open_results("results/demo"))
markdown(rows)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.results.causes import by_cause
from orchestrator.results.query import Results, Union
from workers.scoring.accuracy import KINDS
from workers.types import JSON

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from orchestrator.results.query import Reader

SCORES = tuple(KINDS)
PROTOCOLS = ("exact", "token")
MEANS = tuple(f"{score}_{protocol}" for score in (*SCORES, "immediate") for protocol in PROTOCOLS)
"""The means of a summary's row; ``immediate`` is reliability right after the edit."""

Row = Mapping[str, JSON]
Layout = Literal["wide", "medium", "narrow"]

_SHOWN_CAUSES = 5


def summary(results: Results | Union) -> list[Row]:
    """One row per method and T that the last plan asked for, in that order, those without any
    result too; of several folders, per folder.

    Means over requests on the final state, ``*_exact`` and ``*_token`` as in the table; None where
    no request has the score. For each mean ``_sd``, ``_low`` and ``_high``
    (:mod:`orchestrator.results.spread`). ``edits`` of the ``asked`` ones are done; ``failed`` groups,
    and their ``causes`` with the number of groups each.
    """
    folders = {"": results} if isinstance(results, Results) else results.folders
    found: list[Row] = []
    measured = _measured(results)
    for name, folder in folders.items():
        definitions, current = folder.plan()
        asked: dict[tuple[str, int], list[str]] = {}
        for cell_id in current:
            cell = definitions[cell_id]
            asked.setdefault((str(cell["method"]), int(cell["T"])), []).append(cell_id)
        causes = _causes(folder, definitions)
        for (method, T), cell_ids in sorted(asked.items()):
            wrong = Counter[str]()
            for cell_id in cell_ids:
                wrong += causes.get(cell_id, Counter())
            row: dict[str, JSON] = {
                **({"results": name} if name else {}),
                "method": method,
                "T": T,
                "cells": len(cell_ids),
                "edits": 0,
                "asked": sum(int(definitions[cell_id]["groups"]) * T for cell_id in cell_ids),
                "failed": wrong.total(),
                "causes": dict(by_cause(wrong).most_common()),
                **dict.fromkeys(f"{mean}{what}" for mean in MEANS for what in ("", "_sd", "_low", "_high")),
            }
            row.update(measured.get((name, method, T), {}))
            found.append(row)
    return found


def _measured(results: Reader) -> dict[tuple[str, str, int], dict[str, JSON]]:
    """The means and their spread, by folder, method and T."""
    import numpy as np

    from orchestrator.results.spread import spread

    of_folder = "results" if isinstance(results, Union) else "''"
    sums = ", ".join(
        f"coalesce(sum({column}) FILTER (scored = '{moment}'), 0)::DOUBLE AS {mean}_sum, "
        f"(count({column}) FILTER (scored = '{moment}'))::DOUBLE AS {mean}_count"
        for mean, column, moment in (
            (mean, mean.replace("immediate", "reliability"), _moment(mean)) for mean in MEANS
        )
    )
    units: pa.Table = results.sql(
        f"""
        SELECT {of_folder} AS folder, method, T, seed, count(*) FILTER (scored = 'final') AS edits, {sums}
        FROM edits GROUP BY folder, method, T, seed, cell_id, CASE WHEN rollback = 'group' THEN "group" END
        ORDER BY folder, method, T, seed, cell_id, min("group")
        """
    )
    keys = list(zip(*(units[name].to_pylist() for name in ("folder", "method", "T")), strict=True))
    seeds, edits = _numbers(units["seed"]), _numbers(units["edits"])
    values = {mean: (_numbers(units[f"{mean}_sum"]), _numbers(units[f"{mean}_count"])) for mean in MEANS}
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    found: dict[tuple[str, str, int], dict[str, JSON]] = {}
    for start, stop in pairwise([*starts, len(keys)]):
        row: dict[str, JSON] = {"edits": int(np.sum(edits[start:stop]))}
        for mean, (sum_U, count_U) in values.items():
            one = spread(sum_U[start:stop], count_U[start:stop], seeds[start:stop])
            row |= {mean: one.mean, f"{mean}_sd": one.sd, f"{mean}_low": one.low, f"{mean}_high": one.high}
        found[keys[start]] = row
    return found


def _numbers(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Values without nulls. (Arrow's own ``to_numpy`` imports pandas, which takes longer than the
    summary.)"""
    import numpy as np
    import pyarrow as pa

    return np.from_dlpack(pa.concat_arrays(column.chunks) if column.chunks else pa.nulls(0, column.type))


def _moment(mean: str) -> str:
    return "immediate" if mean.startswith("immediate") else "final"


def _causes(folder: Results, definitions: Mapping[str, JSON]) -> dict[str, Counter[str]]:
    """Per cell, why groups that count have failed, and how many."""
    live = folder.live()
    found: dict[str, Counter[str]] = {}
    for failure in folder.central.failed():
        cell_id, group = str(failure["cell_id"]), int(failure["group"])
        if live.counts(cell_id, group) and cell_id in definitions:
            text = f"{failure['kind']}: {failure['message']}".splitlines()[0]
            found.setdefault(cell_id, Counter())[text] += 1
    return found


def incomplete(rows: Iterable[Row]) -> list[Row]:
    """The rows whose means lack some of the edits that were asked for."""
    return [row for row in rows if row["edits"] < row["asked"]]


def header(rows: Sequence[Row], layout: Layout = "wide") -> tuple[str, ...]:
    folder = ("results",) if rows and "results" in rows[0] else ()
    if layout == "narrow":
        short = {"portability": "port."}
        return (*folder, "method", "T", "done", *(short.get(s, f"{s[:3]}.") for s in SCORES), "right after")
    return (*folder, "method", "T", "cells", "done / asked", *SCORES, "right after the edit")


def cells(rows: Sequence[Row], layout: Layout = "wide", newline: str = "\n") -> list[tuple[str, ...]]:
    """The summary as text: the mean, exact / token; below it the deviation of seeds and the
    interval of the exact one. ``medium`` has no interval, ``narrow`` no token score either."""
    return [
        (
            *((str(row["results"]),) if "results" in row else ()),
            str(row["method"]),
            str(row["T"]),
            *(() if layout == "narrow" else (str(row["cells"]),)),
            f"{row['edits']}/{row['asked']}{'' if row['edits'] >= row['asked'] else ' *'}",
            *(_score(row, mean, layout, newline) for mean in (*SCORES, "immediate")),
        )
        for row in rows
    ]


def _score(row: Row, name: str, layout: Layout, newline: str) -> str:
    exact, token = row[f"{name}_exact"], row[f"{name}_token"]
    if exact is None or token is None:
        return "-"
    sd, low, high = (row[f"{name}_exact_{what}"] for what in ("sd", "low", "high"))
    mean = f"{exact:.2f}" if layout == "narrow" else f"{exact:.2f} / {token:.2f}"
    seeds = "± n/a" if sd is None else f"±{sd:.2f}"
    interval = "" if layout != "wide" else " [n/a]" if low is None else f" [{low:.2f}, {high:.2f}]"
    return f"{mean}{newline}{seeds}{interval}"


def markdown(rows: Sequence[Row]) -> str:
    """The summary as a Markdown table."""
    names = header(rows)
    body = [names, tuple("---" for _ in names), *cells(rows, newline=" ")]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in body)


def footnotes(rows: Sequence[Row]) -> list[str]:
    """A line for each row whose means lack edits: how many, and why."""
    lines = []
    for row in incomplete(rows):
        place = f"{row['results']}: " if "results" in row else ""
        text = (
            f"* {place}{row['method']} T={row['T']}: {row['asked'] - row['edits']} of {row['asked']} edits "
        )
        text += "have no result, so the means are of the others" if row["edits"] else "have no result"
        causes = list(row["causes"].items())
        if causes:
            shown = [f"{count} x {cause[:200]}" for cause, count in causes[:_SHOWN_CAUSES]]
            more = [f"{len(causes) - _SHOWN_CAUSES} further causes"] if len(causes) > _SHOWN_CAUSES else []
            text += f"; {row['failed']} groups failed: {'; '.join(shown + more)}"
        else:
            text += "; not run yet"
        lines.append(text)
    return lines


CAPTION = (
    "Means over requests, exact match / share of right tokens, scored on the final state of each group; the last "
    "column is reliability right after each edit, which hides what later edits undo. ±: standard deviation over "
    "seeds. [ ]: 95% bootstrap interval of the exact match, drawn by groups, whose requests share one edited model "
    "(with rollback: never by cells). n/a: one seed alone, or fewer than five groups (cells)."
)
