"""Few-shot and imbalanced training sets: shares per class, nested, and the same whenever they are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from methods.data.thin import thin

LABELS = np.repeat(np.arange(10), 100)[np.random.default_rng(0).permutation(1000)]
ALL = np.arange(1000)


def counts(**settings: float) -> list[int]:
    return np.bincount(LABELS[thin(LABELS, ALL, **settings)], minlength=10).tolist()


def test_everything_stays_by_default() -> None:
    assert thin(LABELS, ALL) is ALL


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.99])
def test_every_class_keeps_its_share(fraction: float) -> None:
    assert counts(fraction=fraction) == [round(100 * fraction)] * 10


def test_imbalance_is_the_exponential_profile() -> None:
    expected = [round(100 * 50 ** (-index / 9)) for index in range(10)]
    assert counts(imbalance=50) == expected
    assert (expected[0], expected[-1]) == (100, 2)


def test_no_class_disappears() -> None:
    assert counts(fraction=0.01, imbalance=1000) == [1] * 10


def test_smaller_shares_are_subsets_of_larger_ones() -> None:
    shares = [set(thin(LABELS, ALL, fraction=fraction).tolist()) for fraction in (0.1, 0.3, 0.7)]
    assert shares[0] < shares[1] < shares[2]


def test_only_the_given_positions_are_drawn_and_sorted() -> None:
    positions = ALL[ALL % 3 == 0]
    kept = thin(LABELS, positions, fraction=0.5, seed=4)
    assert set(kept.tolist()) <= set(positions.tolist())
    assert np.array_equal(kept, np.sort(kept))
    assert kept.dtype == np.int64
    assert np.array_equal(kept, thin(LABELS, positions, fraction=0.5, seed=4))
    assert not np.array_equal(kept, thin(LABELS, positions, fraction=0.5, seed=5))
