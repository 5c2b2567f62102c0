from __future__ import annotations

import numpy as np
import pytest

from methods.data.randomness import derive_seed, hashes, integers, uniform

IDS = np.arange(20_000)


def test_pinned_numbers() -> None:
    """Computed with Python's own integers. A change here changes every stored result: raise the methods' versions."""
    assert derive_seed(0, "views", "init") == 5928222370764867050
    assert hashes(0, "order", 0, np.array([0, 1])).tolist() == [3874841814130863982, 14744147249882975169]


def test_seeds_are_distinct_and_fit_into_63_bits() -> None:
    seeds = {
        derive_seed(seed, *purpose)
        for seed in (0, 1, -1)
        for purpose in ((), ("a",), ("a", "b"), ("ab",), ("b", "a"))
    }
    assert len(seeds) == 15
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_number_does_not_depend_on_its_neighbours() -> None:
    whole = uniform(3, "flip", 2, IDS)
    shuffled = np.random.default_rng(0).permutation(IDS)[:50]
    assert np.array_equal(uniform(3, "flip", 2, shuffled), whole[shuffled])
    assert np.array_equal(uniform(3, "flip", 2, shuffled[7:8]), whole[shuffled[7:8]])
    assert uniform(3, "flip", 2, IDS[:0]).shape == (0,)


@pytest.mark.parametrize("other", [(4, "flip", 2), (3, "crop_top", 2), (3, "flip", 1)])
def test_streams_are_unrelated(other: tuple[int, str, int]) -> None:
    first, second = uniform(3, "flip", 2, IDS), uniform(*other, IDS)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_numbers_are_uniform_and_neighbours_unrelated() -> None:
    values = uniform(0, "crop_top", 0, IDS)
    assert 0.0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1.0
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03


def test_integers_cover_their_range() -> None:
    drawn = integers(1, "crop_left", 5, IDS, high=9)
    assert drawn.dtype == np.int64
    assert set(drawn.tolist()) == set(range(9))
    assert integers(1, "crop_left", 5, IDS, high=1).max() == 0
