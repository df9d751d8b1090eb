"""Probes to scores, many sequences in one forward.

Definitions (DESIGN section 8): run ``prompt + " " + target`` and compare the argmax at each position that predicts a target
token with that token. ``token`` is the share of right tokens, ``exact`` says whether all are right (WISE, arXiv 2405.14768,
Eq. 9, reads that on the final state of a group), ``generated`` whether greedy generation from the prompt alone, with a
natural stop, gives the target up to case and punctuation. Locality compares with the base model's own answers instead.

Greedy generation costs almost nothing: the teacher-forced forward already says what would have been generated up to and
including the first token that leaves the target, and a text that can no longer become the target is dropped at once. Only
the few rows that remain are run further.

Further scores for data that has what they need: a passage's ``perplexity``, exp of the target's mean negative log-probability;
``ood_*`` on texts of their own, every token but the first predicted from those before it (``ood_confident``: the share that
gets a probability above 0.8, as the public code of WISE counts its out-of-distribution accuracy); ``portability_any_*``, whether
one of several phrasings of a question is answered, as MQuAKE counts.

Scoring never changes an overlay, and every batch is a function of the requests and the config alone: the base model
answers the very same batches, so that an untouched model has locality exactly 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

import torch

from workers.failures import out_of_memory
from workers.job import Lane, ScoreConfig, StreamJob, Tick, first_request
from workers.model.replay import Prefix, capture, replay
from workers.model.rows import Encoded, Rows, collate
from workers.types import DataError, EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from workers.model.base import BaseModel
    from workers.model.overlay import Overlay

Kind = Literal["reliability", "generalization", "locality", "portability", "ood"]
KINDS: tuple[Kind, ...] = ("reliability", "generalization", "locality", "portability")
PROTOCOLS = ("token", "exact", "generated")

CONFIDENT = 0.8
"""Probability above which a token of an out-of-distribution text counts."""

_EXP_LIMIT = 709.0
_LOG_CONFIDENT = math.log(CONFIDENT)
_HEAD_VALUES = 2**26
"""Logits computed at once, at most (256 MB in float32)."""


@dataclass(frozen=True, slots=True)
class Item:
    """A request to be scored on a lane's present state."""

    lane: int
    request: EditRequest


@dataclass(frozen=True, slots=True)
class Probe:
    """One sequence of one item. ``start``: the first token that is scored; None: where the target begins."""

    item: int
    kind: Kind
    lane: int
    encoded: Encoded
    prompt: str
    target: str
    aliases: tuple[str, ...] = ()
    start: int | None = None

    @property
    def first(self) -> int:
        return self.encoded.prompt_len if self.start is None else self.start

    @property
    def scored(self) -> tuple[int, ...]:
        """The tokens that are scored."""
        return self.encoded.ids[self.first :]

    @property
    def wanted(self) -> tuple[str, ...]:
        """Every text that greedy generation may give, normalised."""
        return tuple(normalise(text) for text in (self.target, *self.aliases))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says at the scored positions of one row, and one token beyond. ``confident``: the share of
    scored tokens that get a probability above :data:`CONFIDENT`."""

    argmax: tuple[int, ...]
    logprob: float
    margin: float
    confident: float

    def hits(self, target: Sequence[int]) -> list[bool]:
        return [a == t for a, t in zip(self.argmax, target, strict=False)]


@dataclass(frozen=True, slots=True)
class Text:
    """A greedy continuation: its normalised text and whether it stopped by itself. None: dropped, it cannot match."""

    text: str | None
    natural: bool


@dataclass(frozen=True)
class Reply:
    """What a model says to one batch, row by row."""

    answers: tuple[Answer, ...]
    texts: tuple[Text, ...]


Key = tuple[object, ...]
"""The content of a batch: everything a model's reply depends on."""

Numbers = tuple[float | None, ...]
"""One figure per row."""

V = TypeVar("V")


def digest(key: Key) -> bytes:
    """Stands for a batch where its content is too long to keep."""
    text = json.dumps(key, default=lambda e: [e.ids, e.prompt_len, e.clean])
    return hashlib.sha256(text.encode()).digest()[:16]


