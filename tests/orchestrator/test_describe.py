"""Texts about methods, models and artifacts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from methods import BUILTIN
from orchestrator.describe import artifact_text, methods_text, models_text
from orchestrator.errors import ConfigurationError, MissingArtifactError
from orchestrator.store import Store

TEACHER, STUDENT = "a" * 32, "b" * 32


def test_all_methods_are_listed_with_a_line_each() -> None:
    lines = methods_text().splitlines()
    for line, name in zip(lines, BUILTIN.methods, strict=False):
        assert line.split()[0] == name
        assert len(line.split()) > 3
    assert lines[-1] == "stillhouse methods NAME shows the settings of one."


@pytest.mark.parametrize("name", list(BUILTIN.methods))
def test_a_method_is_shown_with_every_setting_its_default_and_its_meaning(name: str) -> None:
    text = methods_text(name)
    lines = text.splitlines()
    assert lines[0] == name
    for field in fields(BUILTIN.method(name).Settings):
        (line,) = [index for index, line in enumerate(lines) if line.startswith(f"  {field.name} = ")][:1]
        assert lines[line] == f"  {field.name} = {field.default}"
        assert lines[line + 1].startswith("      ")
    train = lines[lines.index("train:") :]
    assert f"  epochs = {BUILTIN.method(name).train_defaults.get('epochs', 240)}" in train


def test_inputs_and_signals_of_a_method() -> None:
    text = methods_text("angular_kd")
    assert "  teacher: $STAGE that emits views" in text
    assert "emits: logits, maps, pooled" in text
    assert "metrics: top1, top5, loss" in text
    assert "inputs:\n  none" in methods_text("supervised")
    assert "arXiv 2510.22480" in text


@pytest.mark.parametrize("describe", [methods_text, models_text])
def test_an_unknown_name(describe: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"'angular_kdd?' is not a (method; did you mean 'angular_kd'|model)"
    ):
        describe("angular_kdd")


def test_models_with_their_parameters() -> None:
    text = models_text("resnet20")
    assert text.split() == ["resnet20", "278,324", "parameters", "pooled", "width", "64"]
    assert "timm/NAME" not in text


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    content = {
        "method": "supervised", "method_version": 1, "settings": {"label_smoothing": 0.0}, "train": {"epochs": 3},
        "data": {"fingerprint": "f0"},
    }  # fmt: skip
    manifest = {
        "name": "teacher", "content": content, "model": {"name": "resnet8"}, "seed": 0, "dataset": "digits", "inputs": {},
        "metrics": {"top1": 91.23456, "num_parameters": 12345.0},
        "cost": {"seconds": 75.0, "cpu_seconds": 3.0},
        "placement": {"device": "cpu (x86_64)", "host": "here", "workers": 1},
        "versions": {"torch": "2"},
    }  # fmt: skip
    store.put(TEACHER, {"weights.safetensors": b"0123"}, manifest)
    views = {**content, "method": "angular_views"}
    store.put(STUDENT, {"weights.safetensors": b"45"}, {**manifest, "name": "views", "content": views, "model": None, "inputs": {"teacher": TEACHER}})  # fmt: skip
    return store


def test_an_artifact_with_its_lineage(store: Store) -> None:
    text = artifact_text(store, "aaaa")
    for line in (
        f"teacher  {TEACHER}", "state: complete, checksums right", "method: supervised (version 1)",
        "model: resnet8, 12,345 parameters", "  label_smoothing = 0.0", "  top1 = 91.23", "seed: 0",
        "cost: 1 min 15 s (3.0 s CPU) on cpu (x86_64), host here, 1 worker(s)", "versions: torch 2",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert artifact_text(store, "bb").endswith(f"lineage:\n  views {STUDENT[:8]}  angular_views\n    teacher: teacher {TEACHER[:8]}  supervised resnet8")  # fmt: skip


def test_damage_and_absence_are_named(store: Store, tmp_path: Path) -> None:
    attempt = store.manifest(STUDENT)["attempt"]
    (tmp_path / "artifacts" / "bb" / STUDENT / attempt / "weights.safetensors").write_bytes(b"46")
    store.set_aside(TEACHER, "removed")
    text = artifact_text(store, "bb")
    assert "state: DAMAGED: artifact bbbb" in text
    assert text.endswith(f"teacher: {TEACHER} (not in this store)")
    with pytest.raises(MissingArtifactError, match=r"no artifact in .* has a key that starts with aa"):
        artifact_text(store, "aa")
