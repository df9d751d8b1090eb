"""What the models wrote in answer to a request's probes, as text. The answers are there when they
are scored; here they become rows of the table ``outputs``.

``teacher_forced``: the most probable token at each position of the target, given the target's
tokens before it; ``generated``: the greedy continuation of the prompt, where the sweep generates.
Its ending is ``natural`` (a line, a sentence or the text ended), ``cut`` (at the limit of tokens)
or ``dropped``: it could no longer become the right answer, so it was not continued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import get_args

from workers.job import ScoreConfig
from workers.scoring.probes import Answer, Asked, Kind, Text
from workers.types import JSON

FIRST = 100
"""With ``keep_outputs: first``, so many requests of a cell are kept, the first in its order."""


def kept(config: ScoreConfig, scored: str, number: int) -> bool:
    """Return whether outputs are kept of a cell's request ``number`` at the moment ``scored``."""
    if config.keep_outputs == "first":
        return scored == "final" and number < FIRST
    return config.keep_outputs != "none"


def outputs_of(
    asked: Sequence[Asked], config: ScoreConfig, decode: Callable[[Sequence[int]], str]
) -> list[dict[str, JSON]]:
    """One dict per probe and way of asking, in the order of the request's probes. With
    ``keep_outputs: failures`` only those that are wrong."""
    rows = []
    for one in sorted(asked, key=lambda one: (_ORDER[one.probe.kind], one.probe.number)):
        _, exact, generated = one.accuracy(of_base=False)
        _, exact_base, generated_base = one.accuracy(of_base=True)
        length = len(one.probe.scored)
        found: list[dict[str, JSON]] = [
            {
                "how": "teacher_forced",
                "text": _forced(one.after, length, decode),
                "ending": None,
                "correct": bool(exact),
                "text_base": _forced(one.before, length, decode),
                "ending_base": None,
                "correct_base": bool(exact_base),
            }
        ]
        if one.after_text.said is not None:
            found.append(
                {
                    "how": "generated",
                    "text": one.after_text.said,
                    "ending": _ending(one.after_text),
                    "correct": bool(generated),
                    "text_base": one.before_text.said,
                    "ending_base": _ending(one.before_text),
                    "correct_base": bool(generated_base),
                }
            )
        place = {"probe": one.probe.kind, "number": one.probe.number}
        rows += [{**place, **row} for row in found if config.keep_outputs != "failures" or not row["correct"]]
    return rows


_ORDER: Mapping[Kind, int] = MappingProxyType({kind: place for place, kind in enumerate(get_args(Kind))})


def _forced(answer: Answer, length: int, decode: Callable[[Sequence[int]], str]) -> str:
    return decode(answer.argmax[:length]).strip()


def _ending(text: Text) -> str | None:
    if text.said is None:
        return None
    if text.natural:
        return "natural"
    return "dropped" if text.text is None else "cut"
