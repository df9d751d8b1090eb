"""Random numbers: every generator is derived from what it is for, never shared and never global
(DESIGN section 4).

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
    """The one JSON text of a value: keys sorted, no spaces, no NaN. What every hash in the project
    is taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def derive_seed(*parts: JSON) -> int:
    """A 63-bit seed that is a pure function of ``parts`` (any JSON values)."""
    digest = hashlib.sha256(canonical(list(parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derive_generator(*parts: JSON) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Draw on the CPU and move: the numbers then
    agree on every device."""
    return torch.Generator(device="cpu").manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class RandomStreams:
    """The random numbers one edit of one lane may use.

    They depend on method, config, seed, the index of the group's first request and the position in
    the group; not on T, N or the lanes beside. The first ten edits of a T=100 group therefore draw
    what the T=10 group draws.
    """

    method: str
    config: Mapping[str, JSON]
    seed: int
    first: int
    position: int

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh generator for one named use; asking twice gives the same numbers twice."""
        return derive_generator(self.method, dict(self.config), self.seed, self.first, self.position, purpose)
