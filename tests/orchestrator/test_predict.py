"""``stillhouse predict`` on a real grounder of a few steps: the same masks as in training, and one message for all that is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import planner_of
from grounding_artifact import StoredTrial, changes, stored
from grounding_doubles import CATALOG, TinyGrounder
from PIL import Image

from methods import BUILTIN
from methods.data.base import Augment, StreamSettings
from methods.grounding.annotation_masks import decode_mask
from methods.grounding.expressions import Expressions
from methods.grounding.shapes_ref import ShapesRef
from orchestrator import Predictions, predict
from orchestrator.cli import main
from orchestrator.errors import ConfigurationError, MissingArtifactError
from orchestrator.plan import Point
from orchestrator.prediction import read_image
from orchestrator.spec import RunSettings
from orchestrator.stage import StageRunner, load_source
from orchestrator.store import Store

SCENES = ShapesRef(num_train=48, num_validation=9, num_test=4, image_size=24)


@dataclass(frozen=True)
class Shelf:
    """A store with one grounder, and scenes that it was not trained on."""

    store: Store
    key: str
    scenes: Expressions

    def pixels(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.scenes.sample(index).image.transpose(1, 2, 0))


@pytest.fixture
def shelf(grounder: StoredTrial) -> Shelf:
    scenes = SCENES.load().validation
    assert scenes is not None
    return Shelf(grounder.store, grounder.trial.key, scenes)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(path: Path, pixels: np.ndarray, **options: Any) -> str:
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def command(shelf: Shelf, *arguments: str) -> int:
    return main(["predict", *arguments, "--storage", shelf.store.url.removeprefix("file://"), "--device", "cpu"])  # fmt: skip


def test_masks_are_those_that_evaluation_judges(shelf: Shelf) -> None:
    """Without the data set's help: its scenes come as plain pixels, its sentences as plain text."""
    network = load_source(shelf.store, shelf.key, BUILTIN).teacher().network
    data = planner_of(changes()).trial(Point(), 0).final.data.source.load()
    settings = StreamSettings(batch_size=4, evaluation_batch_size=9, seed=0, augment=Augment(), validation=0.1, device=torch.device("cpu"))  # fmt: skip
    (batch,) = data.streams(settings)["validation"].batches(0)
    with torch.no_grad():
        expected = network(batch).mask_logits[:, 0].numpy() > 0
    assert expected.any(axis=(1, 2)).all()
    for index, sentence in enumerate(shelf.scenes.sentences(np.arange(9))):
        found = predict(shelf.key[:8], shelf.pixels(index), sentence, storage=shelf.store, device="cpu")
        assert np.array_equal(found.items[0].mask, expected[index])


