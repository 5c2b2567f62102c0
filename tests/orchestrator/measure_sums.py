"""Metrics of every family from the sums of however many workers: each has judged its own rows of one random set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.metrics import grounding_sums, summarise_grounding
from methods.measures import classification_sums
from methods.measures.localisation import localisation_sums, localised_rows, summarise_localisation
from methods.measures.localisation_rules import LocalisationRules
from methods.measures.pixel_precision import (
    PixelPrecisionRules,
    pixel_precision_sums,
    summarise_pixel_precision,
)
from methods.measures.semantic import SemanticRules, semantic_sums, summarise_semantic
from orchestrator.workers import Workers

NUM_ROWS, NUM_CLASSES = 9, 6
SEMANTIC = SemanticRules(num_classes=NUM_CLASSES)
LOCALISATION = LocalisationRules(name="ours", num_thresholds=10)
HISTOGRAMS = PixelPrecisionRules(num_bins=20)


def sums_of(rows: slice) -> dict[str, dict[str, Tensor]]:
    """Sums of each family over these rows."""
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.integers(0, 5, (NUM_ROWS, NUM_CLASSES)) / 4)[rows]
    labels = torch.from_numpy(random.integers(0, NUM_CLASSES, NUM_ROWS))[rows]
    predicted = torch.from_numpy(random.integers(0, NUM_CLASSES, (NUM_ROWS, 6, 5)))[rows]
    truth = torch.from_numpy(random.choice([*range(NUM_CLASSES), 255], (NUM_ROWS, 6, 5)))[rows]
    maps, masks = random.integers(0, 9, (NUM_ROWS, 8, 10))[rows] / 8, random.integers(0, 2, (NUM_ROWS, 8, 10))[rows]  # fmt: skip
    boxes = np.tile([[[1, 1, 6, 6]]], (len(maps), 1, 1))
    localised = localised_rows(maps, boxes, scores, labels, LOCALISATION)
    return {
        "classification": classification_sums(scores, labels),
        "semantic": semantic_sums(predicted, truth, SEMANTIC),
        "localisation": localisation_sums(localised, LOCALISATION, num_classes=NUM_CLASSES),
        "pixel_precision": pixel_precision_sums(maps, masks, HISTOGRAMS),
        "grounding": _grounding_sums(maps > 0.4, masks.astype(bool)),
    }


def _grounding_sums(masks: np.ndarray, truths: np.ndarray) -> dict[str, Tensor]:
    count, height, width = masks.shape
    output = GroundingOutput(
        mask_logits=torch.from_numpy(masks).float()[:, None] - 0.5,
        pixel_embed=torch.zeros(count, 1, 1, 1),
        sentence_embed=torch.zeros(count, 1),
    )
    ids = torch.ones(count, 3, dtype=torch.int64)
    batch = GroundingBatch(
        images=torch.zeros(count, 3, height, width), token_ids=ids, token_mask=ids.bool(), boxes=torch.zeros(count, 4),
        masks=torch.from_numpy(truths).float()[:, None], is_empty=torch.zeros(count, dtype=torch.bool),
        indices=torch.arange(count), original_sizes=torch.tensor([[height, width]] * count),
    )  # fmt: skip
    return grounding_sums(output, batch)


SUMMARIES: Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, float]]] = {
    "classification": lambda totals: {name: float(totals[name]) / NUM_ROWS for name in ("top1", "top5")},
    "semantic": lambda totals: summarise_semantic(totals, SEMANTIC),
    "localisation": lambda totals: summarise_localisation(totals, LOCALISATION),
    "pixel_precision": summarise_pixel_precision,
    "grounding": summarise_grounding,
}


def judged_by(workers: Workers) -> dict[str, dict[str, Any]]:
    """Every digit of every metric, as these workers find it together."""
    own = sums_of(slice(workers.rank, None, workers.size))
    return {
        family: {name: repr(value) for name, value in SUMMARIES[family](workers.all_reduce_sum(sums)).items()}
        for family, sums in own.items()
    }
