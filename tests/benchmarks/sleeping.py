"""A method that sleeps in each step and a data set of one step per epoch, as a user would write them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from methods import Batch, Step
from methods.data.base import Augment, ImageData, Images
from methods.supervised import Supervised, SupervisedSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class SleepSettings(SupervisedSettings):
    """Settings of ``sleeping``."""

    step_seconds: float = 0.5
    """How long each step sleeps before it learns."""
    number: int = 0
    """Makes trials differ."""


class Sleeping(Supervised):
    """Learns from labels, after some sleep."""

    Settings = SleepSettings
    settings: SleepSettings

    def forward(self, batch: Batch) -> Step:
        time.sleep(self.settings.step_seconds)
        return super().forward(batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """64 random images of 8x8 pixels in two classes: with a quarter held out, a batch of 48 is an epoch."""

    default_augment: ClassVar[Augment] = Augment()

    def fingerprint(self) -> str:
        return "noise"

    def load(self) -> ImageData:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
        images = Images(pixels, np.arange(64) % 2)
        return ImageData(train=images, test=images, class_names=("a", "b"), mean=(0.5,), std=(0.25,))
