"""PhraseCut from files as published: reading, masks, and the subsets on which it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grounding_masks import batch_of, output_of
from refer_files import photo

from methods.data.base import DataError
from methods.grounding.annotation_masks import decode_mask
from methods.grounding.evaluator import Evaluator, Row
from methods.grounding.phrasecut import read_phrasecut
from methods.grounding.phrasecut_subsets import COCO_NAMES, category_ranks, subset_scores, subsets_of
from methods.grounding.refer import Refer
from methods.grounding.refer_index import Index, Reference

SQUARE = [[1, 1], [5, 1], [5, 4], [1, 4]]
TRIANGLE = [[2, 2], [8, 2], [5, 7]]
DOT = [[9, 7], [9, 7], [9, 7]]
PHRASES = {
    "train": [(1, "red dog", "dog", "attribute", [[SQUARE]]), (1, "dog", "dog", "name", [[SQUARE]]), (2, "wall", "wall", "name", [[TRIANGLE]])],
    "val": [(3, "dogs", "dog", "name", [[SQUARE], [TRIANGLE]])],
    "miniv": [(4, "wall left of dog", "wall", "relation", [[SQUARE, TRIANGLE]])],
    "test": [(5, "dog", "dog", "name", [[SQUARE]]), (5, "lamp", "lamp", "verbose", [[DOT]] * 5)],
}  # fmt: skip


def tasks(split: str) -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"{picture}__{number}", "image_id": picture, "ann_ids": [7] * len(polygons), "phrase": phrase,
            "instance_boxes": [[1, 1, 4, 3]] * len(polygons), "Polygons": polygons,
            "phrase_structure": {"name": name, "attributes": [], "relation_ids": [], "type": kind},
        }
        for number, (picture, phrase, name, kind, polygons) in enumerate(PHRASES[split])
    ]  # fmt: skip


def write(root: Path, **changed: Any) -> Path:
    """``ROOT/phrasecut`` with its files; ``changed`` replaces the tasks of a split."""
    place = root / "phrasecut"
    (place / "images").mkdir(parents=True)
    for split in PHRASES:
        (place / f"refer_{split}.json").write_text(json.dumps(changed.get(split, tasks(split))))
    pictures = [{"image_id": number, "width": 10, "height": 8, "split": "x", "coco_id": None} for number in range(1, 7)]  # fmt: skip
    (place / "image_data_split3000.json").write_text(json.dumps(pictures))
    for number in range(1, 7):
        (place / "images" / f"{number}.jpg").write_bytes(photo())
    return root


def source(root: Path, **settings: Any) -> Refer:
    return Refer(**{"root": str(root), "collection": "phrasecut", "image_size": 16, "protocol": "phrasecut", **settings})  # fmt: skip


def test_published_files_are_read(tmp_path: Path) -> None:
    data = source(write(tmp_path)).load()
    assert [len(split) for split in (data.train, data.validation, data.test)] == [3, 1, 2]  # type: ignore[arg-type]
    assert list(data.train.sentences(np.arange(3))) == ["red dog", "dog", "wall"]
    assert data.test.sample_id(1) == "phrasecut/test/ref7/sent0"
    first, both = data.train.sample(0, with_original=True), data.validation.sample(0, with_original=True)  # type: ignore[union-attr]
    assert first.original_mask.sum() == 20  # type: ignore[union-attr]  # with its outline: 12 by the COCO raster
    expected = decode_mask([[1, 1, 5, 1, 5, 4, 1, 4], [2, 2, 8, 2, 5, 7]], 8, 10, rasteriser="pil")
    np.testing.assert_array_equal(both.original_mask, expected)
    assert not data.task().may_be_empty
    assert data.described()["dataset_name"] == "phrasecut"


def test_coco_and_outlined_rasters_are_far_apart_for_small_things() -> None:
    for polygon, inside, outlined, iou in (([1, 1, 5, 1, 5, 4, 1, 4], 12, 20, 0.6), ([2, 2, 8, 2, 5, 7], 14, 24, 0.583)):  # fmt: skip
        coco, pil = (decode_mask([polygon], 8, 10, rasteriser=name) for name in ("coco", "pil"))  # type: ignore[arg-type]
        assert (coco.sum(), pil.sum()) == (inside, outlined)
        assert (coco & pil).sum() / (coco | pil).sum() == pytest.approx(iou, abs=1e-3)


@pytest.mark.parametrize(
    ("test_split", "num", "has_validation"), [("val_miniv", 2, False), ("miniv", 1, True), ("val", 1, False)]
)
def test_val_and_miniv_are_apart_and_together(tmp_path: Path, test_split: str, num: int, has_validation: bool) -> None:  # fmt: skip
    data = source(write(tmp_path), test_split=test_split).load()
    assert (len(data.test), data.validation is not None) == (num, has_validation)


def test_the_fingerprint_covers_every_file(tmp_path: Path) -> None:
    first = source(write(tmp_path / "a")).fingerprint()
    assert source(write(tmp_path / "b")).fingerprint() == first
    assert source(write(tmp_path / "c", val=tasks("miniv"))).fingerprint() != first


BAD = {
    "no answers": ([{"image_id": 1, "phrase": "dog"}], "refer_train.json, task 0 has no Polygons: files refer_input"),
    "unknown picture": ([{**tasks("train")[0], "image_id": 77}], "task 0: its picture 77 is not in image_data_split3000.json"),
    "empty phrase": ([{**tasks("train")[0], "phrase": " "}], "has no instance, or an empty phrase"),
    "no instance": ([{**tasks("train")[0], "Polygons": []}], "has no instance, or an empty phrase"),
    "two points": ([{**tasks("train")[0], "Polygons": [[SQUARE[:2]]]}], "none of its 1 polygons has three points"),
    "no phrase": ([{"image_id": 1, "Polygons": [[SQUARE]]}], r"cannot be understood \(KeyError: 'phrase'\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_tasks_are_refused(tmp_path: Path, case: str) -> None:
    rows, message = BAD[case]
    with pytest.raises(DataError, match=message):
        source(write(tmp_path, train=rows)).load()


def test_a_missing_file_says_what_is_there(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / "phrasecut" / "refer_test.json").unlink()
    with pytest.raises(DataError, match=r"refer_test.json does not exist; .* holds"):
        source(root).load()
    with pytest.raises(DataError, match=r"refer_test.json does not exist"):
        source(root).fingerprint()


def test_every_phrase_is_in_its_subsets_and_none_may_be_missing(tmp_path: Path) -> None:
    root = write(tmp_path)
    data, (training, _) = source(root).load(), read_phrasecut(root / "phrasecut", ["train"])
    truths = [data.test.sample(number, with_original=True).original_mask for number in range(2)]
    masks = batch_of([torch.from_numpy(truth.astype(bool)) for truth in truths]).masks[:, 0] > 0.5
    names = [data.test.sample_id(number) for number in range(2)]
    evaluator = Evaluator("phrasecut", "phrasecut/test")
    wrong = masks.clone()
    wrong[1] = False
    evaluator.update(names[:1], [5], output_of([wrong[0]]), batch_of([masks[0]]))
    with pytest.raises(ValueError, match="1 expressions were not judged, for instance phrasecut/test/ref7"):
        subset_scores(evaluator, data.test, training)  # type: ignore[arg-type]
    evaluator.update(names[1:], [5], output_of([wrong[1]]), batch_of([masks[1]]))
    scores = subset_scores(evaluator, data.test, training)  # type: ignore[arg-type]
    assert {name: one.metrics["miou"] for name, one in scores.items()} == {
        "all": 50.0, "type_name": 100.0, "type_verbose": 0.0, "instances_1": 100.0, "instances_beyond_4": 0.0,
        "size_above_20_percent": 100.0, "size_below_2_percent": 0.0, "seen": 100.0, "unseen": 0.0,
        "frequency_1_20": 100.0, "frequency_beyond_500": 0.0,
    }  # fmt: skip
    assert {one.protocol for one in scores.values()} == {"phrasecut"}
    assert scores["seen"].num_expressions == 1


@pytest.mark.parametrize(
    ("truth", "num_instances", "place", "expected"),
    [
        (1, 1, 20, {"size_below_2_percent", "instances_1", "frequency_1_20"}),
        (2, 2, 21, {"size_2_20_percent", "instances_2_4", "frequency_21_100"}),
        (20, 4, 500, {"size_2_20_percent", "instances_2_4", "frequency_101_500"}),
        (21, 5, 501, {"size_above_20_percent", "instances_beyond_4", "frequency_beyond_500"}),
    ],
)
def test_limits_of_subsets(truth: int, num_instances: int, place: int, expected: set[str]) -> None:
    reference = Reference(0, 1, tuple(range(num_instances)), "test", "name", ("x",), (0,), "thing")
    index = Index((reference,), {1: {"height": 10, "width": 10}}, {})
    row = Row(sample_id="a", picture=1, intersection=0, union=1, predicted=0, truth=truth, is_empty=False, flag=False, box_iou=0.0)  # fmt: skip
    found = subsets_of(reference, index, row, {"thing": place})
    assert found == expected | {"type_name", "unseen"}


def test_categories_are_ranked_by_training_phrases(tmp_path: Path) -> None:
    training, _ = read_phrasecut(write(tmp_path) / "phrasecut", ["train"])
    assert category_ranks(training) == {"dog": 1, "wall": 2}
    assert len(COCO_NAMES) == 80
