from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from methods.base import Batch
from methods.data.base import Augment, DataError, ImageData, Images
from methods.data.imagefolder import FolderPixels, ImageFolder
from methods.data.stream import Stream

COLOURS = {"ape": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}


def picture(file: Path, colour: tuple[int, int, int], number: int, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((12 + number, 16, 3), colour, dtype=np.uint8)
    pixels += np.random.default_rng(number).integers(0, 40, pixels.shape, dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, num in (("train", 5), ("val", 2)):
        for name, colour in COLOURS.items():
            for number in range(num):
                picture(tmp_path / "set" / split / name / f"{number}.png", colour, number)
    return tmp_path / "set"


def test_classes_are_the_folders_in_alphabetical_order(root: Path) -> None:
    (root / "train" / "ape" / "notes.txt").write_text("not an image")
    (root / "train" / ".cache").mkdir()
    data = ImageFolder(root=str(root), image_size=8).load()
    assert data.class_names == ("ape", "bee", "cat")
    assert data.train.pixels.shape == (15, 3, 8, 8)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    brightest = data.train.gather(np.arange(15)).mean(axis=(2, 3)).argmax(axis=1)
    assert np.array_equal(brightest, data.train.labels)
    assert len(data.test) == 6


def test_test_is_preferred_to_val(root: Path) -> None:
    shutil.copytree(root / "val", root / "test")
    for name in COLOURS:
        (root / "test" / name / "1.png").unlink()
    assert len(ImageFolder(root=str(root), image_size=8).load().test) == 3


def test_decoding_on_demand_equals_decoding_at_once(root: Path) -> None:
    eager = ImageFolder(root=str(root), image_size=8, in_memory="always").load()
    lazy = ImageFolder(root=str(root), image_size=8, in_memory="never").load()
    assert isinstance(eager.train.pixels, np.ndarray)
    assert isinstance(lazy.train.pixels, FolderPixels)
    assert (eager.mean, eager.std) == (lazy.mean, lazy.std)
    travelled = pickle.loads(pickle.dumps(lazy.train))
    for one, other in zip(_batches(eager.train, eager), _batches(travelled, lazy), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def _batches(images: Images, data: ImageData) -> Iterator[Batch]:
    stream = Stream(
        images,
        indices=np.arange(len(images)),
        batch_size=4,
        seed=0,
        mean=data.mean,
        std=data.std,
        augment=Augment(pad=1, flip=True),
        shuffle=True,
        device=torch.device("cpu"),
    )
    return stream.batches(0)


def test_auto_decides_by_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ImageFolder(root=str(root), image_size=8)
    assert isinstance(source.load().train.pixels, np.ndarray)
    monkeypatch.setattr("methods.data.imagefolder.MEMORY_BYTES", 8 * 8 * 3 * 10)
    loaded = source.load()
    assert isinstance(loaded.train.pixels, FolderPixels)
    assert isinstance(loaded.test.pixels, np.ndarray)


def test_grey_palette_transparent_and_turned_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "LA", "1"):
        picture(tmp_path / f"{mode}.png", (200, 30, 30), 0, mode)
    turned = np.zeros((8, 8, 3), dtype=np.uint8)
    turned[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the bright left side becomes the top
    Image.fromarray(turned).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    files = tuple(sorted(tmp_path.iterdir()))
    pixels = FolderPixels(files, 8, 3).gather(np.arange(len(files)))
    assert pixels.shape == (6, 3, 8, 8)
    assert pixels[-1][:, :3].min() > 240
    assert pixels[-1][:, 5:].max() < 15


def test_shorter_side_is_scaled_and_the_centre_kept(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert FolderPixels((tmp_path / "wide.png",), 10, 3).gather(np.array([0])).min() == 255


def _empty_class(root: Path) -> None:
    (root / "train" / "dog").mkdir()


def _extra_test_class(root: Path) -> None:
    picture(root / "val" / "dog" / "0.png", (1, 1, 1), 0)


def _flat(root: Path) -> None:
    for name in COLOURS:
        shutil.rmtree(root / "train" / name)
    picture(root / "train" / "0.png", (1, 1, 1), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "data root .*set does not exist"),
        (
            lambda root: shutil.rmtree(root / "val"),
            "needs a folder train and a folder test or val; it holds train/",
        ),
        (
            lambda root: shutil.rmtree(root / "train"),
            "needs a folder train and a folder test or val; it holds val/",
        ),
        (_flat, "train holds no class folders, but 0.png: expected .*CLASS"),
        (_empty_class, "class folder .*dog holds no image but nothing"),
        (
            _extra_test_class,
            "class count mismatch: .*train holds 3 classes and .*val 4; only one of them has dog",
        ),
        (
            lambda root: (root / "train" / "bee" / "3.png").write_bytes(b"x"),
            "bee/3.png is not a readable image",
        ),
        (lambda root: _halve(root / "val" / "cat" / "1.png"), "cat/1.png is not a readable image"),
    ],
)
def test_bad_folders(root: Path, change: Callable[[Path], object], message: str) -> None:
    change(root)
    with pytest.raises(DataError, match=message):
        ImageFolder(root=str(root), image_size=8).load()


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_broken_image_found_later_is_named(root: Path) -> None:
    data = ImageFolder(root=str(root), image_size=8, in_memory="never").load()
    _halve(root / "train" / "cat" / "2.png")
    with pytest.raises(DataError, match=r"cat/2\.png is not a readable image"):
        list(_batches(data.train, data))


def test_the_fingerprint_follows_content_and_not_place(root: Path, tmp_path: Path) -> None:
    source = ImageFolder(root=str(root), image_size=8)
    shutil.copytree(root, tmp_path / "there")
    same = ImageFolder(root=str(tmp_path / "there"), image_size=8, in_memory="never")
    first = source.fingerprint()
    assert same.fingerprint() == first
    prints = {first, ImageFolder(root=str(root), image_size=9).fingerprint()}
    file = root / "train" / "ape" / "0.png"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    prints.add(source.fingerprint())
    file.rename(file.with_name("9.png"))
    prints.add(source.fingerprint())
    assert len(prints) == 4


def test_a_large_folder_is_known_by_names_and_sizes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.data.imagefolder.DIGEST_BYTES", 0)
    source = ImageFolder(root=str(root), image_size=8)
    before = source.fingerprint()
    _halve(root / "train" / "ape" / "0.png")
    assert source.fingerprint() != before


@pytest.mark.parametrize(("setting", "value"), [("image_size", 0), ("channels", 2), ("in_memory", "maybe")])
def test_impossible_settings(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be .*got '?{value}"):
        ImageFolder(root=".", **{setting: value})  # type: ignore[arg-type]
