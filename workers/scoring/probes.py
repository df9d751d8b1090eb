"""Probes of a request, and their batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from workers.data.scripts import SPACE, joiner_of
from workers.job import Lane, ScoreConfig, StreamJob, first_request
from workers.model.batch import Encoded
from workers.timeline import Tick
from workers.types import DataError, EditRequest, Probe

if TYPE_CHECKING:
    from workers.model.base import BaseModel


Kind = Literal["reliability", "generalization", "locality", "portability", "ood"]

CONFIDENT = 0.8
"""Probability above which a token of an out-of-distribution text counts."""


@dataclass(frozen=True, slots=True)
class Item:
    """A request to be scored on a lane's current state."""

    lane: int
    request: EditRequest


@dataclass(frozen=True, slots=True)
class EncodedProbe:
    """One sequence of one item. ``start``: the first token that is scored; None: where the target
    begins. ``number``: its place among the request's probes of this kind."""

    item: int
    kind: Kind
    lane: int
    encoded: Encoded
    prompt: str
    target: str
    aliases: tuple[str, ...] = ()
    start: int | None = None
    group: str = ""
    joiner: str = SPACE
    number: int = 0

    @property
    def first(self) -> int:
        return self.encoded.prompt_len if self.start is None else self.start

    @property
    def scored(self) -> tuple[int, ...]:
        """The tokens that are scored."""
        return self.encoded.ids[self.first :]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The right texts of greedy generation, normalised."""
        return tuple(normalise(text) for text in (self.target, *self.aliases))


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's output at the scored positions of one row, and for one token after them.
    ``logprob``: mean log-probability (nats). ``margin``: smallest difference of the two largest
    logits. ``confident``: share of scored tokens with a probability above :data:`CONFIDENT`."""

    argmax: tuple[int, ...]
    logprob: float
    margin: float
    confident: float

    def hits(self, target: Sequence[int]) -> list[bool]:
        return [a == t for a, t in zip(self.argmax, target, strict=False)]


@dataclass(frozen=True, slots=True)
class Text:
    """A greedy continuation: its normalised text (None: dropped, because it cannot match) and
    whether it ended by itself. ``said``: the text as it was written, as far as it went; None where
    nothing was generated."""

    text: str | None
    natural: bool
    said: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Asked:
    """One probe with the outputs of the unedited model (``before``) and the edited model
    (``after``)."""

    probe: EncodedProbe
    before: Answer
    after: Answer
    before_text: Text
    after_text: Text

    def accuracy(self, of_base: bool) -> tuple[float, float, float]:
        """Share of right tokens; 1 if all are right; 1 if greedy generation is right. On the edited
        or the unedited model.

        A locality probe is right where the edited model gives the unedited model's answer.
        """
        target = self.probe.scored
        answer, text = (self.before, self.before_text) if of_base else (self.after, self.after_text)
        if self.probe.kind == "locality":
            hits = answer.hits(self.before.argmax[: len(target)])
            generated = text.text is not None and text == self.before_text
        else:
            hits = answer.hits(target)
            generated = text.natural and text.text in self.probe.wanted
        return sum(hits) / len(hits), float(all(hits)), float(generated)


@dataclass(frozen=True)
class Reply:
    """A model's reply to one batch, row by row."""

    answers: tuple[Answer, ...]
    texts: tuple[Text, ...]


def items_of(
    job: StreamJob, tick: Tick, requests: Sequence[Sequence[EditRequest]], lanes: Mapping[int, Lane]
) -> list[Item]:
    """List the requests that a tick scores, lane by lane. ``lanes``: by index in the wave.
    ``requests``: per cell of the job, in the order of its seed."""
    return [
        Item(i, requests[lane.cell][first_request(job, lane) + position])
        for i, lane in lanes.items()
        for position in range(tick.start, tick.stop)
    ]


def item_probes(base: BaseModel, items: Sequence[Item]) -> Iterator[EncodedProbe]:
    for i, item in enumerate(items):
        r = item.request
        asked: list[tuple[Kind, Probe]] = [("reliability", Probe(r.prompt, r.target_new))]
        asked += [("generalization", Probe(text, r.target_new)) for text in r.rephrases]
        asked += [("locality", replace(p, aliases=())) for p in r.locality]
        asked += [("portability", p) for p in r.portability]
        before: Counter[Kind] = Counter()
        for kind, p in asked:
            joiner = joiner_of(r, p.prompt)
            pair = base.encoder.pair(p.prompt, p.target, joiner)
            yield EncodedProbe(
                i,
                kind,
                item.lane,
                pair,
                p.prompt,
                p.target,
                p.aliases,
                group=p.group,
                joiner=joiner,
                number=before[kind],
            )
            before[kind] += 1
        for number, text in enumerate(r.ood):
            yield text_probe(i, "ood", item.lane, base.encoder.text(text), text, number)


def text_probe(
    item: int, kind: Kind, lane: int, ids: tuple[int, ...], text: str, number: int = 0
) -> EncodedProbe:
    """A text that is scored from its second token on. The whole text counts as the prompt, for
    methods that route by it."""
    if len(ids) < 2:
        raise DataError(f"a text to score needs at least two tokens: {text!r}")
    return EncodedProbe(item, kind, lane, Encoded(ids, len(ids)), text, "", start=1, number=number)


def probe_batches(probes: list[EncodedProbe], config: ScoreConfig) -> Iterator[list[EncodedProbe]]:
    """Split probes into batches of similar length, within the budgets of rows and padded tokens;
    sorted by lane inside a batch."""
    batch: list[EncodedProbe] = []
    for probe in sorted(probes, key=lambda p: len(p.encoded.ids)):
        tokens = (len(batch) + 1) * len(probe.encoded.ids)  # ascending lengths: the newest row is the longest
        if batch and (len(batch) == config.rows_per_batch or tokens > config.tokens_per_batch):
            yield sorted(batch, key=lambda p: p.lane)
            batch = []
        batch.append(probe)
    if batch:
        yield sorted(batch, key=lambda p: p.lane)


_MARKS = " .,;:!?\"'\u3002\uff0c\uff1b\uff1a\uff01\uff1f\u3001"
"""Punctuation around an answer, the full-width marks included."""


def normalise(text: str) -> str:
    """Fold case, collapse white space and strip surrounding punctuation."""
    return " ".join(text.casefold().split()).strip(_MARKS)
