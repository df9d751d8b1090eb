"""General ability: the perplexity of a held-out text, unrelated to all edits. One value per state.

The text is cut into windows that do not overlap; in each, every token but the first is predicted
from those before it. For methods that route by the prompt, the whole window is the prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from workers.scoring.declare import GroupEndScore, Measure, Score, Settings, State
from workers.scoring.target import exp
from workers.types import JSON, DataError

if TYPE_CHECKING:
    from workers.job import ScoreConfig
    from workers.model.base import BaseModel
    from workers.model.batch import Encoder
    from workers.model.overlay import Overlay
    from workers.scoring.cache import BaseAnswers, Prefixes


class AbilityConfig(Settings):
    """Settings of the held-out text."""

    text: Path | None = Field(
        None,
        alias="ability_text",
        description="UTF-8 file of held-out text, whose perplexity is measured at each group's end",
    )
    tokens: int = Field(
        2048,
        ge=2,
        le=100_000_000,
        alias="ability_tokens",
        description="tokens of that text that are read, at most",
    )
    window: int = Field(
        256,
        ge=2,
        alias="ability_window",
        description="tokens read in one go, at most (and the model's own limit)",
    )

    @property
    def on(self) -> bool:
        return self.text is not None

    def identity(self) -> dict[str, JSON]:
        if self.text is None:
            return {}
        content = hashlib.sha256(_read(self.text).encode()).hexdigest()[:16]
        return {**super().identity(), "ability_text": content}

    def check(self) -> None:
        if self.text is not None:
            _read(self.text)

    def longest(self, tokens: int) -> int:
        return max(tokens, self.window) if self.on else tokens


def _read(path: Path) -> str:
    from workers.data.text import read_held_out  # start-up time: it imports every reader of data sets

    return read_held_out(path)


CHARACTERS = 16
"""Characters of the file that are read per token: more than one token of any tokenizer covers."""


def cut_windows(
    encoder: Encoder, text: str, tokens: int, window: int, path: Path
) -> tuple[tuple[int, ...], ...]:
    """Cut the first ``tokens`` tokens of the text into windows of at most ``window`` tokens, each
    with the tokenizer's beginning-of-sequence token (if it has one). Raises :class:`DataError`."""
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
    """The windows of one stream, and the perplexity of its lanes on them."""

    def __init__(self, base: BaseModel, path: Path, settings: AbilityConfig, config: ScoreConfig) -> None:
        positions = getattr(base.model.config, "max_position_embeddings", None) or settings.window
        self.config = config
        self.windows = cut_windows(
            base.encoder, _read(path), settings.tokens, min(settings.window, positions), path
        )

    def perplexities(
        self,
        base: BaseModel,
        overlay: Overlay,
        lanes: Sequence[int],
        answers: BaseAnswers,
        prefixes: Prefixes,
    ) -> dict[int, tuple[float | None, float | None]]:
        """Perplexity per lane, of its current state and of the unedited model; None if not
        finite."""
        from workers.scoring.forward import text_logprobs  # imports torch

        count = sum(len(window) - 1 for window in self.windows)
        found = text_logprobs(base, overlay, lanes, self.windows, self.config, answers, prefixes)
        return {
            lane: (_perplexity(after / count), _perplexity(before / count))
            for lane, (after, before) in found.items()
        }


def _perplexity(mean_logprob: float) -> float | None:
    value = exp(-mean_logprob)
    return value if math.isfinite(value) else None


def _begin(base: BaseModel, config: ScoreConfig, settings: AbilityConfig) -> Measure:
    assert settings.text is not None
    ability = Ability(base, settings.text, settings, config)

    def measure(state: State) -> list[dict[str, float | None]]:
        found = state.once(
            lambda: ability.perplexities(
                state.base, state.overlay, state.lanes, state.answers, state.prefixes
            )
        )
        pairs = [found[item.lane] for item in state.items]
        return [{"ability_perplexity": after, "ability_perplexity_base": before} for after, before in pairs]

    return measure


ABILITY = GroupEndScore(
    scores=(
        Score(
            "ability_perplexity",
            "perplexity of the held-out text, the same in all rows of a group",
            when="not in immediate rows",
            per_group=True,
        ),
    ),
    settings=AbilityConfig,
    begin=_begin,
)
