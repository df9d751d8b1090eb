"""One request with everything that was asked and answered, from a results folder alone.

    found = show(open_results("results/demo"), "zsre-17")
    found["request"]["prompt"], found["answers"][0]["outputs"]

Knows nothing of torch or Ray.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.results.columns import COLUMNS
from orchestrator.results.select import select
from orchestrator.results.table import count_done
from workers.types import JSON, EditSweepError

if TYPE_CHECKING:
    from orchestrator.results.query import Results

_SIMILAR = 5
"""So many ids that resemble an unknown one are named."""

_SCORES = tuple(c.name for c in COLUMNS if c.kind == "score" and not c.name.endswith("_base"))
_PLACE = ("cell_id", "method", "T", "seed", "group", "position", "scored", "edits_applied")
_WRITTEN = ("probe", "number", "how", "text", "ending", "correct", "text_base", "ending_base", "correct_base")
_KINDS = ("reliability", "generalization", "locality", "portability", "ood")


def show(results: Results, case_id: str, cells: Sequence[str] = ()) -> dict[str, JSON]:
    """``request``: its texts, None if the folder was written by a version that did not keep them;
    ``questions``: everything that is asked, with what is expected; ``answers``: per cell and moment
    the scores and what was written, of final rows and of others that outputs were kept of;
    ``others``: cells without a final row of this request; ``finished`` ones do not edit it.

    ``cells``: conditions on cells (:mod:`orchestrator.results.select`). Raises
    :class:`EditSweepError` for an unknown case, naming similar ones, and for a condition that fits
    no cell.
    """
    of_case = f"case_id = '{case_id.replace(chr(39), 2 * chr(39))}'"
    requests = results.sql(f"FROM requests WHERE {of_case}").to_pylist()
    names = ", ".join(f'"{name}"' for name in (*_PLACE, *_SCORES))
    rows = results.sql(f"SELECT {names} FROM edits WHERE {of_case}").to_pylist()
    if not requests and not rows:
        raise EditSweepError(_unknown(results, case_id))
    planned, current = results.plan()
    asked = [{"cell_id": cell_id, **planned[cell_id]} for cell_id in current]
    asked = asked or list({row["cell_id"]: {**row, "algorithm": row["method"]} for row in rows}.values())
    chosen = select(cells, asked, "show") if cells else {str(cell["cell_id"]) for cell in asked}
    outputs: dict[tuple[JSON, ...], list[dict[str, JSON]]] = {}
    for row in results.sql(f"FROM outputs WHERE {of_case}").to_pylist():
        outputs.setdefault(_place(row), []).append({name: row[name] for name in _WRITTEN})
    place_of = {str(cell["cell_id"]): place for place, cell in enumerate(asked)}
    answers = [
        {
            **{name: row[name] for name in _PLACE},
            "scores": {name: row[name] for name in _SCORES if row[name] is not None},
            "outputs": sorted(outputs.get(_place(row), ()), key=_order),
        }
        for row in sorted(rows, key=lambda r: (place_of[r["cell_id"]], r["edits_applied"], r["scored"]))
        if row["cell_id"] in chosen and (row["scored"] == "final" or _place(row) in outputs)
    ]
    have = {answer["cell_id"] for answer in answers if answer["scored"] == "final"}
    done = results.central.done()
    request = requests[0] if requests else None
    return {
        "case_id": case_id,
        "request": request,
        "questions": [] if request is None else _questions(request),
        "answers": answers,
        "others": [
            {name: cell[name] for name in ("cell_id", "method", "T", "seed")}
            | {
                "finished": count_done(done.get(cell["cell_id"], set()), cell.get("groups", 0))
                == cell.get("groups")
            }
            for cell in asked
            if cell["cell_id"] in chosen - have
        ],
    }


def _place(row: dict[str, JSON]) -> tuple[JSON, ...]:
    return tuple(row[name] for name in ("cell_id", "group", "position", "scored", "edits_applied"))


def _order(row: dict[str, JSON]) -> tuple[int, int, bool]:
    return _KINDS.index(row["probe"]), row["number"], row["how"] == "generated"


def _questions(request: dict[str, JSON]) -> list[dict[str, JSON]]:
    """Everything that is asked, in the form and order of ``requests.probes``."""
    own = [("reliability", 0, request["prompt"])]
    own += [("generalization", number, text) for number, text in enumerate(request["rephrases"])]
    plain: dict[str, JSON] = {"target": request["target"], "aliases": [], "probe_group": None}
    return [{"probe": p, "number": n, "prompt": text, **plain} for p, n, text in own] + list(
        request["probes"]
    )


def _unknown(results: Results, case_id: str) -> str:
    known = {row["case_id"] for row in results.sql("SELECT DISTINCT case_id FROM requests").to_pylist()}
    known |= {row["case_id"] for row in results.sql("SELECT DISTINCT case_id FROM edits").to_pylist()}
    similar = difflib.get_close_matches(case_id, sorted(known), n=_SIMILAR)
    shown = similar or sorted(known)[:_SIMILAR]
    what = "similar ids" if similar else "the first of its ids"
    hint = f"{what}: {', '.join(shown)}" if shown else "it holds no requests yet"
    return f"CASE_ID: {results.store.where()} has no request {case_id!r}; {hint}"
