from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from methods.data.base import DataError
from methods.data.parquet import Parquet

NUM_TRAIN, NUM_TEST = 70, 12
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM_TRAIN, 6, 6, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write(file: Path, columns: dict[str, Any], names: list[str] | None = None) -> None:
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=32)


def rows(num: int, **changes: Any) -> dict[str, Any]:
    images = [{"bytes": png(PIXELS[i]), "path": f"{i}.png"} for i in range(num)]
    columns = {"image": images, "label": [i % 5 for i in range(num)], **changes}
    return {name: values for name, values in columns.items() if values is not None}


def data_set(root: Path, train: dict[str, Any] | None = None, test: dict[str, Any] | None = None) -> Parquet:
    write(root / "train-00000.parquet", train or rows(NUM_TRAIN))
    write(root / "test.parquet", test or rows(NUM_TEST))
    return Parquet(root=str(root))


def test_pixels_and_labels_come_back(tmp_path: Path) -> None:
    data = data_set(tmp_path).load()
    assert np.array_equal(data.train.pixels, PIXELS.transpose(0, 3, 1, 2))
    assert np.array_equal(data.train.labels, np.arange(NUM_TRAIN) % 5)
    assert len(data.test) == NUM_TEST
    assert data.class_names == ("0", "1", "2", "3", "4")
    assert data.mean == pytest.approx((PIXELS / 255).mean(axis=(0, 1, 2)))
    assert data.std == pytest.approx((PIXELS / 255).std(axis=(0, 1, 2)))


def test_several_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    whole = rows(NUM_TRAIN)
    for name, part in (("train-b", slice(40, None)), ("train-a", slice(0, 40))):
        write(
            tmp_path / "data" / f"{name}.parquet", {column: values[part] for column, values in whole.items()}
        )
    write(tmp_path / "data" / "test.parquet", rows(NUM_TEST))
    data = Parquet(root=str(tmp_path), train="data/train*.parquet", test="data/test*.parquet").load()
    assert np.array_equal(data.train.pixels, PIXELS.transpose(0, 3, 1, 2))


