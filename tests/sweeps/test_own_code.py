"""A user's own method, network and data set, in a dozen lines each and without touching ours."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import Batch, Loss, Step
from methods.data.base import Augment, ImageData, Images
from methods.supervised import NetworkMethod
from orchestrator import ConfigurationError, Experiment

sys.path.append(str(Path(__file__).parents[1] / "orchestrator"))

from grounding_doubles import TinyGrounder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


# README: begin own code
class FocalSupervised(NetworkMethod):
    """Cross-entropy that looks away from what is learnt already."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        focus: float = 2.0
        """Power of the error probability with which each sample is weighted."""

    def forward(self, batch: Batch) -> Step:
        logits, _ = self.model(batch.images)
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        weights = (1 - torch.exp(-losses.detach())) ** self.settings.focus
        return Step({"focal": Loss((weights * losses).mean())})


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * in_channels, num_classes))


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """Images that are brighter on the left (class 0) or on the right (class 1)."""

    num_images: int = 200
    default_augment: ClassVar[Augment] = Augment()

    def fingerprint(self) -> str:
        return f"stripes {self.num_images}"

    def load(self) -> ImageData:
        labels = np.arange(self.num_images) % 2
        pixels = np.random.default_rng(0).integers(0, 120, (self.num_images, 1, 8, 8), dtype=np.uint8)
        pixels[labels == 0, :, :, :4] += 100
        pixels[labels == 1, :, :, 4:] += 100
        images = Images(pixels, labels)
        return ImageData(images, images, class_names=("left", "right"), mean=(0.5,), std=(0.25,))


# README: end own code


def test_readme_shows_this_code() -> None:
    source = Path(__file__).read_text()
    shown = source.partition("# README: begin own code\n")[2].partition("# README: end own code")[0].strip()
    assert shown in (Path(__file__).parents[2] / "README.md").read_text()


def test_own_method_model_and_data(tmp_path) -> None:
    experiment = Experiment(
        name="own",
        data={"dataset": "stripes", "num_images": 120},
        stages={"student": {"method": "focal", "model": "linear", "train": {"epochs": 3}}},
        search={"space": {"student.focus": {"grid": [0.0, 2.0]}}, "objective": {"maximize": "student.top1"}},
        run={"storage": str(tmp_path)},
        methods={"focal": FocalSupervised},
        models={"linear": linear},
        datasets={"stripes": Stripes},
    )
    result = experiment.run(quiet=True)
    assert list(result.table()["status"]) == ["done", "done"]
    assert result.best["student.test_top1"] > 90
    with pytest.raises(ConfigurationError, match="cannot travel as YAML"):
        experiment.submit("http://127.0.0.1:1")


def test_own_grounder_on_pictures_with_sentences(tmp_path: Path) -> None:
    experiment = Experiment(
        name="grounding",
        data={"dataset": "shapes_ref", "num_train": 16, "num_validation": 6, "num_test": 4, "image_size": 16},
        stages={"grounder": {"method": "tiny", "train": {"epochs": 2, "batch_size": 8}}},
        search={"space": {"grounder.width": {"grid": [2, 4]}}, "objective": {"maximize": "grounder.miou"}},
        run={"storage": str(tmp_path)},
        methods={"tiny": TinyGrounder},
    )
    result = experiment.run(quiet=True)
    table = result.table()
    assert list(table["status"]) == ["done", "done"]
    assert table["grounder.miou"].between(0, 100).all()
    assert {"grounder.language_gap", "grounder.test_oiou", "grounder.latency_ms"} <= set(
        result.rows[0].metrics
    )
    assert "miou %" in (result.folder / "report" / "report.md").read_text()
    assert not (result.folder / "best").exists()
    assert experiment.plan().missing == {}
