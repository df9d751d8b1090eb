"""Estimate the seconds of shards, and the makespan on many actors. Pure functions, independent of
torch and Ray.

    clock = calibrate([Timing(variant=0, T=10, work=120.0, seconds=60.0)])
    seconds = clock.seconds(variant=0, T=10, work=480.0)          # 240: measured
    simulate([seconds, 30.0, 30.0], actors=64).ratio              # makespan / lower bound

*Work* is the unit of an estimate: one FT edit in a single lane is 1. It depends only on the spec
and the methods, so shards may be cut by it. Seconds are work times a rate that was measured in this
results folder. They determine the order of launch and the output of `plan`, never which lanes share
a wave.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

GPU_LANE_SHARE, CPU_LANE_SHARE = 0.25, 0.8
"""Cost of each further lane in a lockstep step, relative to the step of a single lane. On a GPU all
lanes share the reading of the base model's weights and the kernel launches. On a CPU one lane's
products already use the core fully (measured: the demo's waves of ten lanes against two)."""

SCORE_SHARE = 0.2
"""Work of scoring one request, in FT edits. :func:`workers.timeline.cut_steps` uses the same
figure."""

GUESSED_SECONDS = 1.0
"""Seconds per unit of work if nothing has been measured. Only ratios of times are meaningful
then."""


def wave_work(cost: float, edits: int, scored: float, lanes: int, on_gpu: bool) -> float:
    """Work of one wave. Each of its lanes makes ``edits`` edits and scores ``scored`` requests.
    ``cost``: cost of one edit of the method, relative to FT."""
    more = GPU_LANE_SHARE if on_gpu else CPU_LANE_SHARE
    return (edits * cost + scored * SCORE_SHARE) * (1 + (lanes - 1) * more)


@dataclass(frozen=True, slots=True)
class Timing:
    """Measured time of some work."""

    variant: int
    T: int
    work: float
    seconds: float


@dataclass(frozen=True)
class Clock:
    """Measured seconds per unit of work: of the variant at this T, else of the variant, else of all
    methods, else :data:`GUESSED_SECONDS`."""

    exact: Mapping[tuple[int, int], float] = field(default_factory=dict)
    variant: Mapping[int, float] = field(default_factory=dict)
    overall: float | None = None

    def rate(self, variant: int, T: int) -> float:
        found = self.exact.get((variant, T), self.variant.get(variant, self.overall))
        return GUESSED_SECONDS if found is None else found

    def seconds(self, variant: int, T: int, work: float) -> float:
        return work * self.rate(variant, T)

    def note(self, wanted: Iterable[tuple[int, int]]) -> str:
        """Text on how the estimates for these (variant, T) were obtained."""
        pairs = set(wanted)
        if self.overall is None:
            return (
                f"nothing has been measured in this folder yet: {GUESSED_SECONDS:g} s for an FT edit is a "
                f"guess and other "
                "methods follow by their rough relative cost; the ratio of the makespan to its bound means "
                "more than the hours"
            )
        exact = len(pairs & self.exact.keys())
        method = sum(pair not in self.exact and pair[0] in self.variant for pair in pairs)
        return (
            f"of {len(pairs)} (method, T) left, {exact} were measured in this folder, {method} follow "
            f"their method's other T, "
            f"{len(pairs) - exact - method} its relative cost"
        )


def calibrate(timings: Iterable[Timing]) -> Clock:
    """Compute the rates. Each is total seconds divided by total work, so long shards have more
    weight."""
    sums: dict[tuple[int, int] | int | None, tuple[float, float]] = {}
    for timing in timings:
        if timing.work <= 0 or timing.seconds <= 0:
            continue
        for key in ((timing.variant, timing.T), timing.variant, None):
            seconds, work = sums.get(key, (0.0, 0.0))
            sums[key] = (seconds + timing.seconds, work + timing.work)
    rates = {key: seconds / work for key, (seconds, work) in sums.items()}
    return Clock(
        exact={key: rate for key, rate in rates.items() if isinstance(key, tuple)},
        variant={key: rate for key, rate in rates.items() if isinstance(key, int)},
        overall=rates.get(None),
    )


@dataclass(frozen=True, slots=True)
class Simulation:
    """Simulated run of shards on ``actors`` actors. Times in seconds; ``longest`` is the longest
    shard, which is the critical path because a shard is not divided."""

    actors: int
    makespan: float
    longest: float
    total: float

    @property
    def bound(self) -> float:
        """Lower bound of the makespan of any schedule."""
        return max(self.longest, self.total / self.actors)

    @property
    def ratio(self) -> float:
        return self.makespan / self.bound if self.bound else 1.0


def simulate(seconds: Sequence[float], actors: int) -> Simulation:
    """Simulate greedy list scheduling: an actor that becomes free takes the next shard in the given
    order."""
    if actors < 1:
        raise ValueError(f"actors: {actors}; at least one is needed")
    free = [0.0] * min(actors, max(1, len(seconds)))
    for duration in seconds:
        heapq.heapreplace(free, free[0] + duration)
    return Simulation(actors, max(free), max(seconds, default=0.0), sum(seconds))
