"""Accuracy on texts about the subject from other sources, token by token, as in the public code of
WISE (arXiv 2405.14768)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workers.scoring.declare import RequestScore, Score, Settings
from workers.types import EditRequest

if TYPE_CHECKING:
    from workers.scoring.probes import Asked


def _measure(request: EditRequest, asked: Sequence[Asked], settings: Settings) -> Mapping[str, float | None]:
    values: dict[str, list[float]] = {}
    for one in asked:
        if one.probe.kind == "ood":
            for suffix, answer in (("", one.after), ("_base", one.before)):
                hits = answer.hits(one.probe.scored)
                values.setdefault(f"ood_token{suffix}", []).append(sum(hits) / len(hits))
                values.setdefault(f"ood_confident{suffix}", []).append(answer.confident)
    return {name: sum(found) / len(found) for name, found in values.items()}


OUT_OF_DISTRIBUTION = RequestScore(
    scores=(
        Score(
            "ood_token",
            "share of the tokens of an out-of-distribution text predicted, the first one aside",
            unit="0..1",
            probe="ood",
        ),
        Score(
            "ood_confident",
            "share of its tokens that get a probability above 0.8, the first one aside",
            unit="0..1",
            probe="ood",
        ),
    ),
    measure=_measure,
)
