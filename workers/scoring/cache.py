"""Caches of scoring: the base model's answers, and activations of prefixes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from workers.model.replay import Prefix
from workers.scoring.probes import Reply

Key = tuple[object, ...]
"""The content of a batch: everything a model's reply depends on."""

Numbers = tuple[float | None, ...]
"""One number per row."""

V = TypeVar("V")


@dataclass
class _LRUCache(Generic[V]):
    """A least-recently-used cache: one value per scoring batch, total weight at most ``budget``.

    The key is a whole batch and never a single sequence, so that after a hit and after a miss the
    same batches are computed, with the same bits.
    """

    budget: int = 0
    hits: int = 0
    misses: int = 0
    used: int = 0
    _kept: OrderedDict[Key, tuple[V, int]] = field(default_factory=OrderedDict)

    def resize(self, budget: int) -> None:
        """Change the budget; drop what no longer fits."""
        self.budget = budget
        self._shrink()

    def release(self) -> bool:
        """Drop all values; return whether there were any."""
        some = bool(self._kept)
        self._kept.clear()
        self.used = 0
        return some

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
class _BaseCache(_LRUCache[V]):
    """Results of the base model. ``budget`` counts batches."""

    budget: int = 1024

    def put(self, key: Key, value: V) -> None:
        self._keep(key, value, 1)


class BaseNumbers(_BaseCache[Numbers]):
    """Numbers of the base model on a batch that are not replies to probes, one per row."""


@dataclass
class BaseAnswers(_BaseCache[Reply]):
    """The base model's replies to scoring batches, kept by the session."""

    numbers: BaseNumbers = field(default_factory=BaseNumbers)


@dataclass
class Prefixes(_LRUCache[Prefix]):
    """Cache of the inputs of the first layer an overlay can change: layers below an edit compute
    the same in every group, method and seed.

    ``budget`` is in bytes; 0 keeps nothing.
    """

    def put(self, key: Key, prefix: Prefix) -> None:
        # a new tensor: an empty view would keep the whole output in memory
        prefix = replace(prefix, output_BSD=prefix.output_BSD.new_empty(0))
        self._keep(key, prefix, prefix.bytes())
