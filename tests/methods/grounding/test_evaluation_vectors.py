"""Facts about masks, boxes and thresholds on which evaluators disagree, each with the number that it makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from grounding_masks import NOTHING, batch_of, output_of, random_pairs, rectangles
from pycocotools import mask as coco
from torchvision.ops import masks_to_boxes

from methods.grounding.annotation_masks import decode_mask
from methods.grounding.boxes import box_iou, box_of_mask
from methods.grounding.evaluator import Row as ExpressionRow
from methods.grounding.evaluator import _judged
from methods.grounding.metrics import grounding_sums, summarise_grounding, sums_of
from methods.grounding.protocols import PROTOCOLS, EvaluationProtocol

FIRST, SECOND = [1, 1, 5, 1, 5, 4, 1, 4], [3, 2, 8, 2, 8, 6, 3, 6]


def scores(masks: list[torch.Tensor], truths: list[torch.Tensor], flags: list[int] | None = None, empty: list[bool] | None = None) -> dict[str, float]:  # fmt: skip
    return summarise_grounding(grounding_sums(output_of(masks, flags), batch_of(truths, empty)))


def row(sample_id: str, intersection: int, union: int) -> ExpressionRow:
    return ExpressionRow(
        sample_id=sample_id, picture=0, intersection=intersection, union=union, predicted=union, truth=union,
        is_empty=False, flag=False, box_iou=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("comparison", "reached"),
    [
        ("at_least", [True] * 5),
        ("above", [False] * 5),
        ("above_float32", [False, False, True, False, True]),
    ],
)
@pytest.mark.parametrize("size", [10, 230_400])
def test_ratios_of_exactly_five_to_nine_tenths(comparison: str, reached: list[bool], size: int) -> None:
    rules = EvaluationProtocol(name="x", comparison=comparison)  # type: ignore[arg-type]
    for tenth, expected in zip((5, 6, 7, 8, 9), reached, strict=True):
        sums = sums_of(_judged([row("a", tenth * size // 10, size)]), rules)
        assert bool(sums[f"pr{10 * tenth}"]) is expected


def test_a_small_number_in_the_denominator_fails_exact_ratios() -> None:
    judged = _judged([row("a", 2, 4)])
    for comparison in ("at_least", "above", "above_float32"):
        rules = EvaluationProtocol(name="x", comparison=comparison, epsilon=1e-6)  # type: ignore[arg-type]
        sums = sums_of(judged, rules)
        assert not sums["pr50"]
        assert int(sums["iou"]) / 2**32 == pytest.approx(0.49999988, abs=1e-8)


@pytest.mark.parametrize("protocol", ["ours", "lisa"])
def test_pixels_of_a_whole_split_do_not_overflow(protocol: str) -> None:
    """10,834 expressions at 480 x 480, as in a validation split: 2,496,153,600 pixels of union."""
    num, pixels = 10_834, 480 * 480
    judged = _judged([row(f"{number:05}", pixels - (number % 2), pixels) for number in range(num)])
    sums = sums_of(judged, PROTOCOLS[protocol])
    assert int(sums["union"]) == 2_496_153_600 > 2**31
    assert sums["union"].dtype == torch.int64
    assert int(sums["intersection"]) == 2_496_153_600 - num // 2
    assert summarise_grounding(sums)["oiou"] == pytest.approx(100 - 100 * (num // 2) / 2_496_153_600, rel=1e-13)  # fmt: skip


def test_overall_iou_is_the_mean_when_all_unions_are_equal() -> None:
    truths = [rectangles((0, 0, 4, 6)) for _ in range(4)]
    masks = [rectangles((0, 0, rows, 6)) for rows in (1, 2, 3, 4)]
    found = scores(masks, truths)
    assert found["oiou"] == pytest.approx(found["miou"], abs=1e-7) == pytest.approx(62.5)


def test_overall_iou_lies_between_the_smallest_and_the_largest() -> None:
    for seed in range(10):
        masks, truths, _ = random_pairs(20, seed=seed)
        singles = [scores([mask], [truth])["miou"] for mask, truth in zip(masks, truths, strict=True)]
        assert min(singles) <= scores(masks, truths)["oiou"] <= max(singles)


def test_a_model_that_always_says_none() -> None:
    truths, empty = [rectangles((0, 0, 2, 2)), NOTHING, rectangles((1, 1, 3, 3))], [False, True, False]
    found = scores([NOTHING] * 3, truths, [1, 1, 1], empty)
    assert (found["n_acc"], found["t_acc"], found["miou"], found["oiou"], found["ciou"]) == (100, 0, 0, 0, 0)
    assert found["giou"] == pytest.approx(100 / 3)
    perfect = scores(truths, truths, [0, 1, 0], empty)
    assert set(perfect.values()) == {100.0}


def test_flipping_both_in_either_direction_changes_nothing() -> None:
    masks, truths, empty = random_pairs(20, seed=3)
    plain = scores(masks, truths, None, empty)
    for axis in (0, 1):
        flipped = scores([mask.flip(axis) for mask in masks], [truth.flip(axis) for truth in truths], None, empty)  # fmt: skip
        assert repr(flipped) == repr(plain)


def test_overlap_with_a_crowd_divides_by_the_detection() -> None:
    first, both = (coco.merge(coco.frPyObjects(parts, 8, 10)) for parts in ([FIRST], [FIRST, SECOND]))
    assert coco.iou([first], [both], [1])[0, 0] == 1.0
    assert coco.iou([first], [both], [0])[0, 0] == pytest.approx(12 / 28)
    masks = [torch.from_numpy(decode_mask(parts, 8, 10)) for parts in ([FIRST], [FIRST, SECOND])]
    assert scores(masks[:1], masks[1:])["miou"] == pytest.approx(100 * 12 / 28, abs=1e-7)
    assert scores([NOTHING], [NOTHING])["miou"] == 0.0


def test_the_last_column_of_other_libraries_is_one_less() -> None:
    mask = rectangles((2, 3, 6, 8), sides=(8, 10))
    last = masks_to_boxes(mask[None])[0].tolist()
    x, y, width, height = coco.toBbox(coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8))))
    assert last == [3, 2, 7, 5]
    ours = box_of_mask(mask.numpy())
    assert ours == (x, y, x + width, y + height) == (last[0], last[1], last[2] + 1, last[3] + 1)
    assert box_iou(np.array([last]), np.array([ours]))[0, 0] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("other", "half_open", "inclusive"),
    [
        ((0, 0, 10, 5), 0.5, 0.545455),
        ((5, 0, 15, 10), 1 / 3, 0.375),
        ((1, 1, 11, 11), 0.680672, 0.704225),
        ((2, 2, 12, 12), 0.470588, 0.503106),
    ],
)
def test_counting_the_last_pixel_makes_boxes_right(other: tuple[int, ...], half_open: float, inclusive: float) -> None:  # fmt: skip
    boxes, grown = np.array([[0, 0, 10, 10], other]), np.array([0, 0, 1, 1])
    assert box_iou(boxes[:1], boxes[1:])[0, 0] == pytest.approx(half_open, abs=1e-6)
    assert box_iou(boxes[:1] + grown, boxes[1:] + grown)[0, 0] == pytest.approx(inclusive, abs=1e-6)


def test_no_target_entries_alone_have_no_classic_number() -> None:
    found = scores([NOTHING], [NOTHING], [1], [True])
    assert math.isnan(found["miou"])
    assert math.isnan(found["t_acc"])
    assert (found["giou"], found["n_acc"]) == (100.0, 100.0)
