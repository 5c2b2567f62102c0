"""How far numbers from a few seeds can be trusted. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    finite = np.array([value for value in values if math.isfinite(value)], dtype=float)
    mean = float(finite.mean()) if len(finite) else math.nan
    std = float(finite.std(ddof=1)) if len(finite) > 1 else math.nan
    return Spread(mean=mean, std=std, count=len(finite))


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
    from scipy import stats

    error = result.std / math.sqrt(result.count)
    half = float(stats.t.ppf((1 + confidence) / 2, df=result.count - 1)) * error
    if error == 0:
        p_value = 0.0 if result.mean else 1.0
    else:
        p_value = 2 * float(stats.t.sf(abs(result.mean) / error, df=result.count - 1))
    return PairedDifference(
        mean=result.mean, low=result.mean - half, high=result.mean + half, num_pairs=result.count,
        std=result.std, p_value=p_value,
    )  # fmt: skip


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
    from scipy import stats

    if difference.num_pairs < 2 or difference.mean == 0:
        return None
    for count in range(difference.num_pairs, MOST_SEEDS + 1):
        half = float(stats.t.ppf((1 + confidence) / 2, df=count - 1)) * difference.std / math.sqrt(count)
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
