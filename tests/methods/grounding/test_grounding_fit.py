"""Pictures in the square of the input: stretched or letterboxed, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grounding_masks import batch_of, output_of, rectangles
from pycocotools import mask as coco
from refer_files import FIRST, instances, write_original

from methods.data.base import Augment, StreamSettings
from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.fit import fitted_box, fitted_mask, fitted_photo, frame_of, picture_corners
from methods.grounding.metrics import grounding_sums, summarise_grounding
from methods.grounding.refer import Refer
from methods.grounding.source import not_default


def original(root: Path, **settings: Any) -> Refer:
    return Refer(**{"root": str(root), "collection": "refcoco", "test_split": "test", "image_size": 32, **settings})  # fmt: skip


@pytest.mark.parametrize(
    ("height", "width", "fit", "frame"),
    [
        (427, 640, "letterbox", (69, 0, 278, 416)),
        (640, 427, "letterbox", (0, 69, 416, 278)),
        (50, 50, "letterbox", (0, 0, 416, 416)),
        (1, 900, "letterbox", (207, 0, 1, 416)),
        (427, 640, "stretch", (0, 0, 416, 416)),
    ],
)
def test_where_a_picture_lies(height: int, width: int, fit: Any, frame: tuple[int, ...]) -> None:
    assert frame_of(height, width, 416, fit) == frame


def test_margins_have_the_colour_of_nothing() -> None:
    photo = np.full((8, 16, 3), 200, dtype=np.uint8)
    square = fitted_photo(photo, 32, "letterbox", (0.5, 0.25, 0.0))
    assert square.shape == (3, 32, 32)
    assert square[:, 0, 0].tolist() == [128, 64, 0]
    assert (square[:, 8:24] == 200).all()
    assert (fitted_photo(photo, 32, "stretch", (0.5, 0.25, 0.0)) == 200).all()


def test_masks_and_boxes_lie_where_their_picture_does() -> None:
    mask = rectangles((2, 4, 6, 12), sides=(8, 16)).numpy()
    square = fitted_mask(mask, 32, "letterbox")
    assert square.sum() == 4 * mask.sum()
    assert square[12:20, 8:24].all()
    box = fitted_box((0.5, 0.5, 0.5, 0.5), 8, 16, 32, "letterbox")
    assert box == (0.5, 0.5, 0.5, 0.25)
    frame = torch.tensor(frame_of(8, 16, 32, "letterbox"))
    back = picture_corners(torch.tensor([[8.0, 12.0, 24.0, 20.0], [0.0, 0.0, 32.0, 32.0]]), frame, 8, 16)
    assert back.tolist() == [[4.0, 2.0, 12.0, 6.0], [0.0, 0.0, 16.0, 8.0]]


def test_polygons_are_scaled_before_they_become_pixels(tmp_path: Path) -> None:
    """The edge of a triangle is smooth at the size of the input, and in blocks of 3 x 4 pixels where it was enlarged."""
    content, triangle = instances(), [2, 2, 8, 2, 5, 7]
    for annotation in content["annotations"]:
        annotation["segmentation"] = [FIRST, triangle]
    root = write_original(tmp_path, content=content)
    scaled, enlarged = (original(root, protocol=name).load().test.sample(0).mask for name in ("rela", "ours"))
    polygons = [
        (np.array(points) * np.resize([3.2, 4.0], len(points))).tolist() for points in (FIRST, triangle)
    ]
    expected = coco.decode(coco.merge(coco.frPyObjects(polygons, 32, 32))).astype(bool)
    np.testing.assert_array_equal(scaled, expected)
    assert 10 < (scaled != enlarged).sum() < 60
    run_lengths = coco.encode(np.asfortranarray(np.eye(8, 10, dtype=np.uint8)))
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"size": [8, 10], "counts": run_lengths["counts"].decode()}
    packed = write_original(tmp_path / "packed", content=content)
    same = (original(packed, protocol=name).load().test.sample(0).mask for name in ("rela", "ours"))
    np.testing.assert_array_equal(*same)


def test_cubic_probabilities_are_not_bilinear_logits() -> None:
    """Third of four pixels: the logit is 0.25 * 10 - 0.75 * 4, the probability 0.018 + 0.98 * 0.227."""
    logits = torch.tensor([10.0, -4.0]).view(1, 1, 1, 2)
    output = GroundingOutput(mask_logits=logits, pixel_embed=logits, sentence_embed=logits[0, 0])
    truth = torch.tensor([[1, 1, 1, 0]], dtype=torch.uint8)
    batch = batch_of([torch.zeros(1, 2, dtype=torch.bool)])._replace(
        original_masks=(truth,), original_sizes=torch.tensor([[1, 4]])
    )
    assert summarise_grounding(grounding_sums(output, batch, protocol="cris"))["miou"] == pytest.approx(200 / 3, abs=1e-3)  # fmt: skip
    # The logit of a probability of 0.35 is -0.62, of one half 0: with bilinear logits the third pixel is in the first only.
    assert summarise_grounding(grounding_sums(output, batch))["miou"] == pytest.approx(200 / 3)
    sure = GroundingOutput(mask_logits=logits + 0.6, pixel_embed=logits, sentence_embed=logits[0, 0])
    assert summarise_grounding(grounding_sums(sure, batch))["miou"] == 100.0
    assert summarise_grounding(grounding_sums(sure, batch, protocol="cris"))["miou"] == pytest.approx(200 / 3, abs=1e-3)  # fmt: skip


def evaluation_batch(data: Any) -> GroundingBatch:
    streams = data.streams(StreamSettings(
        batch_size=2, evaluation_batch_size=4, seed=0, augment=Augment(flip=False), validation=0.1,
        device=torch.device("cpu"), rank=0, num_workers=1,
    ))  # fmt: skip
    assert next(iter(streams["training"].batches(0))).frames is None
    return next(iter(streams["test"].batches(0)))


@pytest.mark.parametrize("protocol", ["ours", "cris", "lavt"])
def test_a_letterboxed_network_is_judged_on_its_picture_only(tmp_path: Path, protocol: str) -> None:
    """Right inside the picture and wrong all over the margin: at the size of the photo the margin is not seen."""
    data = original(write_original(tmp_path), fit="letterbox", protocol=protocol).load()
    batch = evaluation_batch(data)
    assert batch.frames is not None
    assert batch.frames.tolist() == [[3, 0, 26, 32]] * 3
    inside = batch.masks[:, 0] > 0.5
    assert not inside[:, :3].any()
    assert not inside[:, 29:].any()
    wild = inside.clone()
    wild[:, :3] = wild[:, 29:] = True
    output = output_of(list(wild))
    boxed = GroundingOutput(mask_logits=output.mask_logits, pixel_embed=output.pixel_embed, sentence_embed=output.sentence_embed, boxes=batch.boxes)  # fmt: skip
    found = summarise_grounding(grounding_sums(boxed, batch, protocol=protocol))
    assert found["rec50"] == 100.0
    if protocol == "lavt":
        assert found["miou"] < 60  # judged in the square, margin and all
    else:
        assert found["miou"] > 85


def test_the_fingerprint_follows_fit_and_the_revision_of_the_protocol(tmp_path: Path) -> None:
    root = write_original(tmp_path)
    assert dict(not_default(original(root))).keys() == {"root", "collection", "test_split", "image_size"}
    assert dict(not_default(original(root, protocol="rela")))["protocol_version"] == 2
    assert "protocol_version" not in dict(not_default(original(root, protocol="lavt")))
    assert original(root, fit="letterbox").fingerprint() != original(root).fingerprint()
    with pytest.raises(ValueError, match="fit must be one of stretch, letterbox, got 'crop'"):
        original(root, fit="crop")
