"""Random numbers. Every generator is derived from its purpose; none is shared or global (DESIGN
section 4).

>>> draws = RandomStreams("wise", {"lr": 1.0}, seed=0, first=40, position=3)
>>> mask = torch.rand(4, generator=draws.generator("mask"))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from workers.types import JSON


def canonical(value: JSON) -> str:
    """Canonical JSON text of a value: keys sorted, no spaces, no NaN. Every hash in the project is
    computed from it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def derive_seed(*parts: JSON) -> int:
    """A 63-bit seed that is a pure function of ``parts`` (any JSON values)."""
    digest = hashlib.sha256(canonical(list(parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derive_generator(*parts: JSON) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Numbers are drawn on the CPU and moved, so
    that they agree on every device."""
    return torch.Generator(device="cpu").manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class RandomStreams:
    """The random numbers one edit of one lane may use.

    They depend on method, config, seed, the index of the group's first request and the position in
    the group, but not on T, N or the other lanes. The first ten edits of a T=100 group therefore
    draw the same numbers as the T=10 group.
    """

    method: str
    config: Mapping[str, JSON]
    seed: int
    first: int
    position: int

    def generator(self, purpose: str) -> torch.Generator:
        """A new generator for one named use; two calls with the same name give the same numbers."""
        return derive_generator(self.method, dict(self.config), self.seed, self.first, self.position, purpose)