class Known(Protocol):
    """What the base model says, computed before (:class:`workers.basescores.BaseScores`), by the batch's digest."""

    def reply(self, batch: bytes) -> Reply | None: ...
    def numbers(self, batch: bytes) -> Numbers | None: ...


@dataclass
class _Recent(Generic[V]):
    """Values by scoring batch, least recently used out; what is kept weighs ``budget`` at most.

    Kept by batch and never by sequence: a hit and a miss then compute the same batch, with the same bits.
    """

    budget: int = 0
    hits: int = 0
    misses: int = 0
    used: int = 0
    _kept: OrderedDict[Key, tuple[V, int]] = field(default_factory=OrderedDict)

    def resize(self, budget: int) -> None:
        """Change the budget; what no longer fits goes."""
        self.budget = budget
        self._shrink()

    def release(self) -> bool:
        """Lets go of everything; whether there was anything."""
        some = bool(self._kept)
        self._kept.clear()
        self.used = 0
        return some

    def items(self) -> Iterator[tuple[Key, V]]:
        """Everything that is kept."""
        for key, (value, _) in self._kept.items():
            yield key, value

    def get(self, key: Key) -> V | None:
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found[0]

    def _keep(self, key: Key, value: V, weight: int) -> None:
        if weight > self.budget:
            return
        _, freed = self._kept.pop(key, (None, 0))
        self._kept[key] = (value, weight)
        self.used += weight - freed
        self._shrink()

    def _shrink(self) -> None:
        while self.used > self.budget:
            _, (_, freed) = self._kept.popitem(last=False)
            self.used -= freed


@dataclass
class _OfBase(_Recent[V]):
    """What the base model said, and what is ``known`` without asking it. ``budget`` counts batches."""

    budget: int = 1024
    known: Callable[[bytes], V | None] | None = None
    given: int = 0
    """How often it was known."""
    heard: _OfBase[V] | None = None
    """Asked too, and told: what another job has heard."""

    def get(self, key: Key) -> V | None:
        found = super().get(key)
        if found is None and self.known is not None:
            found = self.known(digest(key))
            if found is not None:
                self.misses -= 1
                self.given += 1
        if found is None and self.heard is not None:
            found = self.heard.get(key)
            if found is not None:
                self._keep(key, found, 1)
        return found

    def put(self, key: Key, value: V) -> None:
        self._keep(key, value, 1)
        if self.heard is not None:
            self.heard.put(key, value)


class BaseNumbers(_OfBase[Numbers]):
    """Figures of the base model on a batch that are no replies to probes, one per row."""


@dataclass
class BaseAnswers(_OfBase[Reply]):
    """The base model's replies to scoring batches, kept by the session."""

    numbers: BaseNumbers = field(default_factory=BaseNumbers)

    def know(self, known: Known | None) -> None:
        """Look there before asking the model, and nowhere else than there: it replaces what was known before."""
        self.known = None if known is None else known.reply
        self.numbers.known = None if known is None else known.numbers


@dataclass
class Prefixes(_Recent[Prefix]):
    """What enters the first layer an overlay can change: layers below an edit answer the same in every group, method and seed.

    ``budget`` is in bytes; 0 keeps nothing.
    """

    def put(self, key: Key, prefix: Prefix) -> None:
        # a new tensor: an empty view would hold the whole output's memory
        prefix = replace(prefix, output_BSD=prefix.output_BSD.new_empty(0))
        self._keep(key, prefix, prefix.bytes())


