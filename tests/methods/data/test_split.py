from __future__ import annotations

import numpy as np
import pytest

from methods.data.split import stratified_split

EVEN = np.tile(np.arange(10), 50)
UNEVEN = np.repeat(np.arange(5), [1, 2, 7, 40, 350])
CASES = [(EVEN, 0.1), (EVEN, 0.003), (EVEN, 0.95), (UNEVEN, 0.1), (UNEVEN, 0.5), (UNEVEN, 0.99)]


@pytest.mark.parametrize(("labels", "fraction"), CASES)
def test_parts_are_sorted_disjoint_and_stratified(labels: np.ndarray, fraction: float) -> None:
    labels = np.random.default_rng(0).permutation(labels)
    train, validation = stratified_split(labels, fraction, seed=3)
    assert train.dtype == validation.dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(labels)))
    assert np.array_equal(train, np.sort(train))
    assert np.array_equal(validation, np.sort(validation))
    total, held_out = np.bincount(labels), np.bincount(labels[validation], minlength=labels.max() + 1)
    assert bool((held_out < total).all()), "every class keeps a training sample"
    unlimited = total * fraction <= total - 1
    assert bool((np.abs(held_out - total * fraction)[unlimited] <= 1).all())


def test_the_size_is_exact_where_classes_are_too_small_for_rounding() -> None:
    """Three of each class at one tenth: rounding per class would hold out nothing."""
    _, validation = stratified_split(np.repeat(np.arange(100), 3), 0.1, seed=0)
    assert len(validation) == 30
    assert len(stratified_split(EVEN, 0.1, seed=0)[1]) == 50


def test_the_seed_decides() -> None:
    first, again = stratified_split(EVEN, 0.2, seed=1)[1], stratified_split(EVEN, 0.2, seed=1)[1]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, stratified_split(EVEN, 0.2, seed=2)[1])


def test_a_class_of_one_stays_in_training() -> None:
    labels = np.array([0] * 20 + [1])
    for seed in range(20):
        assert 20 in stratified_split(labels, 0.5, seed)[0]


def test_nothing_held_out() -> None:
    train, validation = stratified_split(EVEN, 0.0, seed=0)
    assert np.array_equal(train, np.arange(len(EVEN)))
    assert len(validation) == 0
    assert validation.dtype == np.int64


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0 and below 1, got {fraction}"):
        stratified_split(EVEN, fraction, seed=0)


@pytest.mark.parametrize(("labels", "fraction"), [(EVEN, 0.0001), (np.arange(10), 0.5), (EVEN[:0], 0.5)])
def test_a_fraction_that_holds_out_nothing(labels: np.ndarray, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction of {fraction} holds out none of {len(labels)} samples"):
        stratified_split(labels, fraction, seed=0)
