"""Pixel average precision against a hand-counted vector and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from methods.measures.pixel_precision import (
    PixelPrecisionRules,
    pixel_precision_sums,
    score_histograms,
    summarise_pixel_precision,
)

SCORES = np.array([0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25])
LABELS = np.array([1, 1, 0, 1, 0, 0, 1, 0])


def precision(scores: np.ndarray, truth: np.ndarray, num_bins: int = 1000) -> float:
    sums = pixel_precision_sums([scores], [truth], PixelPrecisionRules(num_bins=num_bins))
    return summarise_pixel_precision(sums)["px_ap"]


@pytest.mark.parametrize(("num_bins", "expected"), [(10, 83.0357), (4, 60.8333), (1000, 83.0357)])
def test_eight_pixels(num_bins: int, expected: float) -> None:
    assert precision(SCORES, LABELS, num_bins) == pytest.approx(expected, abs=1e-4)


def test_fine_bins_equal_scikit_learn() -> None:
    assert precision(SCORES, LABELS) == pytest.approx(100 * average_precision_score(LABELS, SCORES))
    random = np.random.default_rng(0)
    for _ in range(20):
        scores = (random.integers(0, 200, 300) + 0.5) / 200
        truth = random.integers(0, 2, 300)
        expected = 100 * average_precision_score(truth, scores)
        assert precision(scores, truth, 200) == pytest.approx(expected, rel=1e-12)


def test_pixels_that_are_not_judged_change_nothing() -> None:
    scores, truth = np.append(SCORES, [0.99, 0.01]), np.append(LABELS, [255, 255])
    assert precision(scores, truth) == precision(SCORES, LABELS)


def test_sums_of_pictures_add_up() -> None:
    rules = PixelPrecisionRules(num_bins=10)
    whole = pixel_precision_sums([SCORES], [LABELS], rules)["score_histograms"]
    parts = pixel_precision_sums([SCORES[:3], SCORES[3:]], [LABELS[:3], LABELS[3:]], rules)["score_histograms"]  # fmt: skip
    assert whole.tolist() == parts.tolist()
    assert int(whole.sum()) == 8


def test_perfect_inverted_and_without_an_object() -> None:
    assert precision(LABELS.astype(float), LABELS) == 100.0
    assert precision(1.0 - LABELS, LABELS) == pytest.approx(50.0)
    assert math.isnan(precision(SCORES, np.zeros(8, dtype=int)))


def test_a_score_of_one_has_its_own_bin() -> None:
    counts = score_histograms(
        np.array([1.0, 0.999, 0.0]), np.array([1, 0, 0]), PixelPrecisionRules(num_bins=10)
    )
    assert counts[1].nonzero()[0].tolist() == [10]
    assert counts[0].nonzero()[0].tolist() == [0, 9]


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        (SCORES + 0.1, LABELS, "scores must lie in 0..1"),
        (SCORES * math.nan, LABELS, "scores must lie in 0..1"),
        (SCORES, LABELS * 2, "a true mask holds 0, 1 and 255 only"),
        (SCORES[:3], LABELS, "resize the scores"),
    ],
)
def test_impossible_scores_are_refused(scores: np.ndarray, truth: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision(scores, truth)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        PixelPrecisionRules(num_bins=0)