@torch.no_grad()
def score(
    base: BaseModel,
    overlay: Overlay | None,
    items: Sequence[Item],
    config: ScoreConfig,
    base_answers: BaseAnswers | None = None,
    prefixes: Prefixes | None = None,
) -> list[dict[str, float | None]]:
    """Score each item on its lane. One dict per item: the score columns, ``*_base`` included.

    ``overlay=None`` scores the base model itself. ``base_answers`` and ``prefixes`` keep what later calls can use again; they
    change no bit.
    """
    base_answers = base_answers if base_answers is not None else BaseAnswers(budget=1)
    prefixes = prefixes if prefixes is not None else Prefixes()
    probes = list(_probes(base, items))
    found: list[_Found] = [_Found(item.request) for item in items]
    for whole in _batches(probes, config):
        for batch, splits, before, after in _fitting(base, overlay, whole, config, base_answers, prefixes):
            for i, probe in enumerate(batch):
                found[probe.item].add(probe, before.answers[i], after.answers[i], before.texts[i], after.texts[i])
                found[probe.item].splits = max(found[probe.item].splits, splits)
    return [f.scores(config.generated) for f in found]


def items_of(
    job: StreamJob, tick: Tick, requests: Sequence[Sequence[EditRequest]], lanes: Mapping[int, Lane]
) -> list[Item]:
    """What a tick scores of ``lanes``, by their number. ``requests``: per cell of the job, in the order of its seed."""
    return [
        Item(i, requests[lane.cell][first_request(job, lane) + position])
        for i, lane in lanes.items()
        for position in range(tick.start, tick.stop)
    ]


@torch.no_grad()
def ask_base(base: BaseModel, items: Sequence[Item], config: ScoreConfig, kept: BaseAnswers) -> None:
    """Put the base model's replies to all batches of :func:`score` into ``kept``, but for one that memory does not hold."""
    for batch in _batches(list(_probes(base, items)), config):
        try:
            _both(base, None, batch, config, kept, Prefixes())
        except Exception as error:
            if not out_of_memory(error):
                raise


@torch.no_grad()
def text_logprobs(
    base: BaseModel,
    overlay: Overlay | None,
    lanes: Sequence[int],
    texts: Sequence[tuple[int, ...]],
    config: ScoreConfig,
    base_answers: BaseAnswers,
    prefixes: Prefixes,
) -> dict[int, tuple[float, float]]:
    """Per lane, the summed log-probability of all tokens but the first of each text: on its state, and on the base model."""
    config = config.model_copy(update={"generated": False})
    probes = [text_probe(0, "ood", lane, ids, "") for lane in lanes for ids in texts]
    sums = dict.fromkeys(lanes, (0.0, 0.0))
    for batch in _batches(probes, config):
        before, after = _both(base, overlay, batch, config, base_answers, prefixes)
        for i, probe in enumerate(batch):
            edited, pristine = sums[probe.lane]
            count = len(probe.scored)
            sums[probe.lane] = (
                edited + count * after.answers[i].logprob,
                pristine + count * before.answers[i].logprob,
            )
    return sums


def _probes(base: BaseModel, items: Sequence[Item]) -> Iterator[Probe]:
    for i, item in enumerate(items):
        r = item.request
        pairs: list[tuple[Kind, str, str, tuple[str, ...]]] = [("reliability", r.prompt, r.target_new, ())]
        pairs += [("generalization", text, r.target_new, ()) for text in r.rephrases]
        pairs += [("locality", p.prompt, p.target, ()) for p in r.locality]
        pairs += [("portability", p.prompt, p.target, p.aliases) for p in r.portability]
        for kind, prompt, target, aliases in pairs:
            yield Probe(i, kind, item.lane, base.encoder.pair(prompt, target), prompt, target, aliases)
        for text in r.ood:
            yield text_probe(i, "ood", item.lane, base.encoder.text(text), text)


def text_probe(item: int, kind: Kind, lane: int, ids: tuple[int, ...], text: str) -> Probe:
    """A text that is all prompt: whatever routes by the prompt sees the whole of it. Scored from its second token on."""
    if len(ids) < 2:
        raise DataError(f"a text to score needs at least two tokens: {text!r}")
    return Probe(item, kind, lane, Encoded(ids, len(ids)), text, "", start=1)


