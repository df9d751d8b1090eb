"""Accuracy on the best of several phrasings of a question, as in MQuAKE (arXiv 2305.14795)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workers.scoring.declare import RequestScore, Score, Settings
from workers.types import EditRequest

if TYPE_CHECKING:
    from workers.scoring.probes import Asked

_BEST = "the best of the portability prompts that are phrasings of one question"


def _measure(request: EditRequest, asked: Sequence[Asked], settings: Settings) -> Mapping[str, float | None]:
    phrasings = [one for one in asked if one.probe.kind == "portability"] if request.any_of else []
    if not phrasings:
        return {}
    found: dict[str, float | None] = {}
    for suffix, of_base in (("", False), ("_base", True)):
        _, exact, generated = zip(*(one.accuracy(of_base) for one in phrasings), strict=True)
        found |= {
            f"portability_any_exact{suffix}": max(exact),
            f"portability_any_generated{suffix}": max(generated),
        }
    return found


ANY_OF = RequestScore(
    scores=(
        Score(
            "portability_any_exact",
            f"{_BEST}: 1 if every target token is predicted under teacher forcing",
            unit="0..1",
            probe="portability",
        ),
        Score(
            "portability_any_generated",
            f"{_BEST}: 1 if greedy generation with a natural stop gives the normalised target or an alias",
            unit="0..1",
            probe="portability",
            setting="generated",
        ),
    ),
    measure=_measure,
)
