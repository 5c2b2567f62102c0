"""How far numbers from a few seeds can be trusted. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["PairedDifference", "Spread", "Verdict", "paired_difference", "spread", "verdict"]

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

    half = (
        float(stats.t.ppf((1 + confidence) / 2, df=result.count - 1)) * result.std / math.sqrt(result.count)
    )
    return PairedDifference(
        mean=result.mean, low=result.mean - half, high=result.mean + half, num_pairs=result.count
    )


def verdict(difference: PairedDifference, *, maximize: bool = True) -> Verdict:
    """What the interval allows to say: nothing, when it contains 0 or rests on fewer than two pairs."""
    if difference.num_pairs < 2:
        return "needs more seeds"
    if difference.low <= 0.0 <= difference.high:
        return "not distinguishable"
    return "better" if (difference.mean > 0) == maximize else "worse"