def test_plain_binary_columns_grey_and_resizing(tmp_path: Path) -> None:
    def wide(num: int) -> dict[str, Any]:
        return {
            "picture": [png(np.full((10, 20 + i, 3), i, np.uint8)) for i in range(num)],
            "kind": [0, 1] * (num // 2),
        }

    data_set(tmp_path, wide(8), wide(4))
    data = Parquet(root=str(tmp_path), image_column="picture", image_size=5, channels=1).load()
    assert data.train.pixels.shape == (8, 1, 5, 5)
    assert np.array_equal(data.train.pixels[:, 0, 2, 2], np.arange(8))
    assert data.num_classes == 2


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    content = io.BytesIO()
    Image.fromarray(PIXELS[3]).convert(mode).save(content, "PNG")
    expected = np.asarray(Image.open(io.BytesIO(content.getvalue())).convert("RGB")).transpose(2, 0, 1)
    columns = rows(NUM_TRAIN)
    columns["image"][3] = {"bytes": content.getvalue(), "path": None}
    assert np.array_equal(data_set(tmp_path, columns).load().train.pixels[3], expected)


def test_class_names_of_the_schema(tmp_path: Path) -> None:
    names = ["ape", "bee", "cat", "dog", "eel", "fox"]
    write(tmp_path / "train.parquet", rows(20), names)
    write(tmp_path / "test.parquet", rows(3), names)
    assert Parquet(root=str(tmp_path)).load().class_names == tuple(names)
    write(tmp_path / "test.parquet", rows(3), names[:5])
    with pytest.raises(
        DataError, match=r"train files declare 6 classes and test files 5; they differ in \['fox'\]"
    ):
        Parquet(root=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("labels", "setting", "expected"),
    [
        ({"label": [1, 0] * 5, "other": [0] * 10}, None, [1, 0] * 5),
        ({"label": None, "kind": [1, 0] * 5, "text": ["a"] * 10}, None, [1, 0] * 5),
        ({"label": [0] * 10, "kind": [1, 0] * 5}, "kind", [1, 0] * 5),
    ],
)
def test_the_label_column_is_found(
    tmp_path: Path, labels: dict[str, Any], setting: str | None, expected: list[int]
) -> None:
    data_set(tmp_path, rows(10, **labels), rows(10, **labels))
    assert Parquet(root=str(tmp_path), label_column=setting).load().train.labels.tolist() == expected


LABELLED_TWICE = rows(10, label=None, fine_label=[0] * 10, coarse_label=[0] * 10)
BROKEN = rows(NUM_TRAIN)
BROKEN["image"][66] = {"bytes": png(PIXELS[0])[:60], "path": "66.png"}
OUTSIDE = rows(NUM_TRAIN)
OUTSIDE["image"][5] = {"bytes": None, "path": "5.png"}
UNEQUAL = rows(NUM_TRAIN)
UNEQUAL["image"][50] = {"bytes": png(PIXELS[0][:4, :4]), "path": None}
OBLONG = rows(2)
OBLONG["image"] = [{"bytes": png(PIXELS[0][:4]), "path": None}] * 2
EMPTY: dict[str, Any] = {
    "image": pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    "label": pa.array([], pa.int64()),
}
BAD_ROWS = [
    ("corrupt image", BROKEN, {}, r"train-00000.parquet, row 66 is not a readable image"),
    ("bytes kept elsewhere", OUTSIDE, {}, r"train-00000.parquet, row 5: column 'image' holds no image bytes"),
    ("unequal sizes", UNEQUAL, {}, r"row 50 is 4x4 pixels but others are 6x6: set image_size"),
    ("not square", OBLONG, {}, r"row 0 is 6x4 pixels, not a square: set image_size"),
    ("no image column", rows(9, image=None, img=[b""] * 9), {}, r"no column 'image'; did you mean 'img'"),
    (
        "no such label",
        rows(9),
        {"label_column": "lable"},
        r"no column 'lable'; did you mean 'label'.*columns: image, label",
    ),
    (
        "two label columns",
        LABELLED_TWICE,
        {},
        r"2 integer columns \(fine_label, coarse_label; .*label_column",
    ),
    ("no label column", rows(9, label=None), {}, r"0 integer columns \(none; all columns: image\)"),
    (
        "words as labels",
        rows(2, label=["a", "b"]),
        {},
        r"column 'label' of .* holds (large_)?string, expected class indices",
    ),
    ("empty label", rows(3, label=[0, None, 1]), {}, r"column 'label' has 1 empty labels"),
    ("unlabelled", rows(3, label=[0, -1, 4]), {}, r"labels of the train split run from -1 to 4"),
    ("no rows", EMPTY, {}, r"hold no rows"),
    (
        "more classes",
        rows(7, label=list(range(7))),
        {},
        r"class count mismatch: train labels reach 6 \(7 classes\), test.*4",
    ),
]


@pytest.mark.parametrize(
    ("train", "settings", "message"), [row[1:] for row in BAD_ROWS], ids=[r[0] for r in BAD_ROWS]
)
def test_bad_rows(tmp_path: Path, train: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    data_set(tmp_path, train)
    with pytest.raises(DataError, match=message):
        Parquet(root=str(tmp_path), **settings).load()


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4:600] = b"\xff" * 596
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, overwrite_middle, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["train-00000.parquet", "test.parquet"])
def test_a_damaged_file_is_named_with_the_remedy(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    source = data_set(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(
        DataError, match=rf"{name} \(\d+ bytes\) is not a complete parquet file.*copy or download it again"
    ):
        source.load()


def test_absent_root_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"data root {tmp_path}/not/here does not exist \(it exists up to {tmp_path}\)"
    ):
        Parquet(root=str(tmp_path / "not" / "here")).load()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file, not a folder"):
        Parquet(root=str(tmp_path / "file")).fingerprint()
    with pytest.raises(DataError, match=r"no file in .* matches train='train\*.parquet'; it holds file"):
        Parquet(root=str(tmp_path)).load()


def test_training_on_the_test_file_is_refused(tmp_path: Path) -> None:
    data_set(tmp_path)
    with pytest.raises(
        DataError, match=r"test.parquet matches both train='\*.parquet' and test='test\*.parquet'"
    ):
        Parquet(root=str(tmp_path), train="*.parquet").load()


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    source = data_set(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there" / "train-00000.parquet").rename(tmp_path / "there" / "train.parquet")
    same = Parquet(root=str(tmp_path / "there"))
    assert same.fingerprint() == source.fingerprint()
    assert Parquet(root=same.root, label_column="label").fingerprint() == source.fingerprint()
    others = [Parquet(root=same.root, image_size=6), Parquet(root=same.root, channels=1)]
    write(tmp_path / "there" / "test.parquet", rows(NUM_TEST - 1))
    prints = {source.fingerprint(), same.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(prints) == 4


@pytest.mark.parametrize(("setting", "value"), [("image_size", 0), ("channels", 4)])
def test_impossible_settings(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be .*got {value}"):
        Parquet(root=".", **{setting: value})  # type: ignore[arg-type]
