"""General ability: the perplexity of a held-out text, which no edit is about. One value per state.

The text is cut into windows that do not overlap; in each, every token but the first is predicted from those before it. A
window is all prompt to whatever routes by the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from workers.data.text import read_held_out
from workers.job import ScoreConfig
from workers.model.base import BaseModel
from workers.model.batch import Encoder
from workers.model.overlay import Overlay
from workers.scoring.cache import BaseAnswers, Prefixes
from workers.scoring.columns import exp
from workers.scoring.score import text_logprobs
from workers.types import DataError

CHARACTERS = 16
"""Of the file, so many per token asked for are read: more than any tokenizer makes one token of."""


def cut_windows(encoder: Encoder, text: str, tokens: int, window: int, path: Path) -> tuple[tuple[int, ...], ...]:
    """The first ``tokens`` tokens of the text in windows of ``window``, each begun as the tokenizer begins a text."""
    ids = encoder.text(text[: tokens * CHARACTERS])
    start: tuple[int, ...] = ()
    if ids and ids[0] == encoder.tokenizer.bos_token_id:
        start, ids = ids[:1], ids[1:]
    ids, width = ids[:tokens], max(1, window - len(start))
    windows = [(*start, *ids[at : at + width]) for at in range(0, len(ids), width)]
    windows = [cut for cut in windows if len(cut) > 1]
    if not windows:
        raise DataError(f"{path}: `scoring.ability_text` has too little text: it needs at least two tokens")
    return tuple(windows)


class Ability:
    """The probe of one stream: its windows, and the perplexity of lanes on them."""

    def __init__(self, base: BaseModel, path: Path, config: ScoreConfig) -> None:
        positions = getattr(base.model.config, "max_position_embeddings", None) or config.ability_window
        self.config = config
        self.windows = cut_windows(
            base.encoder, read_held_out(path), config.ability_tokens, min(config.ability_window, positions), path
        )

    @torch.no_grad()
    def perplexities(
        self, base: BaseModel, overlay: Overlay, lanes: Sequence[int], answers: BaseAnswers, prefixes: Prefixes
    ) -> dict[int, tuple[float | None, float | None]]:
        """Per lane, of its present state and of the unedited model; None where it is not a number."""
        count = sum(len(window) - 1 for window in self.windows)
        found = text_logprobs(base, overlay, lanes, self.windows, self.config, answers, prefixes)
        return {lane: (_of(after / count), _of(before / count)) for lane, (after, before) in found.items()}


def _of(mean_logprob: float) -> float | None:
    value = exp(-mean_logprob)
    return value if math.isfinite(value) else None
