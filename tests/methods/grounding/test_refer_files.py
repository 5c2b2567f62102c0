"""Referring data from original files and packs: what is read, and what is refused."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refer_files import SPLITS, instances, original_refs, pack_refs, photo, write_original, write_pack

from methods.data.base import DataError
from methods.grounding.refer import Refer
from methods.grounding.refer_index import Reference, in_split, read_references
from methods.grounding.refer_pickle import read_plain_pickle
from methods.grounding.source import GroundingData


def original(root: Path, **settings: Any) -> Refer:
    return Refer(
        **{"root": str(root), "collection": "refcoco", "test_split": "test", "image_size": 16, **settings}
    )


def pack(root: Path, **settings: Any) -> Refer:
    return Refer(root=str(root), collection="pack", image_size=16, **settings)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_original_files_are_read(tmp_path: Path, protocol: int) -> None:
    data = original(write_original(tmp_path, protocol=protocol)).load()
    assert [len(split) for split in (data.train, data.validation, data.test)] == [6, 3, 3]  # type: ignore[arg-type]
    assert data.train.sentences(np.array([0, 2])) == ["the left thing", "the right thing"]
    sample = data.train.sample(0, with_original=True)
    assert (sample.size, sample.is_empty) == ((8, 10), False)
    assert sample.original_mask is not None
    assert sample.original_mask.sum() == 12
    assert sample.box == pytest.approx((0.3, 2.5 / 8, 0.4, 3 / 8))
    assert sample.mask.shape == (16, 16)
    assert data.train.sample_id(1) == "refcoco/unc/train/ref0/sent1"
    assert data.described()["counts"]["unused_pictures"] == 1


def test_the_name_of_a_reference_is_not_that_of_its_photo(tmp_path: Path) -> None:
    """``file_name`` of a reference carries the annotation id; that of its picture counts."""
    data = original(write_original(tmp_path)).load()
    assert data.train.sample(0).image.shape == (3, 16, 16)


def test_overlapping_parts_are_united_or_lost(tmp_path: Path) -> None:
    root = write_original(tmp_path)
    pixels = {
        protocol: int(original(root, protocol=protocol).load().test.sample(2, with_original=True).original_mask.sum())  # type: ignore[union-attr]
        for protocol in ("ours", "global_local_clip", "phrasecut")
    }  # fmt: skip
    assert pixels == {"ours": 28, "global_local_clip": 24, "phrasecut": 41}


def test_grefcoco_knows_lists_nothing_and_crowds(tmp_path: Path) -> None:
    refs = original_refs(("train", "train", "val", "testA"))
    for ref in refs:
        ref["ann_id"], ref["category_id"] = [ref["ann_id"]], [1]
    refs[0]["ann_id"] = [100, 101, 102]
    refs[1]["ann_id"] = [-1]
    data = original(
        write_original(tmp_path, "grefcoco", refs=refs), collection="grefcoco", test_split=""
    ).load()
    both, nothing = (data.train.sample(index, with_original=True) for index in (0, 2))
    assert both.original_mask.sum() == 28  # type: ignore[union-attr]
    assert (nothing.is_empty, nothing.mask.any(), nothing.box) == (True, False, (0, 0, 0, 0))
    assert data.task().may_be_empty


@pytest.mark.parametrize("lines", [False, True])
def test_a_pack_is_read(tmp_path: Path, lines: bool) -> None:
    data = pack(write_pack(tmp_path, lines=lines)).load()
    assert len(data.train) == 7
    assert data.train.sample(6, with_original=True).original_mask.sum() == 28  # type: ignore[union-attr]
    assert data.validation is not None
    assert data.validation.sample(3).is_empty
    assert data.vocabulary.described()["words"] == ["thing", "the", "left", "one", "right", "things", "two"]
    assert pack(tmp_path, kinds=("none", "written"), no_target="keep").load().described()["counts"]["val"]["expressions"] == 4  # fmt: skip
    dropped = pack(tmp_path, no_target="drop")
    assert not dropped.may_be_empty
    assert dropped.load().described()["counts"]["val"]["expressions"] == 3


def test_loaded_data_travel_to_another_process_and_into_a_manifest(tmp_path: Path) -> None:
    data = pack(write_pack(tmp_path)).load()
    here = data.train.sample(0)
    sent: GroundingData = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(sent.train.sample(0).image, here.image)
    assert sent.task() == data.task()
    assert json.loads(json.dumps(data.described())) == data.described()


def changed(what: str, value: Any, number: int = 0) -> dict[str, Any]:
    content = instances()
    content["annotations"][number][what] = value
    return content


def with_ref(number: int, **changes: Any) -> list[dict[str, Any]]:
    refs = pack_refs()
    refs[number] |= changes
    return refs


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty sentence": ({"refs": with_ref(1, sentences=["  "])}, "reference 1: it has an empty sentence"),
    "no sentence": ({"refs": with_ref(1, sentences=[])}, "reference 1: it has an empty sentence, or none"),
    "reference twice": ({"refs": with_ref(1, ref_id=0)}, "1 reference ids stand there more than once, for instance 0"),
    "annotation twice": ({"content": changed("id", 101)}, "1 annotation ids stand there more than once, for instance 101"),
    "picture twice": ({"content": {**instances(), "images": instances()["images"] * 2}}, "5 picture ids stand there more than once"),
    "annotation without picture": ({"refs": with_ref(1, image_id=77)}, "reference 1: its picture 77 is not in instances.json"),
    "picture without annotation": ({"refs": with_ref(1, ann_ids=[999])}, "reference 1: its annotation 999 is not in instances.json"),
    "annotation of another picture": ({"refs": with_ref(1, ann_ids=[110])}, "its annotation 110 is of picture 1, not of 0"),
    "two points": ({"content": changed("segmentation", [[1, 1, 5, 4]])}, "annotation 100 of picture 0: none of its 1 polygons has three points"),
    "mask of another size": ({"content": changed("segmentation", {"size": [10, 8], "counts": [80]})}, r"annotation 100 of picture 0: its mask is of size \(10, 8\)"),
    "photos on both sides": ({"refs": with_ref(0, split="val")}, "1 pictures are in split 'val' and in another, for instance 0"),
    "no photo": ({"photos": {number: photo() for number in range(3)}}, "1 pictures have sentences but no photo, for instance 3"),
    "no training split": ({"refs": pack_refs()[4:8]}, "split 'train' has no reference; there are test, val"),
    "reference that is none": ({"refs": [{"ref_id": 0}]}, "reference 0 cannot be understood"),
    "not COCO": ({"content": {"images": []}}, "is not in COCO's format"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_files_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    files, message = BAD[case]
    with pytest.raises(DataError, match=message):
        pack(write_pack(tmp_path / "pack", **files)).load()


def test_a_photo_of_another_size_than_its_masks(tmp_path: Path) -> None:
    photos = {number: photo(9, 10) for number in range(5)}
    data = pack(write_pack(tmp_path, photos=photos)).load()
    with pytest.raises(DataError, match=r"photo of picture 0 is 9 x 10 \(height x width\), but the annotations are for 8 x 10"):  # fmt: skip
        data.train.sample(0)


def test_what_is_lost_is_counted_and_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = instances()
    content["annotations"][0]["segmentation"].append([1, 1, 2, 2])
    with caplog.at_level(logging.WARNING):
        counts = pack(write_pack(tmp_path, content=content), text_length=4).load().described()["counts"]
    assert counts["short_polygons"] == 1
    assert (counts["train"]["truncated_sentences"], counts["val"]["unknown_words"]) == (5, 1)
    assert sum("lose words from their end" in message for message in caplog.messages) == 3
    assert sum("fewer than three points" in message for message in caplog.messages) == 1


def test_counts_that_differ_from_the_published_ones_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING):
        original(write_original(tmp_path)).load()
    assert "refcoco/unc/train has 4 references, the published files have 42404: numbers are not comparable with tables" in caplog.messages  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "there", "belongs"),
    [("testA", "testAB", True), ("testB", "testAB", True), ("testA", "testB", False), ("test", "testA", True), ("train", "train", True), ("val", "val2", False)],
)  # fmt: skip
def test_split_rules(wanted: str, there: str, belongs: bool) -> None:
    reference = Reference(0, 0, (), there, "", ("x",), (0,))
    assert in_split(reference, wanted) is belongs


def test_the_google_partition_shares_photos_and_has_no_test(tmp_path: Path) -> None:
    splits = ("train", "train", "train", "val")
    refs = original_refs(splits)
    refs[1]["split"] = "val"
    settings: dict[str, Any] = {"collection": "refcocog", "split_by": "google", "test_split": ""}
    root = write_original(tmp_path, "refcocog", "google", refs=refs)
    with pytest.raises(DataError, match="pictures are in split 'val' and in another"):
        original(root, **settings).load()
    data = original(root, **settings, allow_shared_pictures=True).load()
    assert (data.validation, len(data.test)) == (None, 4)
    assert data.described()["dataset_name"] == "refcocog/google"
    assert data.described()["test_split"] == "val"


def test_joined_collections_leave_out_what_any_of_them_asks_about(tmp_path: Path) -> None:
    write_original(tmp_path)
    plus = original_refs(("val", "train", "train", "train"))
    write_original(tmp_path, "refcoco+", refs=plus)
    alone, joined = original(tmp_path).load(), original(tmp_path, join=("refcoco+/unc",)).load()
    assert set(alone.train.pictures) == {0, 1}
    assert [alone.train.sample_id(index) for index in (0, 5)] == ["refcoco/unc/train/ref0/sent0", "refcoco/unc/train/ref3/sent30"]  # fmt: skip
    assert joined.train.pictures.tolist() == [1] * 6  # 0 is asked about by refcoco+, 2 and 3 by refcoco
    assert joined.train.objects.tolist() == [0, 0, 1, 2, 2, 3]
    assert joined.train.sample_id(4) == "refcoco+/unc/train/ref2/sent21"
    assert joined.train.sentences(np.array([5, 0])) == ["the right thing", "the left thing"]
    np.testing.assert_array_equal(joined.train.sample(4).mask, joined.train.sample(0).mask)
    assert len(joined.test) == len(alone.test) == 3
    assert joined.described()["counts"]["train"] == {"expressions": 6, "references": 4, "pictures": 1, "truncated_sentences": 0, "unknown_words": 0}  # fmt: skip
    assert original(tmp_path, join=("refcoco+/unc",)).fingerprint() != original(tmp_path).fingerprint()


def test_fingerprints_follow_content_and_not_place(tmp_path: Path) -> None:
    first = write_original(tmp_path / "a")
    second = write_original(tmp_path / "b")
    assert original(first).fingerprint() == original(second).fingerprint()
    assert original(first, text_length=20).fingerprint() != original(first).fingerprint()
    refs = original_refs()
    refs[0]["sentences"][0]["sent"] = "another"
    assert original(write_original(tmp_path / "c", refs=refs)).fingerprint() != original(first).fingerprint()
    packed = write_pack(tmp_path / "d")
    before = pack(packed).fingerprint()
    write_pack(tmp_path / "d", photos={number: photo(8, 10) + b" " for number in range(5)})
    assert pack(packed).fingerprint() != before
    assert (original(first).reads_while_used(), pack(packed).reads_while_used()) == (True, False)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_names_anything_is_refused(protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="only lists, dictionaries, strings and numbers are read"):
        read_plain_pickle(pickle.dumps([Evil()], protocol=protocol), "refs(unc).p")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"(lp0\n", b"not a pickle", pickle.dumps([1])[:-3]])
def test_a_damaged_pickle_is_named(content: bytes) -> None:
    with pytest.raises(DataError, match=r"refs\(unc\).p was not read"):
        read_plain_pickle(content, "refs(unc).p")


def test_other_plain_types_are_refused() -> None:
    with pytest.raises(DataError, match="only lists, dictionaries, strings and numbers"):
        read_plain_pickle(pickle.dumps([frozenset({1})], protocol=4), "refs(unc).p")


def test_strings_of_python_two_are_utf8_again() -> None:
    assert read_plain_pickle(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsa.", "x") == [{"sent": "café"}]
    assert read_plain_pickle(pickle.dumps(["naïve \u4e2d", 1.5, None, True, (2,)]), "x") == ["naïve \u4e2d", 1.5, None, True, [2]]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"collection": "refcocog", "split_by": ""},
            "split_by must be one of umd, google for refcocog, got ''",
        ),
        ({"split_by": "umd"}, "split_by must be one of unc for refcoco, got 'umd'"),
        ({"collection": "coco"}, "collection must be one of"),
        ({"no_target": "maybe"}, "no_target must be one of keep, drop"),
        (
            {"join": ("refcoco/unc",)},
            "join must name other collections than refcoco/unc of .*, got 'refcoco/unc'",
        ),
        ({"join": ("refcocog",)}, "join must name other collections"),
        ({"min_word_count": 0}, "min_word_count must be at least 1"),
        ({"text_length": 2}, "text_length must be at least 3"),
    ],
)
def test_impossible_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        original(tmp_path, **settings)


def test_missing_files_say_what_is_there(tmp_path: Path) -> None:
    root = write_original(tmp_path)
    with pytest.raises(DataError, match=r"data root .*refcoco\+ does not exist"):
        original(root, collection="refcoco+").load()
    (root / "refcoco" / "refs(unc).p").unlink()
    with pytest.raises(DataError, match=r"holds no refs\(unc\).p, but instances.json"):
        original(root).load()


def test_raw_text_can_be_chosen(tmp_path: Path) -> None:
    file = write_original(tmp_path) / "refcoco" / "refs(unc).p"
    assert read_references(file, "raw")[0].sentences == ("THE LEFT THING", "THING ONE")
    assert [ref.split for ref in read_references(file)[::2]] == list(SPLITS)


SHARED = Path(__file__).parents[3] / "../shared/data/coco_referring"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the pack of real photos is not beside this checkout")
def test_real_photos() -> None:
    data: GroundingData = Refer(root=str(SHARED), collection="pack", image_size=64, text_length=12).load()
    assert [len(split) for split in (data.train, data.validation, data.test)] == [1566, 290, 245]  # type: ignore[arg-type]
    assert data.described()["counts"]["train"]["references"] == 1302
    samples = [data.test.sample(index, with_original=True) for index in range(0, 245, 40)]
    assert all(sample.original_mask is not None and sample.original_mask.shape == sample.size for sample in samples)  # fmt: skip
    assert any(sample.is_empty for sample in samples)
    named = next(sample for sample in samples if not sample.is_empty)
    assert 0 < named.mask.mean() < 1
    assert abs(named.mask.mean() - named.original_mask.mean()) < 0.02  # type: ignore[union-attr]
