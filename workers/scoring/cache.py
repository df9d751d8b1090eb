"""Caches of scoring: what the base model answered, and activations of prefixes."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from workers.model.replay import Prefix
from workers.scoring.probes import Reply

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
    """What the base model says, computed before (:class:`workers.artifacts.base_scores.BaseScores`), by the batch's digest."""

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
