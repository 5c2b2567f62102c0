"""Masks from polygons and run lengths, against pycocotools and hand-counted pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from methods.data.base import DataError
from methods.grounding.annotation_masks import check_segmentation, decode_mask, union
from methods.grounding.boxes import box_of_mask

FIRST = [1, 1, 5, 1, 5, 4, 1, 4]
SECOND = [3, 2, 8, 2, 8, 6, 3, 6]
COUNTS = [9, 3, 5, 3, 5, 5, 3, 5, 4, 4, 4, 4, 4, 4, 18]
BOTH: dict[str, Any] = {
    "polygons": [FIRST, SECOND],
    "list of counts": {"size": [8, 10], "counts": COUNTS},
    "compressed": {"size": [8, 10], "counts": "935002N01O0000>"},
}


@pytest.mark.parametrize("spelling", sorted(BOTH))
def test_three_spellings_of_one_mask(spelling: str) -> None:
    assert check_segmentation(BOTH[spelling], 8, 10, "annotation 101") == 0
    mask = decode_mask(BOTH[spelling], 8, 10)
    assert mask.sum() == 28
    assert box_of_mask(mask) == (1, 1, 8, 6)
    assert coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] == b"935002N01O0000>"


@pytest.mark.parametrize(
    ("polygons", "options", "pixels"),
    [
        ([FIRST], {}, 12),
        ([FIRST, SECOND], {"overlap": "sum_is_one"}, 24),
        ([FIRST], {"rasteriser": "pil"}, 20),
        ([[1.5, 1.5, 4.5, 1.5, 4.5, 4.5, 1.5, 4.5]], {}, 9),
        ([[2, 2, 8, 2, 5, 7]], {}, 14),
        ([[2, 2, 8, 2, 5, 7]], {"rasteriser": "pil"}, 24),
        ([[1, 1, 5, 4], FIRST], {}, 12),
        ([FIRST, [1, 1, 5, 4]], {}, 12),
    ],
)
def test_pixels_of_polygons(polygons: list[list[float]], options: dict[str, Any], pixels: int) -> None:
    assert decode_mask(polygons, 8, 10, **options).sum() == pixels


def test_short_polygons_are_counted() -> None:
    assert check_segmentation([[1, 1, 5, 4], FIRST, []], 8, 10, "annotation 7") == 2


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 4]], "annotation 7: none of its 1 polygons has three points"),
        ([], "annotation 7: none of its 0 polygons"),
        ([[1, 1, 5, 1, 5, 4, 1]], "7 coordinates, expected pairs"),
        ({"size": [10, 8], "counts": COUNTS}, r"its mask is of size \(10, 8\) \(height, width\), but the picture of \(8, 10\)"),
        ({"size": [8, 10]}, "its mask is of size"),
        ("935002N01O0000>", "neither polygons nor run lengths"),
        (None, "neither polygons nor run lengths"),
    ],
)  # fmt: skip
def test_masks_that_cannot_be_are_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_segmentation(segmentation, 8, 10, "annotation 7")


def test_an_empty_mask_survives_the_round_trip() -> None:
    empty = coco.encode(np.asfortranarray(np.zeros((8, 10), dtype=np.uint8)))
    mask = decode_mask(empty, 8, 10)
    assert mask.shape == (8, 10)
    assert not mask.any()
    assert not union([], 8, 10).any()


def test_union_counts_no_pixel_twice() -> None:
    parts = [decode_mask([polygon], 8, 10) for polygon in (FIRST, SECOND)]
    assert union(parts, 8, 10).sum() == 28
