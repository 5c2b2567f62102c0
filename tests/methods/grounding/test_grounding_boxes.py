"""Boxes: of masks, between boxes, and sets of them matched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grounding_masks import rectangles
from torchvision.ops import box_iou as torchvision_iou
from torchvision.ops import generalized_box_iou

from methods.grounding.boxes import (
    NO_BOX,
    box_iou,
    box_of_mask,
    centred,
    corners,
    match_boxes,
    summarise_boxes,
)

TEN = (0, 0, 10, 10)


@pytest.mark.parametrize(
    ("corner", "box"),
    [
        ((2, 3, 6, 8), (3, 2, 8, 6)),
        ((1, 4, 2, 5), (4, 1, 5, 2)),
        ((0, 0, 8, 10), (0, 0, 10, 8)),
        ((0, 0, 0, 0), NO_BOX),
        ((7, 9, 8, 10), (9, 7, 10, 8)),
    ],
)
def test_box_of_a_mask_is_half_open(corner: tuple[int, ...], box: tuple[int, ...]) -> None:
    mask = rectangles(corner, sides=(8, 10)).numpy()  # type: ignore[arg-type]
    assert box_of_mask(mask) == box
    assert box_of_mask(mask, largest_component=True) == box


def test_largest_component_touches_over_corners_too() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True
    mask[5:7, 6] = True
    assert box_of_mask(mask, largest_component=True) == (0, 0, 3, 3)
    assert box_of_mask(mask) == (0, 0, 7, 7)


@pytest.mark.parametrize(
    ("other", "iou", "giou"),
    [
        ((0, 0, 10, 5), 0.5, 0.5),
        ((5, 0, 15, 10), 0.333333, 0.333333),
        ((1, 1, 11, 11), 0.680672, 0.664143),
        ((2, 2, 12, 12), 0.470588, 0.415033),
    ],
)
def test_overlap_has_no_plus_one(other: tuple[int, ...], iou: float, giou: float) -> None:
    assert box_iou(np.array([TEN]), np.array([other]))[0, 0] == pytest.approx(iou, abs=1e-6)
    assert box_iou(np.array([TEN]), np.array([other]), generalised=True)[0, 0] == pytest.approx(
        giou, abs=1e-6
    )


def test_overlap_agrees_with_torchvision() -> None:
    low, sides = np.random.default_rng(0).uniform(0, 50, (2, 40, 2))
    boxes = np.concatenate([low, low + sides + 0.1], axis=1)
    tensor = torch.from_numpy(boxes)
    np.testing.assert_allclose(box_iou(boxes, boxes), torchvision_iou(tensor, tensor).numpy())
    np.testing.assert_allclose(
        box_iou(boxes, boxes, generalised=True), generalized_box_iou(tensor, tensor).numpy()
    )
    assert box_iou(np.array([NO_BOX]), np.array([NO_BOX]))[0, 0] == 0.0


def test_centre_and_corners_are_inverse_and_clipped() -> None:
    box = (3.0, 2.0, 8.0, 6.0)
    there = torch.tensor([centred(box, 8, 10)], dtype=torch.float64)
    assert corners(there, 8, 10)[0].tolist() == pytest.approx(box)
    outside = torch.tensor([[0.5, 0.5, 2.0, 2.0]])
    assert corners(outside, 8, 10)[0].tolist() == [0, 0, 10, 8]


TWO = ((0, 0, 20, 20), (40, 40, 60, 60))


@pytest.mark.parametrize(
    ("truth", "boxes", "generalised", "f1", "says_none"),
    [
        (TWO, ((0, 0, 20, 20), (44, 44, 63, 63)), False, 1.0, False),
        (TWO, ((0, 0, 20, 20), (44, 44, 63, 63)), True, 0.5, False),
        (TWO, ((0, 0, 20, 20),), False, 2 / 3, False),
        (TWO, (*TWO, (80, 80, 90, 90)), False, 0.8, False),
        ((), (), False, 1.0, True),
        ((), TWO, False, 0.0, False),
        (TWO, (), False, 0.0, True),
    ],
)  # fmt: skip
def test_sets_of_boxes(truth: tuple, boxes: tuple, generalised: bool, f1: float, says_none: bool) -> None:
    found = match_boxes(np.array(truth), np.array(boxes), np.full(len(boxes), 0.7), generalised=generalised)
    assert found == (pytest.approx(f1), says_none)


def test_boxes_below_the_score_are_not_kept() -> None:
    assert match_boxes(np.array(TWO), np.array(TWO), np.array([0.7, 0.69])).f1 == pytest.approx(2 / 3)


def test_generalised_overlap_finds_never_more_where_targets_are_apart() -> None:
    random = np.random.default_rng(1)
    truth = np.array([[30 * number, 0, 30 * number + 20, 20] for number in range(3)])
    worse = 0
    for _ in range(100):
        boxes = truth + random.integers(-6, 7, truth.shape)
        plain = match_boxes(truth, boxes, np.ones(3)).f1
        strict = match_boxes(truth, boxes, np.ones(3), generalised=True).f1
        assert strict <= plain
        worse += strict < plain
    assert worse


def test_a_silent_model_is_always_right_about_nothing() -> None:
    nothing = np.zeros((0, 4))
    truths = [np.array(TWO), nothing, nothing, np.array(TWO)]
    silent = [match_boxes(truth, nothing, np.zeros(0)) for truth in truths]
    is_empty = [not len(truth) for truth in truths]
    assert summarise_boxes(silent, is_empty) == {"grec_precision": 50.0, "n_acc": 100.0, "t_acc": 0.0}
    perfect = [match_boxes(truth, truth, np.ones(len(truth))) for truth in truths]
    assert set(summarise_boxes(perfect, is_empty).values()) == {100.0}
