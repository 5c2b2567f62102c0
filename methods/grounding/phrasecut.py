"""PhraseCut as published: tasks with polygons per instance, pictures of Visual Genome.

Files: ``phrasecut/refer_{train,val,miniv,test}.json``, ``phrasecut/image_data_split3000.json`` and
``phrasecut/images/ID.jpg``. ``val`` does not hold ``miniv``; both together are ``val_miniv``. Numbers are quoted with
protocol ``phrasecut``: its masks have outlines, and thresholds are strict. Wu et al., arXiv 2008.01087.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from methods.data.base import DataError
from methods.data.files import listing
from methods.grounding.annotation_masks import check_segmentation
from methods.grounding.refer_index import Index, Reference, read_json

FILES = ("train", "val", "miniv", "test")
UNIONS: Mapping[str, tuple[str, ...]] = {"val_miniv": ("val", "miniv")}
PICTURES = "image_data_split3000.json"


def task_files(folder: Path, splits: Iterable[str]) -> list[Path]:
    """The files of these splits, a union's parts one by one. Raises DataError for a missing one."""
    parts = dict.fromkeys(part for split in splits for part in UNIONS.get(split, (split,)))
    files = [folder / f"refer_{part}.json" for part in parts]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} does not exist; {folder} holds {listing(folder)}")
    return files


def read_phrasecut(folder: Path, splits: Iterable[str]) -> tuple[list[Reference], Index]:
    """Every task of these splits as a reference, its instances as annotations.

    Raises:
        DataError: A file is missing or has no answers, a task's picture is unknown, or nothing of it encloses a pixel.
    """
    pictures = _pictures(folder / PICTURES)
    references: list[Reference] = []
    annotations: dict[int, dict[str, Any]] = {}
    num_short = 0
    for file in task_files(folder, splits):
        split = file.stem.removeprefix("refer_")
        for position, task in enumerate(read_json(file)):
            where = f"{file}, task {position}"
            reference, instances = _task(task, position, split, len(annotations), where)
            if reference.image_id not in pictures:
                raise DataError(
                    f"{where}: its picture {reference.image_id} is not in {PICTURES}: add or drop it"
                )
            picture = pictures[reference.image_id]
            for instance in instances:
                num_short += check_segmentation(instance["segmentation"], picture["height"], picture["width"], where)  # fmt: skip
                annotations[instance["id"]] = instance
            references.append(reference)
    used = {reference.image_id for reference in references}
    kept = {key: pictures[key] for key in sorted(used)}
    return references, Index(tuple(references), kept, annotations, num_short, len(pictures) - len(used))


def restricted(index: Index, references: Sequence[Reference]) -> Index:
    """The same pictures and annotations, with these references only."""
    return Index(
        tuple(references),
        index.pictures,
        index.annotations,
        index.num_short_polygons,
        index.num_bare_pictures,
    )


def _pictures(file: Path) -> dict[int, dict[str, Any]]:
    try:
        return {
            int(row["image_id"]): {
                "id": int(row["image_id"]), "height": int(row["height"]), "width": int(row["width"]),
                "file_name": f"{row['image_id']}.jpg",
            }
            for row in read_json(file)
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} cannot be understood ({type(error).__name__}: {error}); expected a list of image_id, height, width"
        ) from error


def _task(
    task: Any, position: int, split: str, first_id: int, where: str
) -> tuple[Reference, list[dict[str, Any]]]:
    """A task as a reference, and its instances: each is a list of flat polygons."""
    if isinstance(task, Mapping) and "Polygons" not in task:
        raise DataError(
            f"{where} has no Polygons: files refer_input_*.json hold no answers, take refer_*.json"
        )
    try:
        image_id, structure = int(task["image_id"]), task.get("phrase_structure") or {}
        instances: list[dict[str, Any]] = [
            {"id": first_id + number, "image_id": image_id, "segmentation": [_flat(part) for part in parts]}
            for number, parts in enumerate(task["Polygons"])
        ]
        reference = Reference(
            ref_id=position * len(FILES) + FILES.index(split),
            image_id=image_id,
            annotation_ids=tuple(instance["id"] for instance in instances),
            split=split,
            kind=str(structure.get("type", "")),
            sentences=(str(task["phrase"]),),
            sentence_ids=(0,),
            category=str(structure.get("name", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} cannot be understood ({type(error).__name__}: {error}); expected image_id, Polygons and phrase; "
            f"found {task!r:.200}"
        ) from error
    if not instances or not reference.sentences[0].strip():
        raise DataError(f"{where} has no instance, or an empty phrase: drop it")
    return reference, instances


def _flat(points: Sequence[Sequence[float]]) -> list[float]:
    return [float(value) for point in points for value in point]
