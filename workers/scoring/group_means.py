"""Accuracy as KnowEdit publishes it (arXiv 2401.01286): the mean over a request's named groups of
probes of each group's mean.

A request's own column, such as ``portability_token``, is the mean over all its probes, whatever
their groups; the two differ where groups differ in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workers.scoring.accuracy import PROTOCOLS
from workers.scoring.declare import RequestScore, Score, Settings
from workers.types import EditRequest

if TYPE_CHECKING:
    from workers.scoring.probes import Asked, Kind

_KINDS: tuple[Kind, ...] = ("portability", "locality")


def _measure(request: EditRequest, asked: Sequence[Asked], settings: Settings) -> Mapping[str, float | None]:
    values: dict[str, dict[str, list[float]]] = {}
    for one in asked:
        if one.probe.kind not in _KINDS or not one.probe.group:
            continue
        for suffix, of_base in (("", False), ("_base", True)):
            for protocol, value in zip(PROTOCOLS, one.accuracy(of_base), strict=True):
                groups = values.setdefault(f"{one.probe.kind}_group_mean_{protocol}{suffix}", {})
                groups.setdefault(one.probe.group, []).append(value)
    return {
        name: sum(sum(found) / len(found) for found in groups.values()) / len(groups)
        for name, groups in values.items()
    }


GROUP_MEANS = RequestScore(
    scores=tuple(
        Score(
            f"{kind}_group_mean_{protocol}",
            f"{what}: mean over the named groups of {kind} prompts of each group's mean",
            unit="0..1",
            probe=kind,
            setting="generated" if protocol == "generated" else "",
            base=kind != "locality",  # 1 by definition
        )
        for kind in _KINDS
        for protocol, what in PROTOCOLS.items()
    ),
    measure=_measure,
)
