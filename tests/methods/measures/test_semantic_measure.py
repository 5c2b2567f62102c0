"""Semantic segmentation against hand-counted vectors, a plain loop and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from methods.measures.semantic import (
    SEMANTIC_METRICS,
    SemanticMeasure,
    SemanticRules,
    class_ious,
    confusions,
    predicted_labels,
    semantic_sums,
    summarise_semantic,
)

RULES = SemanticRules(num_classes=4)
TRUTH = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 255], [2, 2, 255, 255]])
PREDICTED = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [2, 1, 3, 2]])


def metrics(predicted: Tensor, truth: Tensor, rules: SemanticRules = RULES) -> dict[str, float]:
    return summarise_semantic(semantic_sums(predicted, truth, rules), rules)


def random_maps(count: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(seed)
    truth = random.integers(0, num_classes, (count, 7, 9))
    predicted = np.where(
        random.random(truth.shape) < 0.6, truth, random.integers(0, num_classes, truth.shape)
    )
    truth[random.random(truth.shape) < 0.1] = 255
    return torch.from_numpy(predicted), torch.from_numpy(truth)


def test_three_rows_of_four_pixels() -> None:
    confusion = confusions(PREDICTED[None], TRUTH[None], RULES)[0]
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[2, 1, 0, 0], [1, 3, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert class_ious(confusion).tolist() == pytest.approx([0.5, 0.5, 0.5, math.nan], nan_ok=True)
    found = metrics(PREDICTED[None], TRUTH[None])
    expected = {"miou": 50, "pixel_accuracy": 600 / 9, "mean_accuracy": 63.8888889, "frequency_weighted_iou": 50, "picture_miou": 50}  # fmt: skip
    assert found == pytest.approx(expected)
    assert tuple(found) == SEMANTIC_METRICS


def test_absent_classes_may_count_zero() -> None:
    rules = SemanticRules(num_classes=4, absent_classes="zero")
    assert metrics(PREDICTED[None], TRUTH[None], rules)["miou"] == pytest.approx(37.5)


def test_what_is_predicted_where_nothing_is_judged_is_no_mistake() -> None:
    """Were it one, class 3 would be there with an overlap of 0, and the mean 37.5."""
    elsewhere = torch.where(TRUTH == 255, 200, PREDICTED)
    assert metrics(elsewhere[None], TRUTH[None]) == metrics(PREDICTED[None], TRUTH[None])


def test_the_data_set_is_not_the_mean_of_its_pictures() -> None:
    rules = SemanticRules(num_classes=2)
    truth, predicted = (
        torch.tensor([[[0, 0, 0, 1]], [[1, 1, 1, 1]]]),
        torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 0]]]),
    )
    found = metrics(predicted, truth, rules)
    assert (found["miou"], found["picture_miou"]) == (pytest.approx(60.0), pytest.approx(37.5))


def test_a_plain_loop_and_scikit_learn_give_the_same() -> None:
    predicted, truth = random_maps(200, 6)
    rules = SemanticRules(num_classes=6)
    counts = [[0] * 6 for _ in range(6)]
    for guess, label in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if label != 255:
            counts[label][guess] += 1
    totals = semantic_sums(predicted, truth, rules)
    assert totals["confusion"].tolist() == counts
    judged = truth != 255
    assert counts == confusion_matrix(truth[judged], predicted[judged], labels=range(6)).tolist()
    ious = []
    for number in range(6):
        row, column = sum(counts[number]), sum(line[number] for line in counts)
        ious.append(counts[number][number] / (row + column - counts[number][number]))
    assert summarise_semantic(totals, rules)["miou"] == pytest.approx(100 * sum(ious) / 6, rel=1e-12)


def test_sums_of_batches_are_the_sums_of_the_whole() -> None:
    predicted, truth = random_maps(30, 6, seed=1)
    rules = SemanticRules(num_classes=6)
    whole = semantic_sums(predicted, truth, rules)
    parts = [
        semantic_sums(predicted[rows], truth[rows], rules) for rows in (range(0, 30, 2), range(1, 30, 2))
    ]
    for name, total in whole.items():
        assert torch.equal(parts[0][name] + parts[1][name], total)
    assert int(whole["count"]) == 30


def test_totals_go_beyond_two_to_the_31() -> None:
    totals = semantic_sums(PREDICTED[None], TRUTH[None], RULES)
    many = {name: value * 2**33 for name, value in totals.items()}
    many["confusion"][0, 0] += 1
    assert many["confusion"].dtype == torch.int64
    found = summarise_semantic(many, RULES)
    assert found["pixel_accuracy"] == pytest.approx(100 * (6 * 2**33 + 1) / (9 * 2**33 + 1), rel=1e-15)
    assert found["pixel_accuracy"] > 600 / 9


def test_renaming_classes_renames_the_report_and_unjudged_pictures_change_nothing() -> None:
    predicted, truth = random_maps(5, 6, seed=2)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    renamed = torch.cat([order, torch.full((250,), 255)])  # 255 stays 255
    plain, moved = (
        SemanticMeasure(SemanticRules(num_classes=6)),
        SemanticMeasure(SemanticRules(num_classes=6)),
    )
    names = list("abcde")
    plain.update(names, predicted, truth)
    moved.update(names, order[predicted], renamed[truth])
    labels = [f"class {number}" for number in range(6)]
    report, other = (
        plain.report(labels),
        moved.report([labels[order.tolist().index(number)] for number in range(6)]),
    )
    assert report == other
    assert len(set(report.values())) == 6
    before = plain.compute()
    plain.update(["empty"], predicted[:1], torch.full_like(truth[:1], 255))
    assert plain.compute() == before


def test_perfect_and_wrong_everywhere() -> None:
    _, truth = random_maps(5, 6, seed=3)
    rules = SemanticRules(num_classes=6)
    perfect = metrics(truth.clamp(max=5), truth, rules)
    assert set(perfect.values()) == {100.0}
    wrong = metrics((truth + 1) % 6, truth, rules)
    assert set(wrong.values()) == {0.0}


def test_logits_are_resized_and_labels_are_not() -> None:
    logits = torch.tensor([[[[4.0, 0.0]], [[0.0, 1.0]]]])
    assert predicted_labels(logits, 1, 4).tolist() == [[[0, 0, 0, 1]]]  # 4 3 1 0 against 0 .25 .75 1
    assert predicted_labels(logits, 1, 2).tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        (PREDICTED + 2, TRUTH, "judged pixels have prediction 4, expected a class in 0..3"),
        (PREDICTED - 1, TRUTH, "judged pixels have prediction -1"),
        (PREDICTED, torch.where(TRUTH == 2, 7, TRUTH), "2 judged pixels have label 7"),
        (PREDICTED[:2], TRUTH, "resize the logits"),
    ],
)
def test_impossible_maps_are_refused(predicted: Tensor, truth: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        semantic_sums(predicted[None], truth[None], RULES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_classes": 300}, "ignore_label must not be one of the 300 classes, got 255"),
        ({"num_classes": 4, "absent_classes": "nan"}, "absent_classes must be one of left_out, zero"),
    ],
)
def test_impossible_rules_of_label_maps(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SemanticRules(**settings)  # type: ignore[arg-type]
