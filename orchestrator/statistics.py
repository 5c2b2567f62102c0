"""How far numbers from a few seeds can be trusted. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

__all__ = [
    "PairedDifference",
    "Spread",
    "Verdict",
    "holm",
    "more_seeds",
    "paired_difference",
    "spread",
    "verdict",
]

MOST_SEEDS = 1000
"""A difference that needs more pairs than this is as good as none."""

Verdict = Literal["better", "worse", "not distinguishable", "needs more seeds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    """NaN when there is no value."""
    std: float
    """With ``n - 1`` in the denominator; NaN for fewer than two values."""
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """Mean difference over the seeds that both sides have, with a t interval."""

    mean: float
    low: float
    """Lower end of the interval; NaN for fewer than two pairs."""
    high: float
    num_pairs: int
    std: float = math.nan
    """Of the differences between pairs."""
    p_value: float = math.nan
    """Two-sided, of no difference at all; 0 for equal differences other than 0."""


def spread(values: Iterable[float]) -> Spread:
    """Mean and spread of the finite ``values``."""
    found = [value for value in values if math.isfinite(value)]
    if len(found) < 2:  # most points of a large search have one seed, and NumPy takes its time
        return Spread(mean=float(found[0]) if found else math.nan, std=math.nan, count=len(found))
    finite = np.array(found, dtype=float)
    return Spread(mean=float(finite.mean()), std=float(finite.std(ddof=1)), count=len(finite))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = 0.95
) -> PairedDifference:
    """``values - baseline`` over common seeds (seed -> value), with the two-sided t interval of the mean.

    Pairing by seed takes out what a seed does to both alike (initial weights, data order). Seeds where either side
    is missing or not finite are left out. Equal differences give an interval of no width.
    """
    seeds = sorted(values.keys() & baseline.keys())
    differences = [values[seed] - baseline[seed] for seed in seeds]
    result = spread(differences)
    if result.count < 2:
        return PairedDifference(mean=result.mean, low=math.nan, high=math.nan, num_pairs=result.count)
    error = result.std / math.sqrt(result.count)
    half = _t_quantile((1 + confidence) / 2, result.count - 1) * error
    if error == 0:
        p_value = 0.0 if result.mean else 1.0
    else:
        p_value = 2 * _t_tail(abs(result.mean) / error, result.count - 1)
    return PairedDifference(
        mean=result.mean, low=result.mean - half, high=result.mean + half, num_pairs=result.count,
        std=result.std, p_value=p_value,
    )  # fmt: skip


@lru_cache(4096)
def _t_quantile(probability: float, degrees: int) -> float:
    """Of Student's distribution."""
    from scipy import special

    return float(special.stdtrit(degrees, probability))


def _t_tail(t: float, degrees: int) -> float:
    """Probability that Student's distribution gives to values above ``t``."""
    from scipy import special  # not scipy.stats: its generality costs a tenth of a millisecond for each point

    return float(special.stdtr(degrees, -t))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for all comparisons made together, by Holm's step-down method (1979). NaN stays NaN.

    Calling those below 0.05 different errs, in any of the comparisons, at most once in twenty tables.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    reached = 0.0
    for rank, (p, index) in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * p))
        adjusted[index] = reached
    return adjusted


def more_seeds(difference: PairedDifference, *, confidence: float = 0.95) -> int | None:
    """How many more pairs would take 0 out of the interval, if mean and spread stayed as they are.

    0 when it is out already; None when fewer than two pairs tell no spread, or when even 1000 would not do.
    """
    if difference.num_pairs < 2 or difference.mean == 0:
        return None
    for count in range(difference.num_pairs, MOST_SEEDS + 1):
        half = _t_quantile((1 + confidence) / 2, count - 1) * difference.std / math.sqrt(count)
        if half < abs(difference.mean):
            return count - difference.num_pairs
    return None


def verdict(
    difference: PairedDifference, *, maximize: bool = True, adjusted_p: float = 0.0, level: float = 0.05
) -> Verdict:
    """What the interval allows to say: nothing, when it contains 0 or rests on fewer than two pairs.

    ``adjusted_p`` (see ``holm``) takes into account how many points were looked at: above ``level``, an interval
    beside 0 is put down to their number.
    """
    if difference.num_pairs < 2:
        return "needs more seeds"
    if difference.low <= 0.0 <= difference.high or adjusted_p > level:
        return "not distinguishable"
    return "better" if (difference.mean > 0) == maximize else "worse"
