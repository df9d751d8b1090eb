"""Accuracy on the edit prompt, its rephrasings, unrelated prompts and prompts that follow from the
edit.

``token``, ``exact`` and ``generated`` are defined in :mod:`workers.scoring.score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from workers.scoring.declare import RequestScore, Score, Settings
from workers.types import EditRequest

if TYPE_CHECKING:
    from workers.scoring.probes import Asked, Kind

KINDS: Mapping[Kind, str] = MappingProxyType(
    {
        "reliability": "on the edit prompt",
        "generalization": "on the rephrased prompts (mean)",
        "locality": "on the locality prompts, against the base model's answers (mean)",
        "portability": "on the portability prompts (mean)",
    }
)
PROTOCOLS: Mapping[str, str] = MappingProxyType(
    {
        "token": "share of target tokens predicted under teacher forcing",
        "exact": "1 if every target token is predicted under teacher forcing",
        "generated": "1 if greedy generation with a natural stop gives the normalised target",
    }
)


def _measure(request: EditRequest, asked: Sequence[Asked], settings: Settings) -> Mapping[str, float | None]:
    values: dict[str, list[float]] = {}
    for one in asked:
        kind = one.probe.kind
        if kind not in KINDS:
            continue
        for suffix, of_base in (("", False), ("_base", True)):
            for protocol, value in zip(PROTOCOLS, one.accuracy(of_base), strict=True):
                values.setdefault(f"{kind}_{protocol}{suffix}", []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


ACCURACY = RequestScore(
    scores=tuple(
        Score(
            f"{kind}_{protocol}",
            f"{what}, {where}",
            unit="0..1",
            probe=kind,
            setting="generated" if protocol == "generated" else "",
            base=kind != "locality",  # 1 by definition
        )
        for kind, where in KINDS.items()
        for protocol, what in PROTOCOLS.items()
    ),
    measure=_measure,
)
