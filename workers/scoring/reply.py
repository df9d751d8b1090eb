"""A model's reply to a batch of probes: teacher-forced scores and generated text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from workers.job import ScoreConfig
from workers.model.batch import Batch, Encoded, collate
from workers.scoring.probes import CONFIDENT, Answer, EncodedProbe, Reply, Text, normalise

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.base import BaseModel
    from workers.model.overlay import Overlay


_LOG_CONFIDENT = math.log(CONFIDENT)
_HEAD_VALUES = 2**26
"""Logits computed at once, at most (256 MB in float32)."""


def read_reply(
    base: BaseModel,
    overlay: Overlay | None,
    hidden_BSD: Tensor,
    batch: Batch,
    probes: list[EncodedProbe],
    config: ScoreConfig,
    base_texts: Sequence[Text] | None,
) -> Reply:
    answers = _answers(base, overlay, hidden_BSD, batch, probes)
    return Reply(answers, _texts(base, overlay, probes, answers, config, base_texts))


def _answers(
    base: BaseModel, overlay: Overlay | None, hidden_BSD: Tensor, batch: Batch, probes: list[EncodedProbe]
) -> tuple[Answer, ...]:
    """Argmax, log-probability and margin at the target positions; the head runs only there."""
    row_P: list[int] = []
    column_P: list[int] = []
    target_P: list[int] = []
    counts: list[int] = []
    for i, probe in enumerate(probes):
        e, offset = probe.encoded, batch.offsets[i]
        count = len(e.ids) - probe.first
        counts.append(count + 1)
        row_P += [i] * (count + 1)
        column_P += range(offset + probe.first - 1, offset + len(e.ids))
        target_P += [*probe.scored, e.ids[-1]]  # the last one only fills the position after the target
    picked_PD = hidden_BSD[row_P, column_P]
    chunk = max(1, _HEAD_VALUES // base.vocab)
    argmax_P, logprob_P, margin_P = [], [], []
    for start in range(0, len(row_P), chunk):
        part = slice(start, start + chunk)
        logits_PV = _logits(base, overlay, picked_PD[part], batch, row_P[part], column_P[part])
        targets = torch.tensor(target_P[part], device=logits_PV.device)
        top_P2, ids_P2 = logits_PV.topk(2, dim=-1)
        argmax_P += ids_P2[:, 0].tolist()
        margin_P += (top_P2[:, 0] - top_P2[:, 1]).tolist()
        logprob_P += (logits_PV.gather(1, targets[:, None])[:, 0] - logits_PV.logsumexp(-1)).tolist()
    answers, at = [], 0
    for count in counts:
        scored = slice(at, at + count - 1)
        answers.append(
            Answer(
                tuple(argmax_P[at : at + count]),
                sum(logprob_P[scored]) / (count - 1),
                min(margin_P[scored]),
                sum(value > _LOG_CONFIDENT for value in logprob_P[scored]) / (count - 1),
            )
        )
        at += count
    return tuple(answers)


def _logits(
    base: BaseModel,
    overlay: Overlay | None,
    hidden_PD: Tensor,
    batch: Batch,
    row_P: Sequence[int],
    column_P: Sequence[int],
) -> Tensor:
    return (
        base.logits(hidden_PD) if overlay is None else overlay.logits(base, hidden_PD, batch, row_P, column_P)
    )


class _Generation:
    """One unfinished greedy continuation. ``want``: the texts that it may become; None: any."""

    def __init__(
        self, base: BaseModel, probe: EncodedProbe, limit: int, want: tuple[str, ...] | None
    ) -> None:
        self.tokenizer = base.tokenizer
        self.probe = probe
        self.prompt = probe.encoded.ids[: probe.encoded.prompt_len]
        self.limit = limit
        self.want = want
        self.ids: list[int] = []
        self.result: Text | None = None

    def absorb(self, token: int) -> None:
        """Append one token and check whether the text has ended."""
        text = self.tokenizer.decode(self.ids)
        natural = token == self.tokenizer.eos_token_id
        if not natural:
            self.ids.append(token)
            text = self.tokenizer.decode(self.ids)
            natural = _ends(text, (self.probe.target, *self.probe.aliases))
        if natural or len(self.ids) >= self.limit:
            self.result = Text(normalise(text), natural, text.strip())
        # a character that is cut between two tokens may still become the right one
        said = normalise(text.rstrip("\ufffd"))
        if self.result is None and self.want is not None and not any(w.startswith(said) for w in self.want):
            self.result = Text(None, natural=False, said=text.strip())


def _texts(
    base: BaseModel,
    overlay: Overlay | None,
    probes: list[EncodedProbe],
    answers: Sequence[Answer],
    config: ScoreConfig,
    base_texts: Sequence[Text] | None,
) -> tuple[Text, ...]:
    """Greedy continuations of every probe's prompt. Their first tokens come from the teacher-forced
    forward."""
    if not config.generated:
        return tuple(Text(None, natural=False) for _ in probes)
    running: list[_Generation] = []
    for i, (probe, answer) in enumerate(zip(probes, answers, strict=True)):
        want: tuple[str, ...] | None = probe.wanted
        if probe.kind == "locality":
            said_before = None if base_texts is None else base_texts[i].text
            want = None if said_before is None else (said_before,)
        longest = max(
            len(probe.encoded.target),
            *(len(base.encoder.text(f"{probe.joiner}{alias}")) for alias in probe.aliases),
            0,
        )
        g = _Generation(base, probe, longest + config.extra_tokens, want)
        if probe.kind == "ood":
            g.result = Text(None, natural=False)  # no question, hence no answer to generate
            running.append(g)
            continue
        if probe.encoded.clean:
            for said, given in zip(answer.argmax, (*probe.encoded.target, None), strict=True):
                g.absorb(said)
                if g.result is not None or said != given:
                    break
        else:
            g.prompt = base.encoder.prompt(probe.prompt)  # tokens merge across the border
        running.append(g)
    while alive := [g for g in running if g.result is None]:
        for start in range(0, len(alive), config.rows_per_batch):
            _advance(base, overlay, alive[start : start + config.rows_per_batch])
    return tuple(g.result for g in running if g.result is not None)


def _advance(base: BaseModel, overlay: Overlay | None, alive: list[_Generation]) -> None:
    """Append one greedy token to each. For methods that route by the prompt, ``prompt_len`` stays
    the same."""
    encoded = [Encoded((*g.prompt, *g.ids), len(g.prompt)) for g in alive]
    batch = collate(encoded, [g.probe.lane for g in alive], base.encoder.pad_id, base.device)
    hidden_BSD = base.hidden_states(batch) if overlay is None else overlay.hidden_states(base, batch)
    last = hidden_BSD.shape[1] - 1
    logits_BV = _logits(base, overlay, hidden_BSD[:, last], batch, range(batch.size), [last] * batch.size)
    for g, token in zip(alive, logits_BV.argmax(-1).tolist(), strict=True):
        g.absorb(token)


def _ends(text: str, targets: Sequence[str]) -> bool:
    """Return whether a line or a sentence has ended. A full stop inside a target does not end
    it."""
    if "\n" in text.lstrip("\n"):
        return True
    body = text.strip()
    return body.endswith((".", "。")) and not any(
        target.casefold().startswith(body.casefold()) for target in targets
    )