def test_the_command_writes_a_document_and_overlays(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    large = np.asarray(Image.fromarray(shelf.pixels(0)).resize((70, 50)))
    image = save(tmp_path / "My Photo.png", large)
    arguments = [shelf.key[:6], "--image", image, "--text", "the red circle", "--text", "a purple mug / on the left", "--out", "found/here"]  # fmt: skip
    assert command(shelf, *arguments) == 0
    printed = capsys.readouterr()
    folder = tmp_path / "found" / "here"
    base = f"my-photo-{shelf.key[:8]}"
    names = [f"{base}-1-the-red-circle.png", f"{base}-2-a-purple-mug-on-the-left.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, f"{base}.json"]
    for name in [*names, f"{base}.json"]:
        assert f"found/here/{name}" in printed.out
    assert printed.err == "warning: 'a purple mug / on the left': the network does not know 'mug'; it read a placeholder\n"  # fmt: skip
    document = json.loads((folder / f"{base}.json").read_text())
    assert document["key"] == shelf.key
    assert document["size"] == [50, 70]
    first, second = document["predictions"]
    assert [first["overlay"], second["overlay"]] == names
    assert (first["unknown_words"], second["unknown_words"]) == ([], ["mug"])
    mask = decode_mask(first["segmentation"], 50, 70)
    assert int(mask.sum()) == first["area"] > 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, width, height = first["bbox"]
    assert f"'the red circle': {first['area']:,} pixels" in printed.out
    assert f", x {left} to {left + width}, y {top} to {top + height} (from the mask)\n" in printed.out
    assert columns[0] <= left < left + width <= columns[-1] + 1
    assert rows[0] <= top < top + height <= rows[-1] + 1
    assert first["bbox_from"] == "mask"
    assert first["no_target_probability"] is None
    drawn = np.asarray(Image.open(folder / names[0]).convert("RGB"))
    assert drawn.shape == (50, 70, 3)
    assert drawn[~mask].mean() < 0.6 * large[~mask].mean()


def test_what_is_too_long_is_told_and_read_up_to_there(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    image = save(tmp_path / "x.png", shelf.pixels(0))
    long = "the small red circle on the left of the picture at the top"
    assert command(shelf, shelf.key, "--image", image, "--text", long) == 0
    assert capsys.readouterr().err.endswith(
        "is too long for the network: its last 3 token(s) were not read\n"
    )
    cut = " ".join(long.split()[:10])
    masks = [predict(shelf.key, image, text, storage=shelf.store).items[0].mask for text in (long, cut)]
    assert np.array_equal(*masks)


def turned(path: Path, pixels: np.ndarray) -> None:
    """Stored lying on its side, with the note that it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(path, exif=exif)


def transparent(path: Path, pixels: np.ndarray) -> None:
    opacity = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    opacity[:5] = 0
    Image.fromarray(np.concatenate([pixels, opacity], axis=2)).save(path)


def test_images_are_read_as_people_see_them(shelf: Shelf, tmp_path: Path) -> None:
    pixels = np.ascontiguousarray(np.concatenate([shelf.pixels(0), shelf.pixels(1)], axis=1))
    grey = pixels.mean(axis=2).astype(np.uint8)
    white = pixels.copy()
    white[:5] = 255
    turned(tmp_path / "turned.png", pixels)
    transparent(tmp_path / "transparent.png", pixels)
    save(tmp_path / "grey.png", grey)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(pixels).quantize(64).save(tmp_path / "palette.gif")
    three = np.repeat(grey[..., None], 3, axis=2)
    for name, expected in (("turned", pixels), ("transparent", white), ("grey", three), ("deep", three)):
        assert np.array_equal(read_image(tmp_path / f"{name}.png"), expected), name
    assert np.abs(read_image(tmp_path / "palette.gif").astype(int) - pixels).mean() < 10
    upright = predict(shelf.key, pixels, "circle", storage=shelf.store).items[0]
    found = predict(shelf.key, tmp_path / "turned.png", "circle", storage=str(shelf.store.url))
    assert np.array_equal(found.items[0].mask, upright.mask)
    assert found.document()["size"] == [24, 48]


def test_a_student_needs_neither_data_nor_teacher(tmp_path: Path) -> None:
    document = changes()
    teacher = {**document["stages"]["grounder"], "train": {"epochs": 1, "batch_size": 24}}
    student = {**teacher, "method": "latent_vg_kd", "teacher": "$teacher"}
    document |= {"stages": {"teacher": teacher, "grounder": student}}
    store, trial, _ = stored(tmp_path / "store", document)
    found = predict(trial.key, np.zeros((9, 9, 3), np.uint8), "circle", storage=store)
    assert found.method == "latent_vg_kd"
    teacher_key = trial.stages[0].key
    shutil.rmtree(tmp_path / "store" / "artifacts" / teacher_key[:2] / teacher_key)
    again = predict(trial.key, np.zeros((9, 9, 3), np.uint8), "circle", storage=store)
    assert np.array_equal(again.items[0].mask, found.items[0].mask)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str, str]:
    """A store with a classifier and with a grounder of the user's own."""
    folder = tmp_path_factory.mktemp("others")
    document = changes({"method": "tiny_grounder", "train": {"epochs": 1, "batch_size": 24}})
    store, trial, _ = stored(folder, document, CATALOG)
    digits = {"data": {"dataset": "digits"}, "stages": {"student": {"method": "supervised", "model": "mini_cnn", "train": {"epochs": 1}}}}  # fmt: skip
    classifier = planner_of({**changes(), **digits, "search/objective": {"maximize": "student.top1"}}).trial(Point(), 0)  # fmt: skip
    StageRunner(store, BUILTIN, RunSettings(), lambda data: data.source.load()).execute(classifier.final, lambda row: None)  # fmt: skip
    return store, trial.key, classifier.key


def test_what_is_no_grounder_of_ours_is_refused_by_the_name_of_its_method(others: tuple[Store, str, str]) -> None:  # fmt: skip
    store, own, classifier = others
    pixels = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ConfigurationError, match=rf"artifact {classifier[:8]} \(stage 'student'\) was made by 'supervised', which takes no sentences; predict needs a grounder: latent_vg, "):  # fmt: skip
        predict(classifier, pixels, "circle", storage=store)
    with pytest.raises(ConfigurationError, match=r"was made by 'tiny_grounder', a method that is not ours: .*methods="):  # fmt: skip
        predict(own, pixels, "circle", storage=store)
    found = predict(own, pixels, "circle", storage=store, methods={"tiny_grounder": TinyGrounder})
    assert isinstance(found, Predictions)
    assert found.items[0].mask.shape == (9, 9)
    assert "panel.png" not in store.manifest(own)["files"]  # it draws none, and need not


WRONG = [
    (["KEY", "--image", "absent.jpg", "--text", "x"], "--image: absent.jpg: there is no such file"),
    (["KEY", "--image", ".", "--text", "x"], "--image: . is not a readable image: "),
    (["KEY", "--image", "notes.txt", "--text", "x"], "--image: notes.txt is not a readable image: "),
    (["KEY", "--image", "cut.png", "--text", "x"], "--image: cut.png is not a readable image: "),
    (["KEY", "--image", "x.png", "--text", "circle", "--text", " "], "--text: a text is empty (got ['circle', ' '])"),
    (["KEY", "--image", "x.png", "--text", "?!"], "--text: sentence 0 of 1 is empty ('?!')"),
    (["KEY", "--image", "x.png", "--text", "circle", "--device", "gpu"], "--device: 'gpu' cannot be used here: "),
    (["KEY", "--image", "x.png", "--text", "circle", "--out", "notes.txt"], "--out: notes.txt cannot be written: "),
    (["xyz", "--image", "x.png", "--text", "circle"], "the start of a key is lower-case hexadecimal, got 'xyz'"),
    (["NEAR", "--image", "x.png", "--text", "circle"], "no artifact in "),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), WRONG)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], expected: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "x.png", shelf.pixels(0))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:300])
    other = "0" if shelf.key[7] != "0" else "1"
    spelt = {"KEY": shelf.key, "NEAR": f"{shelf.key[:7]}{other}"}
    if "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    storage = shelf.store.url.removeprefix("file://")
    assert main(["predict", *(spelt.get(word, word) for word in arguments), "--storage", storage]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
    if "NEAR" in arguments:
        assert line.endswith(f"; near it are {shelf.key[:8]}")


@pytest.mark.parametrize("arguments", [["abcd", "--image", "x.png"], ["abcd", "--text", "x"], ["--image", "x", "--text", "y"]])  # fmt: skip
def test_image_text_and_key_are_needed(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["predict", *arguments])
    assert left.value.code == 2


@pytest.mark.parametrize(
    "pixels", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)]
)  # fmt: skip
def test_pixels_of_another_layout_are_refused(pixels: np.ndarray, shelf: Shelf) -> None:
    with pytest.raises(ConfigurationError, match=r"pixels must be uint8 \[H, W, 3\], got"):
        predict(shelf.key, pixels, "circle", storage=shelf.store)


def test_an_unknown_key_without_near_ones(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match=r"has a key that starts with abcd$"):
        predict("abcd", np.zeros((9, 9, 3), np.uint8), "x", storage=str(tmp_path))
