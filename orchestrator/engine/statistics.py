"""Second moments whose inverse is not determined by the precision they were summed in.

    found = read_statistics(plan, store)     # cell id -> the second moments it uses, those that exist
    for text in say_unresolved(plan, found): view.warn(text)

A sum in float32 is known to about one part in 8 million. If the largest eigenvalue of a second
moment is more than 8 million times the smallest, the rounding of the sum is as large as the
smallest eigenvalues, and the inverse, which the methods of ROME's family multiply by, depends on
the order of the summation. Float64 resolves such a moment.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from safetensors import SafetensorError

from orchestrator.planning.plan import Plan
from orchestrator.results.artifact_store import ArtifactStore
from orchestrator.storage.base import Damaged, Missing, Store
from workers.artifacts.base import ArtifactData, ArtifactSpec
from workers.artifacts.stats import KIND, condition
from workers.types import JSON

log = logging.getLogger(__name__)

RESOLUTION = MappingProxyType({"float32": 2.0**23, "float64": 2.0**52})
"""Largest condition at which the rounding of a sum is below the smallest eigenvalue."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """A second moment that a cell uses. ``condition`` is None if its smallest eigenvalue is not
    positive."""

    key: str
    layer: int
    precision: str
    condition: float | None

    @property
    def resolved(self) -> bool:
        return self.condition is not None and self.condition <= RESOLUTION[self.precision]

    def to_json(self) -> dict[str, JSON]:
        return {**asdict(self), "resolved": self.resolved}

    @classmethod
    def from_json(cls, value: Mapping[str, JSON]) -> Statistic:
        return cls(**{name: value[name] for name in cls.__slots__})


Statistics = Mapping[str, tuple[Statistic, ...]]
"""Cell id -> the second moments that it inverts."""


def read_statistics(
    plan: Plan, store: Store, known: Iterable[Statistic] = (), only: Collection[str] | None = None
) -> Statistics:
    """Read the conditions of the second moments that the plan's cells use, as far as these exist.

    ``known``: those that were read before. ``only``: keys of the artifacts to read (None: all). An
    artifact of an earlier version does not tell its condition, which is then computed.
    """
    found: dict[str, Statistic | None] = {statistic.key: statistic for statistic in known}
    artifacts = ArtifactStore(store)
    for spec in _moments(plan):
        if spec.key not in found and (only is None or spec.key in only):
            found[spec.key] = _read(spec, artifacts)
    of_keys: dict[tuple[tuple[str, str], ...], tuple[Statistic, ...]] = {}
    result: dict[str, tuple[Statistic, ...]] = {}
    for cell in plan.cells:
        keys = plan.cell_artifacts[cell.variant, cell.seed]
        if keys not in of_keys:
            used = (found.get(key) for _, key in keys)
            of_keys[keys] = tuple(statistic for statistic in used if statistic is not None)
        if of_keys[keys]:
            result[cell.cell_id] = of_keys[keys]
    return result


def say_unresolved(plan: Plan, statistics: Statistics) -> Iterator[str]:
    """Say for each method which of its second moments are not resolved, and what to do."""
    asked = {cell.cell_id for cell in plan.asked}
    for v, variant in enumerate(plan.variants):
        found = {
            statistic.layer: statistic
            for cell in plan.cells
            if cell.variant == v and cell.cell_id in asked
            for statistic in statistics.get(cell.cell_id, ())
            if not statistic.resolved
        }
        if found:
            yield f"{variant.label}: {_say(list(found.values()))}"


def _say(found: list[Statistic]) -> str:
    precision = found[0].precision
    layers = ", ".join(
        f"layer {s.layer} ({'not positive' if s.condition is None else f'{s.condition:.3g}'})" for s in found
    )
    limit = f"{RESOLUTION[precision]:.2g}"
    remedy = "set precision: float64 among its hyperparameters, or " if precision == "float32" else ""
    return (
        f"the condition of the second moment of {layers} is beyond what {precision} resolves ({limit}), so "
        f"its inverse, and with it the scores, depend on the order in which it was summed; {remedy}use more "
        f"samples or a longer corpus"
    )


def _moments(plan: Plan) -> Iterator[ArtifactSpec]:
    """The second moments that cells use themselves. One that only another artifact is made of is
    not inverted."""
    keys = dict.fromkeys(key for keys in plan.cell_artifacts.values() for _, key in keys)
    for key in keys:
        if (spec := plan.artifacts[key]).kind == KIND:
            yield spec


def _read(spec: ArtifactSpec, artifacts: ArtifactStore) -> Statistic | None:
    """The statistic of one artifact; None if it does not exist, or is damaged: whoever needs it
    then puts it aside and builds it again."""
    if not artifacts.has(spec):
        return None
    store, key = artifacts.store, artifacts.paths.artifact(spec.kind, spec.key)
    try:
        with store.open(key) as file:
            meta = ArtifactData.read_meta(file)
        if "condition" in meta:
            value = meta["condition"]
        else:
            value = condition(ArtifactData.from_bytes(store.read(key)).tensors["moment"])
    except Missing:
        return None
    except (Damaged, ValueError, KeyError, SafetensorError) as error:
        log.warning("%s: cannot be read (%s); its condition is not known", store.where(key), error)
        return None
    return Statistic(spec.key, spec.recipe["layer"], spec.recipe["precision"], value)
