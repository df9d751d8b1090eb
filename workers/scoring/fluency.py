"""Fluency: the entropy of the n-grams in a model's continuation of the edit prompt. Low if an edit
makes the model repeat itself.

After Meng et al., "Locating and Editing Factual Associations in GPT", arXiv 2202.05262: the
weighted mean of the entropies of bigrams and trigrams, in bits (their public code multiplies by 2/3
and 4/3 and takes the mean; published tables show 100 times this value). As there, the text is the
prompt with its continuation, sampled from the k likeliest tokens. Differences: words are split by a
regular expression, not by NLTK, and a letter of a script that is written without spaces is a word.
Every continuation has the same number of tokens (the public code includes the prompt in the count),
and the end-of-text token is never sampled, because entropies of texts of different length are not
comparable. A draw is a pure function of prompt and position, the same for the edited and the
unedited model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from workers.data.scripts import joiner_of, words_of
from workers.scoring.declare import GroupEndScore, Measure, Score, Settings, State

if TYPE_CHECKING:
    from workers.job import ScoreConfig
    from workers.model.base import BaseModel
    from workers.model.overlay import Overlay
    from workers.scoring.cache import BaseAnswers
    from workers.scoring.probes import Item


class FluencyConfig(Settings):
    """Settings of the continuations of edit prompts."""

    tokens: int = Field(
        0,
        ge=0,
        le=10_000,
        alias="fluency_tokens",
        description="tokens written after each edit prompt at a group's end for `fluency`; 0: not measured",
    )
    top_k: int = Field(
        5,
        ge=1,
        alias="fluency_top_k",
        description="a token of these texts is drawn from so many likeliest; 1: greedy",
    )

    @property
    def on(self) -> bool:
        return self.tokens > 0

    @property
    def continued(self) -> int:
        return self.tokens

    def longest(self, tokens: int) -> int:
        return tokens + self.tokens


WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def n_gram_entropy(text: str) -> float | None:
    """Weighted mean of the entropies of bigrams and trigrams, in bits; None for a text of fewer
    than three words."""
    words = words_of(text)
    if len(words) < max(WEIGHTS):
        return None
    total = 0.0
    for n, weight in WEIGHTS.items():
        grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        count = sum(grams.values())
        total += weight * -sum(times / count * math.log2(times / count) for times in grams.values())
    return total / len(WEIGHTS)


def fluency(
    base: BaseModel,
    overlay: Overlay | None,
    items: Sequence[Item],
    settings: FluencyConfig,
    config: ScoreConfig,
    kept: BaseAnswers,
) -> list[tuple[float | None, float | None]]:
    """Fluency in bits per item, of its lane's current state and of the unedited model. ``items``
    are sorted by lane."""
    found: list[tuple[float | None, float | None]] = []
    for chunk in _chunks(base, items, settings, config):
        key = ("fluency", settings.tokens, settings.top_k, tuple(item.request.prompt for item in chunk))
        before = kept.numbers.get(key)
        if before is None:
            before = _entropies(base, None, chunk, settings)
            kept.numbers.put(key, before)
        after = before if overlay is None else _entropies(base, overlay, chunk, settings)
        found += zip(after, before, strict=True)
    return found


def _chunks(
    base: BaseModel, items: Sequence[Item], settings: FluencyConfig, config: ScoreConfig
) -> Iterator[Sequence[Item]]:
    """Split ``items`` into batches within the scoring budgets of rows and tokens, continuations
    included. The split depends only on the requests and the config."""
    widths = [len(base.encoder.prompt(item.request.prompt)) + settings.tokens for item in items]
    bounds, widest = [0], 0
    for i, width in enumerate(widths):
        widest = max(widest, width)
        size = i + 1 - bounds[-1]
        if size > 1 and (size > config.rows_per_batch or size * widest > config.tokens_per_batch):
            bounds.append(i)
            widest = width
    for start, stop in pairwise([*bounds, len(items)]):
        yield items[start:stop]


def _entropies(
    base: BaseModel, overlay: Overlay | None, items: Sequence[Item], settings: FluencyConfig
) -> tuple[float | None, ...]:
    return tuple(
        n_gram_entropy(f"{item.request.prompt}{joiner_of(item.request, item.request.prompt)}{text}")
        for item, text in zip(items, continuations(base, overlay, items, settings), strict=True)
    )


def continuations(
    base: BaseModel, overlay: Overlay | None, items: Sequence[Item], settings: FluencyConfig
) -> list[str]:
    """The continuation of each item's prompt, written by its lane. Methods that route by the prompt
    see only the prompt as such."""
    import torch  # readers of results import this file without torch

    from workers.model.batch import Encoded, collate
    from workers.rng import derive_seed

    prompts = [base.encoder.prompt(item.request.prompt) for item in items]
    written: list[list[int]] = [[] for _ in items]
    lanes = [item.lane for item in items]
    with torch.no_grad():
        for place in range(settings.tokens):
            encoded = [
                Encoded((*prompt, *ids), len(prompt)) for prompt, ids in zip(prompts, written, strict=True)
            ]
            batch = collate(encoded, lanes, base.encoder.pad_id, base.device)
            hidden_BSD = base.hidden_states(batch) if overlay is None else overlay.hidden_states(base, batch)
            last = hidden_BSD.shape[1] - 1
            where = range(batch.size), [last] * batch.size
            hidden_BD = hidden_BSD[:, last]
            logits_BV = (
                base.logits(hidden_BD) if overlay is None else overlay.logits(base, hidden_BD, batch, *where)
            )
            logits_BV = logits_BV.double().cpu()  # sampled on the CPU: same token on every device
            if base.tokenizer.eos_token_id is not None:
                logits_BV[:, base.tokenizer.eos_token_id] = -math.inf
            values_BJ, ids_BJ = logits_BV.topk(min(settings.top_k, logits_BV.shape[1]), dim=-1)
            upto_BJ = values_BJ.softmax(-1).cumsum(-1)
            for i, item in enumerate(items):
                draw = derive_seed("fluency", item.request.prompt, place) / 2**63
                pick = min(int((upto_BJ[i] <= draw).sum()), ids_BJ.shape[1] - 1)
                written[i].append(int(ids_BJ[i, pick]))
    return [base.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


def _begin(base: BaseModel, config: ScoreConfig, settings: FluencyConfig) -> Measure:
    def measure(state: State) -> list[dict[str, float | None]]:
        pairs = fluency(state.base, state.overlay, state.items, settings, config, state.answers)
        return [{"fluency": after, "fluency_base": before} for after, before in pairs]

    return measure


FLUENCY = GroupEndScore(
    scores=(
        Score(
            "fluency",
            "weighted mean entropy of bi- and trigrams of the edit prompt and its continuation",
            unit="bits",
            when="not in immediate rows",
        ),
    ),
    settings=FluencyConfig,
    begin=_begin,
)
