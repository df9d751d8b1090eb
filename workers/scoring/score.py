"""Scoring of requests by their probes, many sequences in one forward.

Definitions (DESIGN section 8): run ``prompt + " " + target`` and compare the argmax at each
position that predicts a target token with that token. ``token`` is the share of right tokens,
``exact`` is 1 if all are right (WISE, arXiv 2405.14768, Eq. 9, on the final state of a group),
``generated`` is 1 if greedy generation from the prompt alone, with a natural stop, gives the target
up to case and punctuation. Locality compares with the base model's answers instead of the target.

Greedy generation needs few extra forwards: the teacher-forced forward already gives the generated
tokens up to and including the first one that differs from the target, and a text that can no longer
become the target is dropped. Only the remaining rows are run further.

Further scores, for data sets that have what they need: ``perplexity`` of a passage, exp of the
target's mean negative log-probability; ``ood_*`` on separate texts, every token but the first
predicted from those before it (``ood_confident``: share of tokens with a probability above 0.8, the
out-of-distribution accuracy in the public code of WISE); ``portability_any_*``, 1 if at least one
of several phrasings of a question is answered, as in MQuAKE.

Scoring never changes an overlay. Every batch depends only on the requests and the config, and the
base model runs the same batches, so an unedited model has locality exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from workers.job import ScoreConfig
from workers.scoring.cache import BaseAnswers, Prefixes
from workers.scoring.forward import fitting_replies
from workers.scoring.probes import Asked, Item, item_probes, probe_batches
from workers.scoring.registry import SCORES, Registry

if TYPE_CHECKING:
    from workers.model.base import BaseModel
    from workers.model.overlay import Overlay


@dataclass(frozen=True, slots=True)
class Scored:
    """One item: the values of its score columns, and both models' answers to its probes."""

    values: dict[str, float | None]
    asked: Sequence[Asked]


def score(
    base: BaseModel,
    overlay: Overlay | None,
    items: Sequence[Item],
    config: ScoreConfig,
    base_answers: BaseAnswers | None = None,
    prefixes: Prefixes | None = None,
    scores: Registry = SCORES,
) -> list[dict[str, float | None]]:
    """Score each item on its lane. One dict per item: the score columns, ``*_base`` included.

    ``overlay=None`` scores the base model itself. ``base_answers`` and ``prefixes`` are caches for
    later calls; they change no bit.
    """
    found = score_answers(base, overlay, items, config, base_answers, prefixes, scores)
    return [scored.values for scored in found]


@torch.no_grad()
def score_answers(
    base: BaseModel,
    overlay: Overlay | None,
    items: Sequence[Item],
    config: ScoreConfig,
    base_answers: BaseAnswers | None = None,
    prefixes: Prefixes | None = None,
    scores: Registry = SCORES,
) -> list[Scored]:
    """The same as :func:`score`, with the answers that the scores were computed from."""
    base_answers = base_answers if base_answers is not None else BaseAnswers(budget=1)
    prefixes = prefixes if prefixes is not None else Prefixes()
    probes = list(item_probes(base, items))
    asked: list[list[Asked]] = [[] for _ in items]
    splits = [0] * len(items)
    for whole in probe_batches(probes, config):
        for batch, halved, before, after in fitting_replies(
            base, overlay, whole, config, base_answers, prefixes
        ):
            for i, probe in enumerate(batch):
                answers = before.answers[i], after.answers[i], before.texts[i], after.texts[i]
                asked[probe.item].append(Asked(probe, *answers))
                splits[probe.item] = max(splits[probe.item], halved)
    measured = [(kind, kind.read(config)) for kind in scores.request]
    found: list[Scored] = []
    for item, of_item, halved in zip(items, asked, splits, strict=True):
        values: dict[str, float | None] = {}
        for kind, settings in measured:
            values |= kind.of(item.request, of_item, config, settings)
        found.append(Scored({**values, "score_splits": halved}, of_item))
    return found
