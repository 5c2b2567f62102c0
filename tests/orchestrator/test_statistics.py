"""Means, spreads and paired differences against numbers worked out by other means."""

from __future__ import annotations

import math
import statistics

import pytest

from orchestrator.statistics import PairedDifference, holm, more_seeds, paired_difference, spread, verdict


@pytest.mark.parametrize("values", [[1.0, 2.0], [70.1, 70.5, 69.8, 71.0]])
def test_spread_is_the_sample_standard_deviation(values: list[float]) -> None:
    found = spread([*values, math.nan])
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.std == pytest.approx(statistics.stdev(values))
    assert found.count == len(values)


def test_spread_of_one_value_and_of_none() -> None:
    one, none = spread([5.0]), spread([])
    assert (one.mean, one.count) == (5.0, 1)
    assert math.isnan(one.std)
    assert math.isnan(none.mean)
    assert none.count == 0


def test_paired_difference_uses_common_seeds_only() -> None:
    """Differences 1, 2, 3: mean 2, s 1, and t(0.975, 2) = 4.302653 from a printed table."""
    values = {0: 11.0, 1: 22.0, 2: 33.0, 5: 100.0, 7: math.nan}
    baseline = {0: 10.0, 1: 20.0, 2: 30.0, 6: 0.0, 7: 1.0}
    found = paired_difference(values, baseline)
    half = 4.302653 / math.sqrt(3)
    assert (found.mean, found.num_pairs) == (2.0, 3)
    assert found.low == pytest.approx(2 - half, abs=1e-6)
    assert found.high == pytest.approx(2 + half, abs=1e-6)


@pytest.mark.parametrize(("values", "baseline", "num_pairs"), [({}, {1: 1.0}, 0), ({1: 3.0}, {1: 1.0}, 1)])
def test_fewer_than_two_pairs_have_no_interval(values: dict, baseline: dict, num_pairs: int) -> None:
    found = paired_difference(values, baseline)
    assert found.num_pairs == num_pairs
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert verdict(found) == "needs more seeds"


def test_equal_differences_have_an_interval_without_width() -> None:
    found = paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert (found.low, found.mean, found.high) == (1.0, 1.0, 1.0)
    assert verdict(paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})) == "not distinguishable"


@pytest.mark.parametrize(
    ("low", "high", "maximize", "expected"),
    [
        (0.1, 0.5, True, "better"),
        (0.1, 0.5, False, "worse"),
        (-0.5, -0.1, True, "worse"),
        (-0.5, -0.1, False, "better"),
        (-0.1, 0.5, True, "not distinguishable"),
        (0.0, 0.5, True, "not distinguishable"),
    ],
)
def test_verdict(low: float, high: float, maximize: bool, expected: str) -> None:
    difference = PairedDifference(mean=(low + high) / 2, low=low, high=high, num_pairs=3)
    assert verdict(difference, maximize=maximize) == expected
    assert verdict(difference, maximize=maximize, adjusted_p=0.06) == "not distinguishable"


def test_p_value_is_that_of_the_paired_t_test() -> None:
    """Differences 1, 2, 3: t = 2 sqrt(3) with 2 degrees of freedom; p = 1 - t / sqrt(t^2 + 2) there."""
    found = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    t = 2 * math.sqrt(3)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.std == pytest.approx(1.0)
    assert paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p_value == 0.0
    assert paired_difference({0: 2.0, 1: 3.0}, {0: 2.0, 1: 3.0}).p_value == 1.0


def test_holm_against_a_worked_example() -> None:
    """Smallest times 4, next times 3, ...; never below one that came before, never above 1."""
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005])[:2] == pytest.approx([0.03, 0.06])
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005])[3:] == pytest.approx([0.06, 0.02])
    assert math.isnan(holm([0.2, math.nan])[1])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_more_seeds_takes_zero_out_of_the_interval() -> None:
    values = {0: 0.2, 1: 1.0, 2: -0.3, 3: 0.5}
    found = paired_difference(values, dict.fromkeys(values, 0.0))
    needed = more_seeds(found)
    assert needed is not None
    count = found.num_pairs + needed
    from scipy import stats

    half = [stats.t.ppf(0.975, n - 1) * found.std / math.sqrt(n) for n in (count - 1, count)]
    assert half[0] >= found.mean > half[1]
    assert more_seeds(paired_difference({0: 2.0, 1: 2.1}, {0: 0.0, 1: 0.0})) == 0
    assert more_seeds(paired_difference({0: 1.0}, {0: 0.0})) is None
    assert more_seeds(paired_difference({0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0})) is None
    assert more_seeds(paired_difference({0: 1.0, 1: -0.99}, {0: 0.0, 1: 0.0})) is None
