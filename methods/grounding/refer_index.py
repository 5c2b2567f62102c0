"""From the files of a referring data set to one checked list of references: who is named where, by which sentences.

Readers: the original files of RefCOCO, RefCOCO+ and RefCOCOg (``refs(BY).p``) and of gRefCOCO (``grefs(unc).json``),
each with ``instances.json``; and a pack of ``refs.json`` (or ``refs.jsonl``), ``instances.json`` and ``images.parquet``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.data.base import DataError
from methods.data.files import listing
from methods.grounding.annotation_masks import check_segmentation
from methods.grounding.refer_pickle import read_plain_pickle

NO_TARGET = [-1]


@dataclass(frozen=True, slots=True)
class Reference:
    """One object (or set, or nothing) of a picture, with the sentences that name it."""

    ref_id: int
    image_id: int
    annotation_ids: tuple[int, ...]
    """Empty where nothing is named."""
    split: str
    kind: str
    """Where the sentences come from; empty where the files do not say."""
    sentences: tuple[str, ...]
    sentence_ids: tuple[int, ...]
    category: str = ""
    """Name of what it is, where the files say it in words."""


@dataclass(frozen=True, slots=True)
class Index:
    """References with the pictures and annotations that they speak of."""

    references: tuple[Reference, ...]
    pictures: Mapping[int, Mapping[str, Any]]
    """id -> ``file_name``, ``height``, ``width``."""
    annotations: Mapping[int, Mapping[str, Any]]
    """id -> ``image_id``, ``segmentation``, ``iscrowd``."""
    num_short_polygons: int = 0
    """Polygons of fewer than three points, which add nothing."""
    num_bare_pictures: int = 0
    """Pictures that no sentence is about: not used."""


def read_references(file: Path, sentence_field: str = "sent") -> list[Reference]:
    """References from a pickle, JSON, or JSON-lines file. Raises DataError."""
    if not file.is_file():
        raise DataError(f"{file} does not exist; {file.parent} holds {listing(file.parent)}")
    rows = read_plain_pickle(file.read_bytes(), str(file)) if file.suffix == ".p" else read_json(file)
    if not isinstance(rows, list):
        raise DataError(f"{file} holds a {type(rows).__name__}, expected a list of references")
    return [_reference(row, sentence_field, f"{file}, reference {number}") for number, row in enumerate(rows)]


def read_json(file: Path) -> Any:
    """What a JSON or JSON-lines file holds. Raises DataError when it is missing or cut short."""
    if not file.is_file():
        raise DataError(f"{file} does not exist; {file.parent} holds {listing(file.parent)}")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not complete JSON ({error}): copy or download it again") from error


def _reference(row: Any, sentence_field: str, where: str) -> Reference:
    try:
        found = row["ann_ids"] if "ann_ids" in row else row["ann_id"]
        annotation_ids = [found] if isinstance(found, int) else list(found)
        sentences = [
            item if isinstance(item, str) else str(item[sentence_field]) for item in row["sentences"]
        ]
        ids = [item.get("sent_id", -1) for item in row["sentences"] if isinstance(item, Mapping)]
        return Reference(
            ref_id=int(row["ref_id"]),
            image_id=int(row["image_id"]),
            annotation_ids=() if annotation_ids == NO_TARGET else tuple(map(int, annotation_ids)),
            split=str(row["split"]),
            kind=str(row.get("kind", "")),
            sentences=tuple(sentences),
            sentence_ids=tuple(ids) if len(ids) == len(sentences) else tuple(range(len(sentences))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} cannot be understood ({type(error).__name__}: {error}); expected ref_id, image_id, ann_id or "
            f"ann_ids, split and sentences; found {row!r:.200}"
        ) from error


def read_index(instances: Path, references: Sequence[Reference]) -> Index:
    """Join references with pictures and annotations, and refuse what does not fit together.

    Raises:
        DataError: An id stands twice, a reference names a picture or an annotation that is absent or an annotation of
            another picture, a mask is of another size than its picture, or a sentence is empty.
    """
    content = read_json(instances)
    try:
        all_pictures, all_annotations = content["images"], content["annotations"]
        _refuse_twice("picture", (picture["id"] for picture in all_pictures), instances)
        _refuse_twice("annotation", (annotation["id"] for annotation in all_annotations), instances)
        pictures = {picture["id"]: picture for picture in all_pictures}
        annotations = {annotation["id"]: annotation for annotation in all_annotations}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{instances} is not in COCO's format: {type(error).__name__} {error}; expected images and annotations with ids"
        ) from error
    _refuse_twice("reference", (reference.ref_id for reference in references), instances.parent)
    used: dict[int, Mapping[str, Any]] = {}
    num_short = 0
    for reference in references:
        for annotation in _checked(reference, pictures, annotations):
            if annotation["id"] not in used:
                num_short += _check_mask(annotation, pictures[reference.image_id])
                used[annotation["id"]] = annotation
    spoken_of = {reference.image_id for reference in references}
    return Index(
        tuple(references), {key: pictures[key] for key in spoken_of}, used, num_short, len(pictures) - len(spoken_of)
    )  # fmt: skip


def _checked(
    reference: Reference, pictures: Mapping[int, Any], annotations: Mapping[int, Any]
) -> Iterable[Mapping[str, Any]]:
    where = f"reference {reference.ref_id}"
    if reference.image_id not in pictures:
        raise DataError(f"{where}: its picture {reference.image_id} is not in instances.json: add or drop it")
    if not reference.sentences or not all(sentence.strip() for sentence in reference.sentences):
        raise DataError(f"{where}: it has an empty sentence, or none: {list(reference.sentences)!r:.120}")
    for number in reference.annotation_ids:
        annotation = annotations.get(number)
        if annotation is None:
            raise DataError(f"{where}: its annotation {number} is not in instances.json: add or drop it")
        if annotation["image_id"] != reference.image_id:
            raise DataError(
                f"{where}: its annotation {number} is of picture {annotation['image_id']}, not of {reference.image_id}"
            )
        yield annotation


def _check_mask(annotation: Mapping[str, Any], picture: Mapping[str, Any]) -> int:
    where = f"annotation {annotation['id']} of picture {picture['id']}"
    return check_segmentation(annotation["segmentation"], picture["height"], picture["width"], where)


def _refuse_twice(what: str, ids: Iterable[int], where: Path) -> None:
    twice = [number for number, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(
            f"{where}: {len(twice)} {what} ids stand there more than once, for instance {twice[0]}: ids must be unique"
        )


def in_split(reference: Reference, wanted: str) -> bool:
    """Whether a reference belongs to a split: ``testA`` and ``testB`` are in ``testAB``, ``test`` is in all tests."""
    if wanted in ("testA", "testB", "testC"):
        return wanted[-1] in reference.split
    if wanted == "val_miniv":
        return reference.split in ("val", "miniv")
    return wanted in reference.split if wanted == "test" else reference.split == wanted


def pictures_asked_about(*parts: Sequence[Reference]) -> frozenset[int]:
    """Pictures of any validation or test split: learning from them would answer the questions beforehand."""
    return frozenset(item.image_id for part in parts for item in part if item.split != "train")


def without_pictures(references: Sequence[Reference], held_out: frozenset[int]) -> list[Reference]:
    """References for training are left out where they are about these pictures; the others stay."""
    return [item for item in references if item.split != "train" or item.image_id not in held_out]
