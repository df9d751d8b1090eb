"""The base model's replies to the scoring batches of a schedule, as an artifact that jobs of any method share.

What the base model says to a batch depends on the batch alone, so methods that score the same requests in the same batches
(:func:`workers.job.schedule_of`) need it computed once. Replies are kept by the content of their batch: what a job scores
that is not among them, such as a batch without a lane that failed, is computed where it is needed, with the same bits.

They are used only where they would be computed alike: on the same kind of processor, with the same libraries and threads.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from workers.artifacts.base import ArtifactData, Workbench
from workers.data import requests_of
from workers.failures import out_of_memory
from workers.job import StreamJob
from workers.model.batch import Encoder
from workers.scoring.cache import BaseAnswers, Numbers, digest
from workers.scoring.fluency import fluency
from workers.scoring.probes import Answer, Reply, Text, items_of
from workers.scoring.score import ask_base
from workers.timeline import asked, timeline
from workers.types import JSON

if TYPE_CHECKING:
    from workers.model.base import BaseModel


def build_base_scores(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Recipe: the schedule, and where its data set is (``job``, ``source``, ``order``). One tick after the other."""
    job = StreamJob.model_validate_json(recipe["job"])
    if job.chat_template:
        base = base.with_encoder(Encoder(base.tokenizer, chat_template=True))
    requests = requests_of(job, bench.dataset(recipe["source"], recipe["dataset"]), recipe["order"])
    ticks = timeline(job)
    kept, start = BaseAnswers(budget=sys.maxsize, heard=bench.answers), 0
    kept.numbers.resize(sys.maxsize)
    kept.numbers.heard = None if bench.answers is None else bench.answers.numbers
    begun, unfinished = None, bench.load()
    if unfinished is not None:
        state = ArtifactData.from_bytes(unfinished)
        begun, start = BaseScores.open(state, base), state.meta["ticks"]
        kept.know(begun)
        start = 0 if begun is None else start  # it was begun elsewhere
    for index in range(start, len(ticks)):
        tick = ticks[index]
        wave = job.waves[tick.wave]
        told = {i: {scored for _, scored in asked(job, tick, lane)} for i, lane in enumerate(wave)}
        items = items_of(job, tick, requests, {i: wave[i] for i in told if told[i]})
        if items:
            ask_base(base, items, job.score, kept)
            ending = [item for item in items if told[item.lane] - {"immediate"}]
            if job.score.fluency_tokens and ending:
                try:
                    fluency(base, None, ending, job.score, kept)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
        bench.progress(index + 1, len(ticks), "what the base model says")
        bench.keep(partial(_so_far, base, begun, kept, index + 1))
    return _pack(base, begun, kept, len(ticks))


