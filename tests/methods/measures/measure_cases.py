"""One filled measure of each family, sample by sample: what every family's tests of merging go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from methods.measures.classification import ClassificationMeasure
from methods.measures.localisation import LocalisationMeasure
from methods.measures.localisation_rules import LocalisationRules
from methods.measures.pixel_precision import PixelPrecisionMeasure, PixelPrecisionRules
from methods.measures.semantic import SemanticMeasure, SemanticRules
from methods.measures.table import Measure

NUM_SAMPLES = 9
IDS = [f"set/val/{number}" for number in range(NUM_SAMPLES)]
NUM_CLASSES = 7
SEMANTIC = SemanticRules(num_classes=NUM_CLASSES)
LOCALISATION = LocalisationRules(name="ours", num_thresholds=10, threshold=0.3)
HISTOGRAMS = PixelPrecisionRules(num_bins=50)


def random_samples(seed: int = 0) -> dict[str, Any]:
    """Scores of classes, label maps, score maps and truths of a few samples, on rough grids so that there are ties."""
    random = np.random.default_rng(seed)
    return {
        "scores": torch.from_numpy(random.integers(0, 5, (NUM_SAMPLES, NUM_CLASSES)) / 4).float(),
        "labels": torch.from_numpy(random.integers(0, NUM_CLASSES, NUM_SAMPLES)),
        "predicted": torch.from_numpy(random.integers(0, NUM_CLASSES, (NUM_SAMPLES, 6, 5))),
        "truth": torch.from_numpy(random.choice([*range(NUM_CLASSES), 255], (NUM_SAMPLES, 6, 5))),
        "maps": random.integers(0, 9, (NUM_SAMPLES, 8, 10)) / 8,
        "boxes": np.array([[[1, 1, 4 + number % 5, 6]] for number in range(NUM_SAMPLES)]),
        "masks": random.choice([0, 1, 255], (NUM_SAMPLES, 8, 10)),
    }


def classification(samples: Mapping[str, Any], rows: list[int]) -> ClassificationMeasure:
    measure = ClassificationMeasure()
    measure.update([IDS[row] for row in rows], samples["scores"][rows], samples["labels"][rows])
    return measure


def semantic(samples: Mapping[str, Any], rows: list[int]) -> SemanticMeasure:
    measure = SemanticMeasure(SEMANTIC)
    measure.update([IDS[row] for row in rows], samples["predicted"][rows], samples["truth"][rows])
    return measure


def localisation(samples: Mapping[str, Any], rows: list[int]) -> LocalisationMeasure:
    measure = LocalisationMeasure(LOCALISATION)
    measure.update(
        [IDS[row] for row in rows], samples["maps"][rows], samples["boxes"][rows], samples["scores"][rows],
        samples["labels"][rows],
    )  # fmt: skip
    return measure


def pixel_precision(samples: Mapping[str, Any], rows: list[int]) -> PixelPrecisionMeasure:
    measure = PixelPrecisionMeasure(HISTOGRAMS)
    measure.update([IDS[row] for row in rows], samples["maps"][rows], samples["masks"][rows])
    return measure


FAMILIES: dict[str, Callable[[Mapping[str, Any], list[int]], Measure[Any]]] = {
    "classification": classification,
    "semantic": semantic,
    "localisation": localisation,
    "pixel_precision": pixel_precision,
}
