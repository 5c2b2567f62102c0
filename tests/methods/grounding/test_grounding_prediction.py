"""One picture and some texts: masks at the picture's size, as the metrics would judge them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from methods.data.base import DataError
from methods.grounding.annotation_masks import decode_mask, encode_mask
from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.fit import Fit, fitted_photo
from methods.grounding.prediction import MAX_BATCH, Grounder, Prediction
from methods.grounding.shapes_ref import ShapesRef
from methods.grounding.vocabulary import WordVocabulary, vocabulary_from

WORDS = ("mug", "red", "the")
UNKNOWN = 4


class Left(nn.Module):
    """Says that bright pixels are meant; texts with an unknown word name nothing."""

    def __init__(self, *, boxes: bool = False, empty_head: bool = False) -> None:
        super().__init__()
        self.with_boxes, self.with_empty = boxes, empty_head
        self.batches: list[GroundingBatch] = []

    def forward(self, batch: GroundingBatch) -> GroundingOutput:
        self.batches.append(batch)
        logits = 4 * batch.images[:, :1]
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.2]]).expand(len(logits), -1) if self.with_boxes else None
        unknown = (batch.token_ids == UNKNOWN).any(dim=1)
        empty = (4 * unknown.float() - 2) if self.with_empty else None
        return GroundingOutput(mask_logits=logits, pixel_embed=logits, sentence_embed=logits, boxes=boxes, empty_logit=empty)  # fmt: skip


def grounder(network: nn.Module, protocol: str = "ours", **changes: Any) -> Grounder:
    source = ShapesRef(image_size=16, protocol=protocol, text_length=9)
    data = source.load()
    vocabulary = WordVocabulary(WORDS)
    task = type(data.task())(image_size=16, text_length=5, vocabulary_size=len(vocabulary), start_id=1, end_id=3, pad_id=0, mask_id=2, protocol=protocol)  # fmt: skip
    described = {**data.described(), "vocabulary": vocabulary.described(), **changes}
    return Grounder(network, task, described, torch.device("cpu"))


def picture(height: int = 40, width: int = 80) -> np.ndarray:
    """Dark, with a bright left upper quarter."""
    pixels = np.full((height, width, 3), 30, np.uint8)
    pixels[: height // 2, : width // 2] = 220
    return pixels


def one(found: Grounder, text: str = "the red mug", pixels: np.ndarray | None = None) -> Prediction:
    (prediction,) = found.predict(picture() if pixels is None else pixels, [text])
    return prediction


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_masks_and_boxes_have_the_size_of_the_picture(fit: Fit) -> None:
    network = Left()
    found = one(grounder(network, fit=fit))
    truth = picture()[..., 0] > 127
    assert found.mask.shape == (40, 80)
    assert (found.mask & truth).sum() / (found.mask | truth).sum() > 0.85
    left, top, right, bottom = found.box
    assert (left, top) == (0, 0)
    assert abs(right - 40) + abs(bottom - 20) <= 4
    assert (found.box_from, found.names_nothing, found.no_target_probability) == ("mask", False, None)
    (batch,) = network.batches
    square = fitted_photo(picture(), 16, fit, (0.5, 0.5, 0.5)).copy()
    torch.testing.assert_close(batch.images[0], (torch.tensor(square) / 255 - 0.5) / 0.5)
    assert batch.original_sizes.tolist() == [[40, 80]]


@pytest.mark.parametrize(
    ("fit", "box"), [("stretch", (20, 16, 60, 24)), ("letterbox", (20, 12, 60, 28))]
)  # fmt: skip
def test_a_box_head_is_asked_first(fit: Fit, box: tuple[int, ...]) -> None:
    found = one(grounder(Left(boxes=True), fit=fit))
    assert found.box_from == "box head"
    assert found.box == pytest.approx(box)


def test_texts_go_through_in_batches_and_keep_their_order() -> None:
    network = Left()
    texts = ["red " * number + "mug" for number in range(1, 3)] * 6
    found = list(grounder(network).predict(picture(), texts))
    assert [item.text for item in found] == texts
    assert [len(batch.images) for batch in network.batches] == [MAX_BATCH, len(texts) - MAX_BATCH]


@pytest.mark.parametrize(
    ("text", "unknown", "num_left_out"),
    [
        ("the red mug", (), 0),
        ("The RED mug!", (), 0),
        ("the blue mug, blue zebra", ("blue", "zebra"), 2),
        ("the red mug the red mug", (), 3),
    ],
)
def test_what_the_network_did_not_read_is_told(text: str, unknown: tuple[str, ...], num_left_out: int) -> None:  # fmt: skip
    network = Left()
    found = one(grounder(network), text)
    assert found.unknown_words == unknown
    assert found.num_tokens_left_out == num_left_out
    ids = network.batches[0].token_ids[0].tolist()
    assert ids[0] == 1
    assert 3 in ids  # the end token is kept


@pytest.mark.parametrize("text", ["", "  ", "?!"])
def test_an_empty_text_is_refused_before_anything_is_computed(text: str) -> None:
    network = Left()
    with pytest.raises(DataError, match="is empty"):
        list(grounder(network).predict(picture(), ["mug", text]))
    assert network.batches == []


@pytest.mark.parametrize(
    ("protocol", "num_pixels_left"), [("ours", True), ("deployed", False), ("area", True)]
)  # fmt: skip
def test_what_names_nothing_is_as_the_protocol_has_it(protocol: str, num_pixels_left: bool) -> None:
    found = one(grounder(Left(empty_head=True), protocol), "zebra")
    assert found.no_target_probability == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert found.names_nothing == (protocol != "area")
    assert bool(found.mask.any()) == num_pixels_left
    assert any(found.box) == num_pixels_left
    known = one(grounder(Left(empty_head=True), protocol))
    assert not known.names_nothing
    assert known.no_target_probability == pytest.approx(torch.tensor(-2.0).sigmoid().item())


def test_an_empty_mask_names_nothing_where_no_head_can_say_so() -> None:
    found = one(grounder(Left()), pixels=np.zeros((10, 20, 3), np.uint8))
    assert found.names_nothing
    assert found.box == (0, 0, 0, 0)


def test_the_threshold_is_that_of_the_protocol() -> None:
    grey = np.full((8, 8, 3), 120, np.uint8)  # probability 0.44
    assert not one(grounder(Left()), pixels=grey).mask.any()
    assert one(grounder(Left(), "cris"), pixels=grey).mask.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": {"tokenizer": "words", "words": ["mug"]}}, "has 6 entries, but the network was trained with 8"),
        ({"vocabulary": {}}, "not described: KeyError"),
        ({"normalisation": None}, "not described: TypeError"),
        ({"fit": "crop"}, "fitted by 'crop', which is none of stretch, letterbox"),
    ],
)  # fmt: skip
def test_an_incomplete_description_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        grounder(Left(), **changes)


def test_a_vocabulary_comes_back_from_its_description() -> None:
    vocabulary = WordVocabulary(WORDS)
    assert vocabulary_from(vocabulary.described()) == vocabulary


@pytest.mark.parametrize("fill", ["none", "all", "some"])
def test_run_lengths_give_the_same_mask_back(fill: str) -> None:
    mask = {"none": np.zeros((7, 5), bool), "all": np.ones((7, 5), bool), "some": np.arange(35).reshape(7, 5) % 3 == 0}[fill]  # fmt: skip
    encoded = encode_mask(mask)
    assert encoded["size"] == [7, 5]
    assert isinstance(encoded["counts"], str)
    assert np.array_equal(decode_mask(encoded, 7, 5), mask)
