"""``refer``: photos with sentences - RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO, PhraseCut from their original files, or a pack.

Original files: ``ROOT/refcoco/refs(unc).p`` and ``ROOT/refcoco/instances.json`` (``refcoco+`` and ``refcocog`` alike),
``ROOT/grefcoco/grefs(unc).json``, photos of COCO train2014 under ``ROOT/images/train2014``. A pack is one folder with
``refs.json`` (or ``refs.jsonl``), ``instances.json`` and ``images.parquet``. PhraseCut: ``methods.grounding.phrasecut``.

A RefCOCOg number always belongs to ``umd`` or ``google``, never to both; the google partition has photos that are both
learnt from and asked about, and no test split.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from methods.checks import check_choice
from methods.data.base import DataError
from methods.data.files import combined_digest, content_digest, folder, listing
from methods.grounding.expressions import refuse_shared_pictures
from methods.grounding.fit import FITS, Fit
from methods.grounding.phrasecut import PICTURES, read_phrasecut, restricted, task_files
from methods.grounding.protocols import protocol_named
from methods.grounding.refer_index import (
    Index,
    Reference,
    in_split,
    pictures_asked_about,
    read_index,
    read_references,
    without_pictures,
)
from methods.grounding.refer_photos import packed_photos
from methods.grounding.refer_split import JoinedSplits, Kept, ReferSplit
from methods.grounding.source import NORMALISATIONS, GroundingData, GroundingSource, not_default
from methods.grounding.vocabulary import HuggingFaceVocabulary, Vocabulary, encode, vocabulary_of

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised whenever the same files and settings would give other batches."""
NUM_REFERENCES: Mapping[str, Mapping[str, int]] = {
    "refcoco/unc": {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    "refcoco+/unc": {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    "refcocog/umd": {"train": 42226, "val": 2573, "test": 5023},
    "refcocog/google": {"train": 44822, "val": 5000},
    "phrasecut": {"train": 310816, "val": 20316, "test": 14354, "miniv": 821, "val_miniv": 21137},
}
"""References per split in the published files."""
TEST_SPLITS = {
    "refcoco": "testA",
    "refcoco+": "testA",
    "refcocog": "test",
    "grefcoco": "testA",
    "phrasecut": "test",
    "pack": "test",
}
JOINABLE = ("refcoco/unc", "refcoco+/unc", "refcocog/umd", "refcocog/google")
PARTITIONS = {"refcoco": ("unc",), "refcoco+": ("unc",), "refcocog": ("umd", "google"), "grefcoco": ("unc",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Refer(GroundingSource):
    """The settings of ``refer``."""

    root: str
    """Folder of the files."""
    collection: Literal["refcoco", "refcoco+", "refcocog", "grefcoco", "phrasecut", "pack"]
    """Which data set lies there."""
    split_by: str = ""
    """Partition: ``umd`` or ``google`` for refcocog, where it must be named; the others have one."""
    test_split: str = ""
    """Split on which the final numbers are measured; by default ``testA``, or ``test`` where there is no other."""
    sentences_per_object: Literal["all", "one"] = "all"
    """In training: every sentence is a sample, or an epoch shows each object once with one of its sentences."""
    no_target: Literal["keep", "drop"] = "keep"
    """What becomes of sentences that name nothing (gRefCOCO, packs)."""
    kinds: tuple[str, ...] = ()
    """Only references of these kinds (a pack says where sentences come from); all by default."""
    sentence_field: Literal["sent", "raw"] = "sent"
    """The cleaned text, or what was typed."""
    tokenizer: str = "words"
    """``words``: the words of the training sentences; else the name or folder of a HuggingFace tokenizer."""
    min_word_count: int = 1
    """``words``: how often a word must occur in training to be known."""
    join: tuple[str, ...] = ()
    """Other collections under ``root`` (``refcoco+``, ``refcocog/umd``) that are learnt from too. Pictures in a validation
    or test split of any of them are then left out of training."""
    fit: Fit = "stretch"
    """How photos come into the square: stretched, or whole on a margin of the normalisation's mean (``letterbox``)."""
    allow_shared_pictures: bool = False
    """Go on although pictures are in several splits, as in the google partition: such numbers flatter."""

    def __post_init__(self) -> None:
        GroundingSource.__post_init__(self)
        check_choice(
            self, collection=tuple(TEST_SPLITS), sentences_per_object=("all", "one"),
            no_target=("keep", "drop"), sentence_field=("sent", "raw"), fit=FITS,
        )  # fmt: skip
        partitions = PARTITIONS.get(self.collection, ())
        if self.split_by not in partitions and (self.split_by or len(partitions) > 1):
            raise ValueError(
                f"split_by must be one of {', '.join(partitions) or 'nothing'} for {self.collection}, got {self.split_by!r}"
            )
        for name in self.join:
            if self.collection == "pack" or name == self.name or name not in JOINABLE:
                raise ValueError(
                    f"join must name other collections than {self.name} of {', '.join(JOINABLE)}, got {name!r}"
                )
        if self.min_word_count < 1:
            raise ValueError(f"min_word_count must be at least 1, got {self.min_word_count}")

    @property
    def may_be_empty(self) -> bool:
        return self.collection in ("grefcoco", "pack") and self.no_target == "keep"

    @property
    def name(self) -> str:
        """``refcocog/umd``: what a number on this data is quoted with."""
        partition = self.split_by or "".join(PARTITIONS.get(self.collection, ()))
        return f"{self.collection}/{partition}" if partition else self.collection

    @property
    def test_name(self) -> str:
        """The split that is tested; the google partition never released one, so its ``val`` is."""
        return self.test_split or ("val" if self.split_by == "google" else TEST_SPLITS[self.collection])

    def reads_while_used(self) -> bool:
        """Photos of the original collections are read from their files in every batch."""
        return self.collection != "pack"

    def fingerprint(self) -> str:
        """Covers the bytes of the annotations (and of a pack's photos), and names and sizes of photo files."""
        files = [file for part in (self, *self._others()) for file in part._annotation_files()]
        settings = [item for item in not_default(self) if item[0] != "root"]
        if self.collection == "pack":
            return combined_digest("refer", VERSION, settings, content_digest([*files, self._photos_file()]))
        photos = sorted((entry.name, entry.stat().st_size) for entry in self._photo_folder().iterdir())
        return combined_digest("refer", VERSION, settings, content_digest(files), photos)

    def load(self) -> GroundingData:
        (references, read), kept = self._references(), Kept()
        joined = {other: other._references() for other in self._others()}
        held_out = pictures_asked_about(references, *(rows for rows, _ in joined.values())) if joined else frozenset()  # fmt: skip
        names = self._split_names(references)
        own = self._splits(read(without_pictures(references, held_out)), names, kept)
        train: ReferSplit | JoinedSplits = own["train"]
        if joined:
            more = (
                other._splits(read_other(without_pictures(rows, held_out)), ["train"], kept)["train"]
                for other, (rows, read_other) in joined.items()
            )
            train = JoinedSplits([own["train"], *more])
        splits = {**own, "train": train}
        if not self.allow_shared_pictures:
            refuse_shared_pictures(**splits)
        vocabulary = self._vocabulary(train.texts)
        return GroundingData(
            source=self,
            vocabulary=vocabulary,
            train=train,
            validation=own.get("val") if self.test_name != "val" else None,
            test=own[self.test_name],
            one_sentence=self.sentences_per_object == "one",
            notes=self._notes(splits, vocabulary, own[self.test_name].index),
        )

    def _splits(self, index: Index, names: Sequence[str], kept: Kept) -> dict[str, ReferSplit]:
        if index.num_short_polygons:
            logger.warning("%s: %d polygons of fewer than three points add nothing", self.name, index.num_short_polygons)  # fmt: skip
        photos, rules = self._photos(index), protocol_named(self.protocol)
        splits = {
            split: ReferSplit(
                index, [item for item in index.references if in_split(item, split)], photos, name=f"{self.name}/{split}",
                image_size=self.image_size, rules=rules, kept=kept, fit=self.fit,
                margin=NORMALISATIONS[self.normalisation][0],
            )
            for split in names
        }  # fmt: skip
        for split, content in splits.items():
            if not len(content):
                known = ", ".join(sorted({item.split for item in index.references}))
                raise DataError(f"{self.root}: split {split!r} has no reference; there are {known}")
        return splits

    def _others(self) -> list[Refer]:
        """The collections that are joined, each with its own files."""
        names = (name.split("/") for name in self.join)
        return [replace(self, collection=name, split_by=by, join=(), test_split="") for name, by in names]  # type: ignore[arg-type]

    def _references(self) -> tuple[list[Reference], Callable[[Sequence[Reference]], Index]]:
        """References that are wanted, and what finds the pictures and annotations of those that are kept."""
        if self.collection == "phrasecut":
            references, index = read_phrasecut(self._folder(), self._phrasecut_splits())
            return self._wanted(references), partial(restricted, index)
        references = read_references(self._references_file(), self.sentence_field)
        return self._wanted(references), partial(read_index, self._instances_file())

    def _phrasecut_splits(self) -> list[str]:
        return list(dict.fromkeys(("train", "val", self.test_name)))

    def _wanted(self, references: list[Reference]) -> list[Reference]:
        kept = [item for item in references if item.annotation_ids or self.no_target == "keep"]
        if not self.kinds:
            return kept
        known = {item.kind for item in kept}
        if unknown := sorted(set(self.kinds) - known):
            raise DataError(
                f"{self.root} has no references of kind {unknown[0]!r}; there are {', '.join(sorted(known))}"
            )
        return [item for item in kept if item.kind in self.kinds]

    def _split_names(self, references: Sequence[Reference]) -> list[str]:
        """Training, validation where there is one beside the test split, and the test split."""
        has_validation = self.test_name != "val_miniv" and any(item.split == "val" for item in references)
        return list(dict.fromkeys(["train", *(["val"] if has_validation else []), self.test_name]))

    def _vocabulary(self, texts: Sequence[str]) -> Vocabulary:
        if self.tokenizer != "words":
            return HuggingFaceVocabulary(self.tokenizer)
        return vocabulary_of(texts, min_count=self.min_word_count)

    def _notes(
        self, splits: Mapping[str, ReferSplit | JoinedSplits], vocabulary: Vocabulary, index: Index
    ) -> dict[str, Any]:
        """What the manifest says of the data. What was lost on the way is warned about once."""
        counts: dict[str, Any] = {"short_polygons": index.num_short_polygons, "unused_pictures": index.num_bare_pictures}  # fmt: skip
        for split, content in splits.items():
            encoded = encode(vocabulary, content.texts, self.text_length)
            counts[split] = {
                "expressions": len(content), "references": content.num_references,
                "pictures": len(np.unique(content.pictures)), "truncated_sentences": encoded.num_truncated,
                "unknown_words": encoded.num_unknown,
            }  # fmt: skip
            if encoded.num_truncated or encoded.num_unknown:
                logger.warning(
                    "%s/%s: %d of %d sentences are longer than text_length %d and lose words from their end; %d words are "
                    "not in the vocabulary", self.name, split, encoded.num_truncated, len(content), self.text_length,
                    encoded.num_unknown,
                )  # fmt: skip
            expected = (
                NUM_REFERENCES.get(self.name, {}).get(split) if isinstance(content, ReferSplit) else None
            )
            if expected is not None and expected != content.num_references:
                logger.warning(
                    "%s/%s has %d references, the published files have %d: numbers are not comparable with tables",
                    self.name, split, content.num_references, expected,
                )  # fmt: skip
        return {"dataset_name": self.name, "test_split": self.test_name, "counts": counts}

    def _folder(self) -> Path:
        root = folder(self.root)
        return root if self.collection == "pack" else folder(str(root / self.collection))

    def _annotation_files(self) -> list[Path]:
        if self.collection == "phrasecut":
            return [*task_files(self._folder(), self._phrasecut_splits()), self._folder() / PICTURES]
        return [self._references_file(), self._instances_file()]

    def _references_file(self) -> Path:
        base = self._folder()
        if self.collection == "pack":
            names = ["refs.json", "refs.jsonl"]
        elif self.collection == "grefcoco":
            names = ["grefs(unc).json", "grefs(unc).p"]
        else:
            names = [f"refs({self.split_by or PARTITIONS[self.collection][0]}).p"]
        found = next((base / name for name in names if (base / name).is_file()), None)
        if found is None:
            raise DataError(f"{base} holds no {' or '.join(names)}, but {listing(base)}")
        return found

    def _instances_file(self) -> Path:
        return self._folder() / "instances.json"

    def _photos_file(self) -> Path:
        return self._folder() / "images.parquet"

    def _photo_folder(self) -> Path:
        if self.collection == "phrasecut":
            return folder(str(self._folder() / "images"))
        return folder(str(folder(self.root) / "images" / "train2014"))

    def _photos(self, index: Index) -> dict[int, bytes | Path]:
        """Where each picture's photo is. ``file_name`` of the *pictures* counts: that of a reference has a suffix."""
        if self.collection != "pack":
            place = self._photo_folder()
            return {key: place / str(picture["file_name"]) for key, picture in index.pictures.items()}
        return packed_photos(self._photos_file(), set(index.pictures))
