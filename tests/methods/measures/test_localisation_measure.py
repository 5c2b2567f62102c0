"""Boxes of score maps against hand-counted vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.measures.localisation import (
    LOCALISATION_METRICS,
    LocalisationMeasure,
    LocalisedRow,
    boxes_in_view,
    judge_map,
    localisation_sums,
    localised_rows,
    summarise_localisation,
    threshold_shares,
)
from methods.measures.localisation_rules import (
    LOCALISATION_RULES,
    LocalisationRules,
    localisation_rules_named,
)
from methods.measures.score_maps import parts_by_threshold, parts_of, resized_scores, scaled_scores

TENTHS = LocalisationRules(name="ours", num_thresholds=10)
WSOL = replace(LOCALISATION_RULES["wsol"], num_thresholds=10)
COLUMNS = [0, 2, 5, 7]
"""Thresholds 0, .2, .5 and .7 of those ten."""


def painted(*rectangles: tuple[float, int, int, int, int]) -> np.ndarray:
    """A map of 8 x 10 with values on half-open rectangles ``y0, x0, y1, x1``."""
    scores = np.zeros((8, 10))
    for value, top, left, bottom, right in rectangles:
        scores[top:bottom, left:right] = value
    return scores


MAPS = [
    painted((0.4, 1, 1, 6, 6), (1.0, 2, 2, 5, 5)),
    painted((1.0, 1, 1, 4, 4), (0.6, 3, 5, 7, 9)),
    painted((1.0, 0, 0, 5, 5), (0.9, 5, 6, 8, 10)),
]
TRUTHS = [np.array([[1, 1, 6, 6]]), np.array([[5, 3, 9, 7]]), np.array([[6, 5, 9, 7]])]
"""In the benchmark's convention: the last row and column of the third map's object are outside its box."""
RIGHT = (torch.eye(3), torch.arange(3))
"""A classifier that is always right."""


def totals(rules: LocalisationRules, maps: list[np.ndarray] = MAPS, truths: list[np.ndarray] = TRUTHS) -> dict[str, Tensor]:  # fmt: skip
    return localisation_sums(localised_rows(maps, truths, *RIGHT, rules), rules, num_classes=3)


@pytest.mark.parametrize(
    ("rules", "largest", "at_30", "at_50", "at_70"),
    [
        (WSOL, [2 / 3, 2 / 3, 1 / 3, 0], [1, 1, 1, 2 / 3], [1, 1, 2 / 3, 1 / 3], [1, 1, 2 / 3, 1 / 3]),
        (TENTHS, [2 / 3, 2 / 3, 1 / 3, 0], [1, 1, 1, 2 / 3], [1, 1, 2 / 3, 1 / 3], [2 / 3, 2 / 3, 1 / 3, 0]),
    ],
    ids=["wsol", "ours"],
)
def test_shares_by_threshold(rules: LocalisationRules, largest: list[float], at_30: list[float], at_50: list[float], at_70: list[float]) -> None:  # fmt: skip
    """Half open, the third box is (6, 5, 10, 8), which overlaps its truth by exactly one half."""
    shares = threshold_shares(totals(rules))[:, COLUMNS]
    assert shares.numpy() == pytest.approx(np.array([largest, at_30, at_50, at_70]))


@pytest.mark.parametrize(("rules", "second"), [(WSOL, 100.0), (TENTHS, 100 * (1 + 1 + 2 / 3) / 3)], ids=["wsol", "ours"])  # fmt: skip
def test_best_threshold_of_the_whole_set(rules: LocalisationRules, second: float) -> None:
    found = summarise_localisation(totals(rules), rules)
    assert set(found) == set(LOCALISATION_METRICS)
    assert found["max_box_acc"] == pytest.approx(200 / 3)
    assert found["max_box_acc_v2"] == pytest.approx(second)
    assert found["best_threshold"] == 0.0


@pytest.mark.parametrize(
    ("number", "boxes"),
    [
        (0, [(1, 1, 6, 6), (1, 1, 6, 6), (2, 2, 5, 5), (2, 2, 5, 5)]),
        (1, [(5, 3, 9, 7), (5, 3, 9, 7), (5, 3, 9, 7), (1, 1, 4, 4)]),
        (2, [(0, 0, 5, 5)] * 4),
    ],
)
@pytest.mark.parametrize("quantised", [False, True])
def test_boxes_of_the_largest_part(number: int, boxes: list[tuple[int, ...]], quantised: bool) -> None:
    parts = parts_by_threshold(MAPS[number], TENTHS.thresholds, quantised=quantised)
    assert [tuple(parts[column].boxes[parts[column].largest]) for column in COLUMNS] == boxes


def overlap(first: tuple[int, ...], second: tuple[int, ...], rules: LocalisationRules) -> set[str]:
    """Which levels the box of a map that is 1 inside ``first`` reaches."""
    x0, y0, x1, y1 = first
    hits, _ = judge_map(painted((1.0, y0, x0, y1, x1)), np.array([second]), rules)
    reached = np.frombuffer(hits, dtype=np.uint8).reshape(1 + len(rules.iou_levels), -1)[1:, 0]
    return {f"{level:.4f}" for level, hit in zip(rules.iou_levels, reached, strict=True) if hit}


def test_inclusive_corners_make_small_boxes_overlap_more() -> None:
    """(1, 2, 5, 6) and (3, 1, 4, 5): 3/17 half open, 8/27 with both corners inside."""
    levels = (3 / 17, 3 / 17 + 1e-9, 8 / 27, 8 / 27 + 1e-9)
    plain = LocalisationRules(name="x", num_thresholds=1, iou_levels=levels)
    boxes = ((1, 2, 5, 6), (3, 1, 4, 5))
    assert overlap(*boxes, plain) == {f"{3 / 17:.4f}"}
    assert len(overlap(*boxes, replace(plain, inclusive_pixels=True))) == 2
    by_level = np.frombuffer(judge_map(painted((1.0, 2, 1, 6, 5)), np.array([boxes[1]]), replace(plain, inclusive_pixels=True))[0], np.uint8)  # fmt: skip
    assert by_level[1:].tolist() == [1, 1, 1, 0]


FIVE = [((3, 1, 2, 4, 5), 3, 0.8), ((1, 0, 2, 3, 4), 0, 0.7), ((2, 7, 8, 9, 1), 6, 0.9), ((5, 4, 3, 2, 1), 5, 0.45), ((6, 1, 2, 3, 4), 6, 0.5)]  # fmt: skip
"""Best classes, true class, overlap of the box."""


def five_rows() -> list[LocalisedRow]:
    """A class that is not among the five best comes sixth."""
    ranked = [(best.index(label) if label in best else 5, label, iou) for best, label, iou in FIVE]
    return [LocalisedRow(bytes(40), iou, rank, label, 10) for rank, label, iou in ranked]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (80.0, 40.0, 60.0)),
        ({"comparison": "above"}, (60.0, 20.0, 40.0)),
        ({"average": "class"}, (75.0, 37.5, 62.5)),
    ],
)
def test_five_images(changes: dict[str, str], expected: tuple[float, ...]) -> None:
    """By class: 3 and 0 are right, 6 is right twice (once by the classifier), 5 is wrong."""
    rules = replace(TENTHS, **changes)  # type: ignore[arg-type]
    found = summarise_localisation(localisation_sums(five_rows(), rules, num_classes=10), rules)
    assert tuple(found[name] for name in LOCALISATION_METRICS[:3]) == pytest.approx(expected)


def test_the_measure_is_fed_with_maps_and_scores() -> None:
    measure = LocalisationMeasure(TENTHS)
    measure.update(list("abc"), MAPS, TRUTHS, torch.eye(3)[[0, 1, 0]], torch.arange(3))
    found = measure.compute(expected="abc")
    assert found["max_box_acc"] == pytest.approx(200 / 3)
    assert (found["gt_known"], found["top1_localisation"]) == (pytest.approx(200 / 3), pytest.approx(200 / 3))
    other = LocalisationMeasure(TENTHS)
    other.update(list("abc"), MAPS, TRUTHS, torch.eye(3)[[1, 1, 0]], torch.arange(3))
    assert other.compute()["top1_localisation"] == pytest.approx(100 / 3)
    assert other.compute()["gt_known"] == pytest.approx(200 / 3)


def test_several_true_boxes_count_as_the_best_of_them() -> None:
    both = [np.concatenate([truth, [[0, 0, 5, 5]]]) for truth in TRUTHS]
    assert threshold_shares(totals(TENTHS, truths=both))[0, 0] == 1.0


def random_map(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((8, 10))


@pytest.mark.parametrize("rules", [TENTHS, WSOL], ids=["ours", "wsol"])
@pytest.mark.parametrize("factor", [1024.0, 3.7, 0.001])
def test_a_positive_factor_and_a_shift_change_nothing(rules: LocalisationRules, factor: float) -> None:
    for seed in range(5):
        plain = judge_map(random_map(seed), TRUTHS[0], rules)
        assert judge_map(factor * random_map(seed), TRUTHS[0], rules) == plain
        assert judge_map(random_map(seed) + 2.0, TRUTHS[0], rules) == plain


def test_with_one_part_per_map_largest_and_any_are_the_same() -> None:
    single = [painted((0.3, 1, 1, 7, 8), (0.6, 2, 2, 6, 6), (1.0, 3, 3, 5, 5)) for _ in range(3)]
    shares = threshold_shares(totals(TENTHS, single))
    assert torch.equal(shares[0], shares[2])
    assert 0 < shares[0].sum() < 10


@pytest.mark.parametrize("rules", [TENTHS, WSOL], ids=["ours", "wsol"])
@pytest.mark.parametrize("value", [0.0, 7.0, math.nan, math.inf])
def test_a_map_that_says_nothing_gives_no_box(rules: LocalisationRules, value: float) -> None:
    scores = random_map(0)
    scores[:] = scores if math.isnan(value) or math.isinf(value) else value
    scores[0, 0] = value
    assert not scaled_scores(scores).any()
    hits, box_iou = judge_map(scores, TRUTHS[0], rules)
    assert not any(hits)
    assert box_iou == 0.0


def test_thresholds_within_a_plateau_share_a_mask_and_equal_a_plain_loop() -> None:
    thresholds = np.arange(100) / 100
    for seed in range(3):
        scores = np.round(scaled_scores(random_map(seed)), 1)
        for tau, parts in zip(
            thresholds, parts_by_threshold(scores, thresholds, quantised=False), strict=True
        ):
            plain = parts_of(scores > tau * scores.max())
            np.testing.assert_array_equal(parts.boxes, plain.boxes)
            assert parts.largest == plain.largest


def test_parts_touch_over_corners_and_the_first_of_equals_is_the_largest() -> None:
    mask = np.zeros((8, 10), dtype=bool)
    mask[0, 0] = mask[1, 1] = True
    mask[5, 5:7] = True
    parts = parts_of(mask)
    assert parts.boxes.tolist() == [[0, 0, 2, 2], [5, 5, 7, 6]]
    assert parts.largest == 0
    assert parts_of(mask & False).boxes.tolist() == [[0, 0, 0, 0]]


def test_maps_are_resized_before_they_are_scaled() -> None:
    coarse = np.zeros((4, 4))
    coarse[1:3, 1:3] = 1.0
    fine = resized_scores(coarse, 16, 16)
    assert fine.shape == (16, 16)
    assert fine.max() > 1.0  # bicubic overshoots
    assert parts_of(scaled_scores(fine) > 0.5).boxes.tolist() == [[4, 4, 12, 12]]
    np.testing.assert_array_equal(resized_scores(coarse, 4, 4), coarse)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours", [112.0, 33.6, 224.0, 67.2]),
        ("wsol", [112.0, 33.0, 224.0, 67.0]),
        ("bas", [112.0, 22.0, 223.0, 60.0]),
    ],
)
def test_true_boxes_go_where_maps_are_compared(name: str, expected: list[float]) -> None:
    found = boxes_in_view(np.array([[50, 30, 100, 60]]), 200, 100, LOCALISATION_RULES[name])
    assert found[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_thresholds": 0}, "num_thresholds must be at least 1"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1, got 1.0"),
        ({"iou_levels": ()}, "iou_levels must be"),
        ({"iou_levels": (0.5, 1.2)}, "iou_levels must be above 0 and at most 1"),
        ({"comparison": "more"}, "comparison must be one of"),
        ({"average": "picture"}, "average must be one of image, class"),
        ({"resized_side": 200}, "resized_side 0 or at least side, got 224 and 200"),
    ],
)
def test_impossible_rules_of_boxes(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalisationRules(name="x", **settings)  # type: ignore[arg-type]


def test_unknown_rules_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'wsl' is not a set of localisation rules; did you mean 'wsol'"):
        localisation_rules_named("wsl")
    assert localisation_rules_named("bas").average == "class"


def test_a_picture_without_a_box_is_refused() -> None:
    with pytest.raises(ValueError, match="without a true box cannot be judged"):
        judge_map(MAPS[0], np.zeros((0, 4)), TENTHS)
