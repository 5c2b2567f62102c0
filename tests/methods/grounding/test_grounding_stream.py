"""Batches of expressions: order, shares, controls, flips, sizes - and how splits are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from refer_files import write_pack
from torch import Tensor

from methods.data.base import Augment, DataError, StreamSettings
from methods.grounding.contracts import GroundingBatch
from methods.grounding.expressions import Sample, controls, refuse_shared_pictures, split_by_picture
from methods.grounding.refer import Refer
from methods.grounding.shapes_ref import ShapesRef
from methods.grounding.source import GroundingData
from methods.grounding.stream import GroundingStream
from methods.grounding.vocabulary import WordVocabulary

CPU = torch.device("cpu")
SOURCE = ShapesRef(num_train=11, num_validation=7, num_test=5, image_size=24)


def settings(**changes: Any) -> StreamSettings:
    common: dict[str, Any] = {
        "batch_size": 4, "evaluation_batch_size": 3, "seed": 5, "augment": Augment(), "validation": 0.25, "device": CPU,
    }  # fmt: skip
    return StreamSettings(**common | changes)


def streams(source: Any = SOURCE, **changes: Any) -> dict[str, Any]:
    return dict(source.load().streams(settings(**changes)))


def ids(batches: Sequence[GroundingBatch]) -> list[int]:
    return [int(index) for batch in batches for index in batch.indices]


def test_shapes_and_types_of_a_batch() -> None:
    batch = next(streams()["training"].batches(0))
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in zip(batch._fields, batch, strict=True) if isinstance(value, Tensor)}  # fmt: skip
    assert kinds == {
        "images": ((4, 3, 24, 24), torch.float32), "token_ids": ((4, 12), torch.int64), "token_mask": ((4, 12), torch.bool),
        "masks": ((4, 1, 24, 24), torch.float32), "boxes": ((4, 4), torch.float32), "is_empty": ((4,), torch.bool),
        "indices": ((4,), torch.int64), "original_sizes": ((4, 2), torch.int64),
    }  # fmt: skip
    assert set(batch.masks.unique().tolist()) == {0.0, 1.0}
    assert batch.images.abs().max() <= 1
    assert (batch.token_ids[:, 0] == SOURCE.load().task().start_id).all()


def test_epochs_differ_repeat_and_can_be_entered_anywhere() -> None:
    stream = streams()["training"]
    first, again, second = (list(stream.batches(epoch)) for epoch in (0, 0, 1))
    assert stream.num_batches == len(first) == 3
    assert sorted(ids(first)) == sorted(ids(second)) == list(range(11))
    assert ids(first) == ids(again) != ids(second)
    late = list(stream.batches(0, 2))
    assert ids(late) == ids(first)[8:]
    assert torch.equal(late[0].images, first[2].images)


@pytest.mark.parametrize("split", ["training", "validation", "test"])
def test_workers_share_each_batch(split: str) -> None:
    alone = list(streams()[split].batches(1))
    shares = [list(streams(rank=rank, num_workers=2)[split].batches(1)) for rank in (0, 1)]
    for number, batch in enumerate(alone):
        for rank in (0, 1):
            if len(batch.indices) > rank and number < len(shares[rank]):
                assert torch.equal(shares[rank][number].indices, batch.indices[rank::2])
                assert torch.equal(shares[rank][number].token_ids, batch.token_ids[rank::2])
                if batch.control_ids is not None:
                    assert torch.equal(shares[rank][number].control_ids, batch.control_ids[rank::2])
    whole = alone[:2] if split == "training" else alone  # the third, of 3 rows, is too small for two workers
    assert sorted(ids(shares[0]) + ids(shares[1])) == sorted(ids(whole))


def test_a_last_batch_that_is_too_small_for_the_workers_is_dropped_in_training_only() -> None:
    both = streams(num_workers=2)
    assert (both["training"].num_batches, both["validation"].num_batches) == (2, 3)


def test_the_control_is_the_sentence_of_the_next_picture_whatever_the_batch() -> None:
    small, large = (list(streams(evaluation_batch_size=size)["validation"].batches(0)) for size in (2, 7))
    tokens = torch.cat([batch.token_ids for batch in small])
    control = torch.cat([batch.rolled().token_ids for batch in small])
    assert torch.equal(control, tokens.roll(-1, 0))
    assert torch.equal(control, large[0].control_ids)
    assert torch.equal(large[0].rolled().images, large[0].images)
    assert next(streams()["training"].batches(0)).rolled() is None


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [([0, 1, 2], [1, 2, 0]), ([0, 0, 1, 1, 2], [2, 2, 4, 4, 0]), ([3, 5, 3], [1, 2, 1]), ([4, 4], None), ([], None), ([1, 1, 2, 1], [2, 2, 3, 2])],
)  # fmt: skip
def test_controls_are_about_another_picture(pictures: list[int], expected: list[int] | None) -> None:
    found = controls(np.array(pictures, dtype=np.int64))
    assert (None if found is None else found.tolist()) == expected


def test_mirrored_pictures_have_mirrored_sentences_masks_and_boxes() -> None:
    plain, mixed = (streams(augment=Augment(flip=flip), batch_size=11)["training"] for flip in (False, True))
    before, after = next(plain.batches(0)), next(mixed.batches(0))
    assert torch.equal(before.indices, after.indices)
    flipped = torch.tensor([not torch.equal(one, other) for one, other in zip(before.images, after.images, strict=True)])  # fmt: skip
    assert 0 < flipped.sum() < 11
    assert torch.equal(after.images[flipped], before.images[flipped].flip(-1))
    assert torch.equal(after.masks[flipped], before.masks[flipped].flip(-1))
    torch.testing.assert_close(after.boxes[flipped][:, 0], 1 - before.boxes[flipped][:, 0])
    assert torch.equal(after.boxes[:, 1:], before.boxes[:, 1:])
    vocabulary = SOURCE.load().vocabulary
    assert isinstance(vocabulary, WordVocabulary)
    left, right = (vocabulary.pieces(word)[0].pop() for word in ("left", "right"))
    swapped = before.token_ids.clone()
    swapped[before.token_ids == left], swapped[before.token_ids == right] = right, left
    assert torch.equal(after.token_ids, torch.where(flipped[:, None], swapped, before.token_ids))
    assert (swapped[flipped] != before.token_ids[flipped]).any()
    assert not torch.equal(next(mixed.batches(1)).images.sort(0)[0], after.images.sort(0)[0])


class Said:
    """Expressions of one blank picture each two objects, made of a few sentences."""

    decodes_photos = False

    def __init__(self, pictures: Sequence[int], objects: Sequence[int]) -> None:
        self.pictures, self.objects = np.array(pictures), np.array(objects)

    def __len__(self) -> int:
        return len(self.pictures)

    def sentences(self, indices: np.ndarray) -> list[str]:
        return ["the red circle" for _ in indices]

    def sample_id(self, index: int) -> str:
        return f"said/{index}"

    def sample(self, index: int, *, with_original: bool = False) -> Sample:
        blank = np.zeros((24, 24), dtype=bool)
        return Sample(np.zeros((3, 24, 24), dtype=np.uint8), blank, (0, 0, 0, 0), True, (24, 24), None)


def said(**changes: Any) -> GroundingData:
    split = Said([0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 3, 4, 5])
    own: dict[str, Any] = {
        "source": SOURCE, "vocabulary": SOURCE.load().vocabulary, "train": split, "validation": None, "test": split,
    }  # fmt: skip
    return GroundingData(**own | changes)


def test_one_sentence_of_each_object_an_epoch() -> None:
    stream = said(one_sentence=True).streams(settings(validation=0.0))["training"]
    assert (stream.num_samples, stream.num_batches) == (6, 2)
    objects = np.array([0, 0, 1, 2, 2, 3, 4, 5])
    seen = set()
    for epoch in range(12):
        chosen = ids(list(stream.batches(epoch)))
        assert sorted(objects[chosen].tolist()) == list(range(6))
        seen |= set(chosen)
    assert seen == set(range(8))
    assert said().streams(settings(validation=0.0))["training"].num_samples == 8


def test_without_a_validation_split_photos_are_held_out() -> None:
    data = said()
    parts = data.streams(settings(validation=0.5))
    train, held_out = (parts[name].indices for name in ("training", "validation"))
    assert not set(data.train.pictures[train]) & set(data.train.pictures[held_out])
    assert sorted([*train, *held_out]) == list(range(8))
    assert (parts["training"].known_labels() == np.where(np.isin(np.arange(8), train), 0, -1)).all()
    others = {tuple(said().streams(settings(validation=0.5, split_seed=seed))["training"].indices) for seed in range(6)}  # fmt: skip
    assert len(others) > 1


@pytest.mark.parametrize(("fraction", "num"), [(0.0, 0), (0.01, 1), (0.5, 2), (0.99, 3)])
def test_pictures_that_are_held_out(fraction: float, num: int) -> None:
    pictures = np.array([7, 7, 8, 9, 9, 9, 11])
    kept, held_out = split_by_picture(pictures, fraction, 0)
    assert len(set(pictures[held_out].tolist())) == num
    assert not set(pictures[kept].tolist()) & set(pictures[held_out].tolist())
    assert sorted([*kept, *held_out]) == list(range(7))


def test_one_picture_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all expressions are about one picture"):
        split_by_picture(np.array([1, 1]), 0.5, 0)


def test_a_split_that_leaks_is_refused() -> None:
    refuse_shared_pictures(train=Said([0, 1], [0, 1]), val=None, test=Said([2, 2], [0, 1]))
    with pytest.raises(DataError, match="1 pictures are in split 'test' and in another, for instance 1 \\(in 'train'\\)"):  # fmt: skip
        refuse_shared_pictures(train=Said([0, 1], [0, 1]), test=Said([1, 2], [0, 1]))


def test_photos_come_at_the_size_of_the_protocol(tmp_path: Any) -> None:
    root = str(write_pack(tmp_path))
    sizes = {}
    for protocol in ("ours", "lavt"):
        source = Refer(root=root, collection="pack", image_size=16, protocol=protocol, no_target="drop")
        parts = streams(source)
        sizes[protocol] = [tuple(mask.shape) for mask in next(parts["test"].batches(0)).original_masks]
        assert next(parts["training"].batches(0)).original_masks == ()
    assert sizes == {"ours": [(8, 10)] * 3, "lavt": []}
    assert next(streams(source)["test"].batches(0)).original_sizes.tolist() == [[8, 10]] * 3
    assert next(streams()["test"].batches(0)).original_masks == ()


def test_large_pictures_are_evaluated_in_small_batches() -> None:
    large = ShapesRef(num_train=4, num_validation=4, num_test=4, image_size=2048)
    assert large.load().streams(settings(evaluation_batch_size=500))["test"].batch_size == 1
    assert SOURCE.load().streams(settings(evaluation_batch_size=500))["test"].batch_size == 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        (
            {"batch_size": 3, "num_workers": 2},
            "batch_size 3 and 11 training samples are too few for 2 worker",
        ),
        ({"rank": 2, "num_workers": 2}, "rank must lie in 0..1"),
    ],
)
def test_impossible_streams(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streams(**changes)


def test_the_example_is_a_batch_of_one_full_sentence() -> None:
    task = SOURCE.load().task()
    (example,) = task.example(CPU, torch.float64)
    assert (example.images.shape, example.images.dtype) == ((1, 3, 24, 24), torch.float64)
    assert example.token_ids[0].tolist() == [task.start_id, *[task.mask_id] * 10, task.end_id]
    assert isinstance(streams()["test"], GroundingStream)
