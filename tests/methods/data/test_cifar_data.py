from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from methods.base import Task
from methods.data import DATASETS, Augment
from methods.data.base import DataError, channel_statistics
from methods.data.cifar import Cifar10, Cifar100

SHARED = Path(__file__).parents[3] / "../shared/data/cifar100"
RNG = np.random.default_rng(0)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real CIFAR-100 parquet files are not beside the repository"
)
def test_the_real_cifar100_in_parquet_files() -> None:
    data = Cifar100(root=str(SHARED)).load()
    assert data.task() == Task(num_classes=100, in_channels=3, image_size=32)
    assert (len(data.train), len(data.test)) == (25_000, 10_000)
    assert set(np.bincount(data.train.labels)) == {250}
    assert set(np.bincount(data.test.labels)) == {100}
    assert data.class_names[0] == "apple"
    assert data.class_names[-1] == "worm"
    assert data.mean == (0.5071, 0.4867, 0.4408)
    assert data.std == (0.2675, 0.2565, 0.2761)
    mean, std = channel_statistics(data.train.pixels)
    assert mean == pytest.approx(data.mean, abs=0.002)
    assert std == pytest.approx(data.std, abs=0.002)


def save(file: Path, content: object) -> str:
    """Write one file of the official archive; returns its MD5 sum."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))
    return hashlib.md5(file.read_bytes()).hexdigest()


def official(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, num_per_file: int = 6) -> np.ndarray:
    """A tiny archive in the official layout, whose sums torchvision accepts; returns the training pixels."""
    reader = getattr(torchvision.datasets, name)
    classes, label = (100, "fine_labels") if name == "CIFAR100" else (10, "labels")
    place, pixels = root / reader.base_folder, []

    def batch(file: str) -> tuple[str, str]:
        data = RNG.integers(0, 256, (num_per_file, 3072), dtype=np.uint8)
        pixels.append(data.reshape(-1, 3, 32, 32))
        return file, save(
            place / file, {"data": data, label: RNG.integers(0, classes, num_per_file).tolist()}
        )

    monkeypatch.setattr(reader, "train_list", [batch(file) for file, _ in reader.train_list])
    train = np.concatenate(pixels)
    monkeypatch.setattr(reader, "test_list", [batch(file) for file, _ in reader.test_list])
    names = {reader.meta["key"]: [f"class {i}" for i in range(classes)]}
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": save(place / reader.meta["filename"], names)})
    return train


@pytest.mark.parametrize(
    ("source", "name", "classes"), [(Cifar10, "CIFAR10", 10), (Cifar100, "CIFAR100", 100)]
)
def test_the_official_layout(
    source: type[Cifar10] | type[Cifar100],
    name: str,
    classes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = official(tmp_path, name, monkeypatch)
    data = source(root=str(tmp_path)).load()
    assert np.array_equal(data.train.pixels, train)
    assert len(data.test) == 6
    assert data.task() == Task(num_classes=classes, in_channels=3, image_size=32)
    assert data.class_names[3] == "class 3"
    assert data.train.labels.dtype == np.int64
    assert DATASETS[name.lower()] is source
    assert source.default_augment == Augment(pad=4, flip=True)


def test_the_official_fingerprint_needs_no_reading_and_ignores_the_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "cifar-100-python").mkdir(parents=True)
    (tmp_path / "here" / "cifar-10-batches-py").mkdir()
    here = Cifar100(root=str(tmp_path / "here")).fingerprint()
    assert here == Cifar100(root=str(tmp_path / "there")).fingerprint()
    assert here == Cifar100(root=str(tmp_path / "nowhere"), download=True).fingerprint()
    assert here != Cifar10(root=str(tmp_path / "here")).fingerprint()


@pytest.mark.parametrize("table", ["train_list", "test_list"])
def test_another_release_has_another_fingerprint(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    before = Cifar10(root=str(tmp_path)).fingerprint()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, table, [("renewed", "0" * 32)])
    assert Cifar10(root=str(tmp_path)).fingerprint() != before


def test_a_changed_archive_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(tmp_path, "CIFAR10", monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(b"something else")
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled a file that was not checked"))
    with pytest.raises(
        DataError, match=r"cifar-10-batches-py is incomplete, or not the official release.*download: true"
    ):
        Cifar10(root=str(tmp_path)).load()


def test_neither_layout(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    for read in (Cifar100(root=str(tmp_path)).load, Cifar100(root=str(tmp_path)).fingerprint):
        with pytest.raises(
            DataError, match=r"neither the folder cifar-100-python.*nor train\*.parquet; it holds readme.txt"
        ):
            read()
    with pytest.raises(DataError, match="absent does not exist"):
        Cifar10(root=str(tmp_path / "absent")).load()
