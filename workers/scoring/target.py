"""Scores of the target after the edit prompt: log-probability, smallest margin, perplexity of a
passage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workers.scoring.declare import RequestScore, Score, Settings
from workers.types import EditRequest

if TYPE_CHECKING:
    from workers.scoring.probes import Asked

_EXP_LIMIT = 709.0


def exp(value: float) -> float:
    """``math.exp``, but infinity instead of an OverflowError."""
    return math.exp(value) if value < _EXP_LIMIT else math.inf


def _logprob(request: EditRequest, asked: Sequence[Asked], settings: Settings) -> Mapping[str, float | None]:
    (one,) = (one for one in asked if one.probe.kind == "reliability")
    return {"target_logprob": one.after.logprob, "target_logprob_base": one.before.logprob}


def _margin(request: EditRequest, asked: Sequence[Asked], settings: Settings) -> Mapping[str, float | None]:
    (one,) = (one for one in asked if one.probe.kind == "reliability")
    return {"min_margin": one.after.margin}


def _perplexity(
    request: EditRequest, asked: Sequence[Asked], settings: Settings
) -> Mapping[str, float | None]:
    if not request.passage:
        return {}
    (one,) = (one for one in asked if one.probe.kind == "reliability")
    return {"perplexity": exp(-one.after.logprob), "perplexity_base": exp(-one.before.logprob)}


LOGPROB = RequestScore(
    scores=(
        Score(
            "target_logprob",
            "mean log-probability of the target tokens after the edit prompt",
            unit="nats",
            probe="reliability",
        ),
    ),
    measure=_logprob,
)
MARGIN = RequestScore(
    scores=(
        Score(
            "min_margin",
            "smallest top-2 margin over the target tokens",
            unit="logits",
            probe="reliability",
            base=False,
        ),
    ),
    measure=_margin,
)
PERPLEXITY = RequestScore(
    scores=(
        Score(
            "perplexity",
            "exp of the target's mean negative log-probability per token after the prompt, for passages",
            probe="reliability",
        ),
    ),
    measure=_perplexity,
)
