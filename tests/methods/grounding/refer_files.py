"""A referring data set of two objects and a few pictures, written as its authors publish theirs."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FIRST = [1, 1, 5, 1, 5, 4, 1, 4]
SECOND = [3, 2, 8, 2, 8, 6, 3, 6]
SPLITS = ("train", "train", "val", "test")
"""Of pictures 0 to 3."""


def instances() -> dict[str, Any]:
    """Four pictures, 8 high and 10 wide, each with two objects that overlap, and one without sentences."""
    pictures = [{"id": number, "file_name": f"COCO_train2014_{number:012}.jpg", "height": 8, "width": 10} for number in range(5)]  # fmt: skip
    annotations = []
    for number in range(4):
        annotations += [
            {"id": 100 + 10 * number, "image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": [FIRST]},
            {"id": 101 + 10 * number, "image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": [FIRST, SECOND]},
            {"id": 102 + 10 * number, "image_id": number, "category_id": 1, "iscrowd": 1, "segmentation": [[8, 6, 10, 6, 10, 8, 8, 8]]},
        ]  # fmt: skip
    return {"images": pictures, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def original_refs(splits: tuple[str, ...] = SPLITS) -> list[dict[str, Any]]:
    """Two references per picture, the first with two sentences, as in ``refs(unc).p``."""
    refs = []
    for number, split in enumerate(splits):
        for which, texts in enumerate((("the left thing", "thing one"), ("the right thing",))):
            ref_id = 2 * number + which
            sentences = [
                {"sent_id": 10 * ref_id + item, "sent": text, "raw": text.upper(), "tokens": text.split()}
                for item, text in enumerate(texts)
            ]
            refs.append({
                "ref_id": ref_id, "ann_id": 100 + 10 * number + which, "image_id": number, "category_id": 1, "split": split,
                "file_name": f"COCO_train2014_{number:012}_{100 + which}.jpg", "sentences": sentences,
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
            })  # fmt: skip
    return refs


def photo(height: int = 8, width: int = 10) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_original(
    root: Path,
    collection: str = "refcoco",
    by: str = "unc",
    refs: Any = None,
    content: Any = None,
    protocol: int = 2,
) -> Path:
    """``ROOT/COLLECTION`` with its two files, and the photos beside it."""
    place, photos = root / collection, root / "images" / "train2014"
    place.mkdir(parents=True)
    photos.mkdir(parents=True, exist_ok=True)
    rows = original_refs() if refs is None else refs
    if collection == "grefcoco":
        (place / f"grefs({by}).json").write_text(json.dumps(rows))
    else:
        (place / f"refs({by}).p").write_bytes(pickle.dumps(rows, protocol=protocol))
    (place / "instances.json").write_text(json.dumps(instances() if content is None else content))
    for picture in instances()["images"]:
        (photos / picture["file_name"]).write_bytes(photo())
    return root


def pack_refs() -> list[dict[str, Any]]:
    refs = []
    for ref in original_refs():
        row = {key: ref[key] for key in ("ref_id", "image_id", "split")}
        refs.append({**row, "ann_ids": [ref["ann_id"]], "kind": "written", "sentences": [item["sent"] for item in ref["sentences"]]})  # fmt: skip
    refs.append({"ref_id": 90, "image_id": 0, "ann_ids": [100, 101, 102], "split": "train", "kind": "multi", "sentences": ["the two things"]})  # fmt: skip
    refs.append({"ref_id": 91, "image_id": 2, "ann_ids": [], "split": "val", "kind": "none", "sentences": ["the bench"]})  # fmt: skip
    return refs


def write_pack(root: Path, refs: Any = None, content: Any = None, photos: dict[int, bytes] | None = None, lines: bool = False) -> Path:  # fmt: skip
    """One folder with references, annotations and a parquet of photos."""
    root.mkdir(exist_ok=True)
    rows = copy.deepcopy(pack_refs() if refs is None else refs)
    if lines:
        (root / "refs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (root / "refs.json").write_text(json.dumps(rows))
    (root / "instances.json").write_text(json.dumps(instances() if content is None else content))
    shots = {number: photo() for number in range(5)} if photos is None else photos
    images = [{"bytes": content, "path": f"{number}.png"} for number, content in shots.items()]
    pq.write_table(pa.table({"image_id": list(shots), "image": images}), root / "images.parquet")
    return root
