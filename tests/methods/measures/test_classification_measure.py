"""Ranks with ties, and what is computed from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from methods.measures import classification_sums, ranks
from methods.measures.classification import ClassificationMeasure

SCORES = torch.tensor([
    [0.1, 0.5, 0.2, 0.05, 0.05, 0.1], [0.3, 0.1, 0.1, 0.2, 0.2, 0.1], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1],
    [0, 0.1, 0.2, 0.3, 0.4, 0.5],
])  # fmt: skip
LABELS = torch.tensor([1, 4, 3, 0])


def test_four_samples_of_six_classes() -> None:
    assert ranks(SCORES, LABELS).tolist() == [0, 2, 3, 5]
    sums = classification_sums(SCORES, LABELS)
    assert (float(sums["top1"]) / 4, float(sums["top5"]) / 4) == (25.0, 75.0)
    measure = ClassificationMeasure()
    measure.update(list("abcd"), SCORES, LABELS)
    assert measure.compute() == {"top1": 25.0, "top5": 75.0, "mean_class_top1": 25.0, "num_nonfinite": 0.0}


def test_ties_never_count_for_the_sample_beyond_its_place() -> None:
    """All equal, as a network that has learnt nothing: only the first class is right, and only five are in top5."""
    scores = torch.zeros(7, 7)
    sums = classification_sums(scores, torch.arange(7))
    assert (float(sums["top1"]), float(sums["top5"])) == (100.0, 500.0)


def test_ranks_equal_a_plain_loop_and_argmax() -> None:
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 6, (200, 9)) / 5, random.integers(0, 9, 200)
    found = ranks(torch.from_numpy(scores), torch.from_numpy(labels))
    for row, label, rank in zip(scores.tolist(), labels.tolist(), found.tolist(), strict=True):
        order = sorted(range(9), key=lambda number: (-row[number], number))
        assert order.index(label) == rank
    assert torch.equal(found == 0, torch.from_numpy(scores.argmax(axis=1) == labels))


@pytest.mark.parametrize(("value", "wrong"), [(math.nan, True), (math.inf, True), (-math.inf, False)])
@pytest.mark.parametrize("place", [1, 2])
def test_a_sample_with_a_score_that_is_no_number_is_wrong(value: float, wrong: bool, place: int) -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    scores[0, 2] = value
    if place == 1:
        scores[0, 1], scores[0, 2] = scores[0, 2].clone(), scores[0, 1].clone()
    labels = torch.tensor([place, 1])
    measure = ClassificationMeasure()
    measure.update(["a", "b"], scores, labels)
    found = measure.compute()
    assert found["num_nonfinite"] == wrong
    assert found["top5"] == (50.0 if wrong else 100.0)
    assert float(classification_sums(scores, labels)["top5"]) == 2 * found["top5"]


def test_rare_classes_weigh_as_much_in_the_mean_over_classes() -> None:
    scores, labels = torch.eye(4)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 2])
    measure = ClassificationMeasure()
    measure.update(list("abcd"), scores, labels)
    found = measure.compute()
    assert (found["top1"], found["mean_class_top1"]) == (75.0, 50.0)


def test_ranks_of_several_networks_at_once() -> None:
    both = torch.stack([SCORES, SCORES.flip(1)], dim=1)
    found = ranks(both, LABELS[:, None].expand(4, 2))
    assert found[:, 0].tolist() == [0, 2, 3, 5]
    assert found[:, 1].tolist() == ranks(SCORES.flip(1), LABELS).tolist()