def _batches(probes: list[Probe], config: ScoreConfig) -> Iterator[list[Probe]]:
    """Rows of like length together, as many as fit the budget of padded tokens; inside a batch lane by lane."""
    batch: list[Probe] = []
    for probe in sorted(probes, key=lambda p: len(p.encoded.ids)):
        tokens = (len(batch) + 1) * len(probe.encoded.ids)  # ascending lengths: the newest row is the longest
        if batch and (len(batch) == config.rows_per_batch or tokens > config.tokens_per_batch):
            yield sorted(batch, key=lambda p: p.lane)
            batch = []
        batch.append(probe)
    if batch:
        yield sorted(batch, key=lambda p: p.lane)


def _fitting(
    base: BaseModel,
    overlay: Overlay | None,
    batch: list[Probe],
    config: ScoreConfig,
    kept: BaseAnswers,
    prefixes: Prefixes,
    splits: int = 0,
) -> Iterator[tuple[list[Probe], int, Reply, Reply]]:
    """Both models' replies to a batch; where memory runs out, to its halves, each with how often it was halved.

    What is kept for later goes first: that changes no bit. Halves may differ from the whole by rounding, but the base model
    answers the same halves. A single row that does not fit is an error.
    """
    try:
        before, after = _both(base, overlay, batch, config, kept, prefixes)
    except Exception as error:
        if not out_of_memory(error) or (len(batch) == 1 and not prefixes.used):
            raise
    else:
        yield batch, splits, before, after
        return
    # here, and not in the handler: the exception holds on to the tensors of the forward that failed
    halves = [batch]
    if not prefixes.release():
        halves, splits = [batch[: len(batch) // 2], batch[len(batch) // 2 :]], splits + 1
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    for half in halves:
        yield from _fitting(base, overlay, half, config, kept, prefixes, splits)


def _both(
    base: BaseModel,
    overlay: Overlay | None,
    batch: list[Probe],
    config: ScoreConfig,
    kept: BaseAnswers,
    prefixes: Prefixes,
) -> tuple[Reply, Reply]:
    """The base model's reply and the edited one's, to the identical batch."""
    rows = collate([p.encoded for p in batch], [p.lane for p in batch], base.encoder.pad_id, base.device)
    texts = tuple(p.encoded for p in batch)
    key = (config.generated, config.extra_tokens, texts, tuple((p.kind, p.target, p.aliases) for p in batch))
    before = kept.get(key)
    if overlay is None or overlay.inert:
        if before is None:
            before = _reply(base, None, base.hidden_states(rows), rows, batch, config, None)
            kept.put(key, before)
        return before, before
    if not overlay.replays:
        if before is None:
            before = _reply(base, None, base.hidden_states(rows), rows, batch, config, None)
            kept.put(key, before)
        hidden_BSD = overlay.hidden_states(base, rows)
        return before, _reply(base, overlay, hidden_BSD, rows, batch, config, before.texts)
    place = (overlay.first_layer, texts)
    prefix = prefixes.get(place)
    if before is None:
        pristine = capture(base, rows, overlay.first_layer)
        before = _reply(base, None, pristine.output_BSD, rows, batch, config, None)
        kept.put(key, before)
        if prefix is None:
            prefix = pristine
            prefixes.put(place, prefix)
    with overlay.installed(rows):
        if prefix is not None:
            hidden_BSD = replay(base, prefix)
        else:  # the layers below an edit answer the same with it
            prefix = capture(base, rows, overlay.first_layer)
            hidden_BSD = prefix.output_BSD
            prefixes.put(place, prefix)
    return before, _reply(base, overlay, hidden_BSD, rows, batch, config, before.texts)


def _reply(
    base: BaseModel,
    overlay: Overlay | None,
    hidden_BSD: Tensor,
    rows: Rows,
    batch: list[Probe],
    config: ScoreConfig,
    base_texts: Sequence[Text] | None,
) -> Reply:
    answers = _answers(base, overlay, hidden_BSD, rows, batch)
    return Reply(answers, _texts(base, overlay, batch, answers, config, base_texts))


def _answers(
    base: BaseModel, overlay: Overlay | None, hidden_BSD: Tensor, rows: Rows, batch: list[Probe]
) -> tuple[Answer, ...]:
    """Argmax, log-probability and margin at the target positions; the head runs nowhere else."""
    row_P: list[int] = []
    column_P: list[int] = []
    target_P: list[int] = []
    counts: list[int] = []
    for i, probe in enumerate(batch):
        e, offset = probe.encoded, rows.offsets[i]
        count = len(e.ids) - probe.first
        counts.append(count + 1)
        row_P += [i] * (count + 1)
        column_P += range(offset + probe.first - 1, offset + len(e.ids))
        target_P += [*probe.scored, e.ids[-1]]  # the last one only fills the slot beyond the target
    picked_PD = hidden_BSD[row_P, column_P]
    chunk = max(1, _HEAD_VALUES // base.vocab)
    argmax_P, logprob_P, margin_P = [], [], []
    for start in range(0, len(row_P), chunk):
        part = slice(start, start + chunk)
        logits_PV = _logits(base, overlay, picked_PD[part], rows, row_P[part], column_P[part])
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
    rows: Rows,
    row_P: Sequence[int],
    column_P: Sequence[int],
) -> Tensor:
    return base.logits(hidden_PD) if overlay is None else overlay.logits(base, hidden_PD, rows, row_P, column_P)


class _Generation:
    """One greedy continuation in the making."""

    def __init__(self, base: BaseModel, probe: Probe, limit: int, want: tuple[str, ...] | None) -> None:
        self.tokenizer = base.tokenizer
        self.probe = probe
        self.prompt = probe.encoded.ids[: probe.encoded.prompt_len]
        self.limit = limit
        self.want = want
        self.ids: list[int] = []
        self.result: Text | None = None

    def absorb(self, token: int) -> None:
        """Append one token and see whether that ends it."""
        text = self.tokenizer.decode(self.ids)
        natural = token == self.tokenizer.eos_token_id
        if not natural:
            self.ids.append(token)
            text = self.tokenizer.decode(self.ids)
            natural = _ends(text, (self.probe.target, *self.probe.aliases))
        if natural or len(self.ids) >= self.limit:
            self.result = Text(normalise(text), natural)
        elif self.want is not None and not any(want.startswith(normalise(text)) for want in self.want):
            self.result = Text(None, natural=False)


def _texts(
    base: BaseModel,
    overlay: Overlay | None,
    batch: list[Probe],
    answers: Sequence[Answer],
    config: ScoreConfig,
    base_texts: Sequence[Text] | None,
) -> tuple[Text, ...]:
    """Greedy continuations of every probe's prompt, begun from what the teacher-forced forward already told."""
    if not config.generated:
        return tuple(Text(None, natural=False) for _ in batch)
    running: list[_Generation] = []
    for i, (probe, answer) in enumerate(zip(batch, answers, strict=True)):
        want: tuple[str, ...] | None = probe.wanted
        if probe.kind == "locality":
            said_before = None if base_texts is None else base_texts[i].text
            want = None if said_before is None else (said_before,)
        longest = max(len(probe.encoded.target), *(len(base.encoder.text(f" {alias}")) for alias in probe.aliases), 0)
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
            g.prompt = base.encoder.prompt(probe.prompt)  # its tokens merge across the border with the target
        running.append(g)
    while alive := [g for g in running if g.result is None]:
        for start in range(0, len(alive), config.rows_per_batch):
            _advance(base, overlay, alive[start : start + config.rows_per_batch])
    return tuple(g.result for g in running if g.result is not None)


def _advance(base: BaseModel, overlay: Overlay | None, alive: list[_Generation]) -> None:
    """One more greedy token for each; the routing decision stays with the prompt."""
    encoded = [Encoded((*g.prompt, *g.ids), len(g.prompt)) for g in alive]
    rows = collate(encoded, [g.probe.lane for g in alive], base.encoder.pad_id, base.device)
    hidden_BSD = base.hidden_states(rows) if overlay is None else overlay.hidden_states(base, rows)
    last = hidden_BSD.shape[1] - 1
    logits_BV = _logits(base, overlay, hidden_BSD[:, last], rows, range(rows.size), [last] * rows.size)
    for g, token in zip(alive, logits_BV.argmax(-1).tolist(), strict=True):
        g.absorb(token)


def _ends(text: str, targets: Sequence[str]) -> bool:
    """A line or a sentence has ended; a full stop inside a target itself does not end it."""
    if "\n" in text.lstrip("\n"):
        return True
    body = text.strip()
    return body.endswith(".") and not any(target.casefold().startswith(body.casefold()) for target in targets)


def exp(value: float) -> float:
    """Infinity where Python's own would raise."""
    return math.exp(value) if value < _EXP_LIMIT else math.inf


def normalise(text: str) -> str:
    """Case, runs of white space and surrounding punctuation do not count."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


class _Found:
    """Gathers the probes of one item."""

    def __init__(self, request: EditRequest) -> None:
        self.request = request
        self.values: dict[str, list[float]] = {}
        self.extra: dict[str, float] = {}
        self.splits = 0

    def add(self, probe: Probe, before: Answer, after: Answer, before_text: Text, after_text: Text) -> None:
        target = probe.scored
        if probe.kind == "ood":
            for suffix, answer in (("", after), ("_base", before)):
                hits = answer.hits(target)
                self.values.setdefault(f"ood_token{suffix}", []).append(sum(hits) / len(hits))
                self.values.setdefault(f"ood_confident{suffix}", []).append(answer.confident)
            return
        if probe.kind == "locality":
            said = before.argmax[: len(target)]
            self._note("locality", "", after.hits(said), after_text.text is not None and after_text == before_text)
            return
        for suffix, answer, text in (("", after, after_text), ("_base", before, before_text)):
            self._note(probe.kind, suffix, answer.hits(target), text.natural and text.text in probe.wanted)
        if probe.kind == "reliability":
            self.extra = {
                "target_logprob": after.logprob,
                "target_logprob_base": before.logprob,
                "min_margin": after.margin,
            }
            if self.request.passage:
                self.extra |= {"perplexity": exp(-after.logprob), "perplexity_base": exp(-before.logprob)}

    def _note(self, kind: str, suffix: str, hits: list[bool], generated: bool) -> None:
        token = sum(hits) / len(hits)
        for protocol, value in zip(PROTOCOLS, (token, float(all(hits)), float(generated)), strict=True):
            self.values.setdefault(f"{kind}_{protocol}{suffix}", []).append(value)

    def scores(self, generated: bool) -> dict[str, float | None]:
        """Every score column; None where the request has no such probe (or nothing was generated)."""
        out: dict[str, float | None] = {}
        for name in SCORE_COLUMNS:
            values = self.values.get(name)
            kept = values and (generated or "generated" not in name)
            out[name] = sum(values) / len(values) if values and kept else None
        for name in ANY_COLUMNS:
            values = self.values.get(name.replace("_any", "")) if self.request.any_of else None
            kept = values and (generated or "generated" not in name)
            out[name] = max(values) if values and kept else None
        for name in OOD_COLUMNS:
            values = self.values.get(name)
            out[name] = sum(values) / len(values) if values else None
        for name in EXTRA_COLUMNS:
            value = self.extra.get(name)
            out[name] = value if value is not None and math.isfinite(value) else None
        out["score_splits"] = self.splits
        return out


SCORE_COLUMNS: tuple[str, ...] = tuple(
    f"{kind}_{protocol}{suffix}"
    for suffix in ("", "_base")
    for kind in KINDS
    for protocol in PROTOCOLS
    if not (suffix and kind == "locality")
)
ANY_COLUMNS = tuple(
    f"portability_any_{protocol}{suffix}" for suffix in ("", "_base") for protocol in ("exact", "generated")
)
OOD_COLUMNS = ("ood_token", "ood_confident", "ood_token_base", "ood_confident_base")
EXTRA_COLUMNS = ("target_logprob", "target_logprob_base", "min_margin", "perplexity", "perplexity_base")