class BaseScores:
    """The finished product, as :meth:`workers.scoring.cache.BaseAnswers.know` wants it. A reply is put together when it
    is asked for.

    >>> session.base_answers.know(BaseScores.open(data, session.base))  # doctest: +SKIP
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._argmax, self._figures_R3 = tensors["argmax"], tensors["figures"]
        self._texts, self._text_bytes = tensors["texts"].numpy().tobytes(), tensors["text_bytes"].tolist()
        self._natural, self._numbers = tensors["natural"].tolist(), tensors["numbers"]
        self._batches = _places(tensors["batches"], tensors["rows"])
        self._number_batches = _places(tensors["number_batches"], tensors["number_rows"])
        self._tokens = _bounds(tensors["tokens"].tolist())
        self._characters = _bounds([max(0, size) for size in self._text_bytes])

    @classmethod
    def open(cls, data: ArtifactData, base: BaseModel) -> Self | None:
        """None if it was computed where the same batch might give other bits."""
        return cls(data.tensors) if data.meta["made_on"] == made_on(base) else None

    def reply(self, batch: bytes) -> Reply | None:
        place = self._batches.get(batch)
        if place is None:
            return None
        rows = range(*place)
        argmax = self._argmax[self._tokens[rows.start] : self._tokens[rows.stop]].tolist()
        at = self._tokens[rows.start]
        answers = tuple(
            Answer(tuple(argmax[self._tokens[row] - at : self._tokens[row + 1] - at]), *figures)
            for row, figures in zip(rows, self._figures_R3[rows.start : rows.stop].tolist(), strict=True)
        )
        return Reply(answers, tuple(self._text(row) for row in rows))

    def numbers(self, batch: bytes) -> Numbers | None:
        place = self._number_batches.get(batch)
        if place is None:
            return None
        return tuple(None if math.isnan(value) else value for value in self._numbers[slice(*place)].tolist())

    def replies(self) -> Iterator[tuple[bytes, Reply]]:
        for batch in self._batches:
            if (reply := self.reply(batch)) is not None:
                yield batch, reply

    def all_numbers(self) -> Iterator[tuple[bytes, Numbers]]:
        for batch in self._number_batches:
            if (numbers := self.numbers(batch)) is not None:
                yield batch, numbers

    def _text(self, row: int) -> Text:
        part = self._texts[self._characters[row] : self._characters[row + 1]]
        text = None if self._text_bytes[row] < 0 else part.decode("utf-8", "surrogatepass")
        return Text(text, natural=bool(self._natural[row]))


def made_on(base: BaseModel) -> dict[str, JSON]:
    """What the bits of a forward depend on beside model and batch."""
    cuda = base.device.type == "cuda"
    return {
        "device": base.device.type,
        "processor": torch.cuda.get_device_name(base.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in ("torch", "transformers")},
    }


def _processor() -> str:
    """The kind of processor: by it, and by its instructions, libraries choose how they compute."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _so_far(base: BaseModel, begun: BaseScores | None, kept: BaseAnswers, ticks: int) -> bytes:
    return _pack(base, begun, kept, ticks).to_bytes()


def _pack(base: BaseModel, begun: BaseScores | None, kept: BaseAnswers, ticks: int) -> ArtifactData:
    """Flat tensors: per batch its digest and number of rows, per row what it holds, one after the other."""
    replies = {} if begun is None else dict(begun.replies())
    numbers = {} if begun is None else dict(begun.all_numbers())
    replies |= {digest(key): reply for key, reply in kept.items()}
    numbers |= {digest(key): values for key, values in kept.numbers.items()}
    answers = [answer for reply in replies.values() for answer in reply.answers]
    texts = [text for reply in replies.values() for text in reply.texts]
    # None and the empty text are different things
    written = [None if t.text is None else t.text.encode("utf-8", "surrogatepass") for t in texts]
    figures = [(a.logprob, a.margin, a.confident) for a in answers]
    values = [float("nan") if value is None else value for row in numbers.values() for value in row]
    whole, double = partial(torch.tensor, dtype=torch.int32), partial(torch.tensor, dtype=torch.float64)
    return ArtifactData(
        {
            "batches": _bytes(b"".join(replies)).view(-1, 16),
            "rows": whole([len(reply.answers) for reply in replies.values()]),
            "tokens": whole([len(answer.argmax) for answer in answers]),
            "argmax": whole([token for answer in answers for token in answer.argmax]),
            "figures": double(figures).view(-1, 3),
            "texts": _bytes(b"".join(text or b"" for text in written)),
            "text_bytes": whole([-1 if text is None else len(text) for text in written]),
            "natural": torch.tensor([text.natural for text in texts], dtype=torch.uint8),
            "number_batches": _bytes(b"".join(numbers)).view(-1, 16),
            "number_rows": whole([len(row) for row in numbers.values()]),
            "numbers": double(values),
        },
        {"ticks": ticks, "made_on": made_on(base)},
    )


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bounds(sizes: list[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def _places(batches_N16: Tensor, rows_N: Tensor) -> dict[bytes, tuple[int, int]]:
    """Where each batch's rows begin and end."""
    bounds = _bounds(rows_N.tolist())
    return {bytes(batch): (bounds[i], bounds[i + 1]) for i, batch in enumerate(batches_N16.tolist())}
