"""How certain a mean is: the spread over seeds, and a 95% interval by bootstrap.

Requests of a group share one edited model, so they do not vary independently: the bootstrap draws
whole groups. In continual editing (``rollback: never``) the groups of a cell share one model, too,
and whole cells are drawn. Where there are fewer than five such units, no interval is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 999
LEAST_UNITS = 5
"""Units from which an interval can be told: the bootstrap of fewer is far too narrow."""
FEW_UNITS = 5_000
"""Units up to which they are drawn one by one; the mean of more is normally distributed."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """``mean`` over requests; ``sd`` of the seeds' means; ``low`` and ``high``, the ends of the 95%
    interval. None where there is nothing to compute it from."""

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


def spread(sums_U: Floats, counts_U: Floats, seeds_U: NDArray[Any]) -> Spread:
    """The spread of a mean over requests. Each unit has the sum of its scores, their count, and its
    seed."""
    scored = counts_U > 0
    sums_U, counts_U, seeds_U = sums_U[scored], counts_U[scored], seeds_U[scored]
    if not len(sums_U):
        return Spread(None, None, None, None)
    means = [sums_U[seeds_U == seed].sum() / counts_U[seeds_U == seed].sum() for seed in np.unique(seeds_U)]
    sd = float(np.std(means, ddof=1)) if len(means) > 1 else None
    low, high = _interval(sums_U, counts_U) if len(sums_U) >= LEAST_UNITS else (None, None)
    return Spread(float(sums_U.sum() / counts_U.sum()), sd, low, high)


def _interval(sums_U: Floats, counts_U: Floats) -> tuple[float, float]:
    mean = sums_U.sum() / counts_U.sum()
    if len(sums_U) > FEW_UNITS:
        residuals_U = sums_U - mean * counts_U  # of a ratio of two sums, to first order
        error = math.sqrt(len(sums_U) * residuals_U.var(ddof=1)) / counts_U.sum()
        return float(mean - 1.96 * error), float(mean + 1.96 * error)
    from scipy.stats import bootstrap

    def ratio(sums: Floats, counts: Floats, axis: int) -> Floats:
        found: Floats = sums.sum(axis) / counts.sum(axis)
        return found

    found = bootstrap(
        (sums_U, counts_U),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(sums_U)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
