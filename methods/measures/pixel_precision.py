"""Pixel average precision: area under the precision-recall curve of score maps, from histograms of their scores.

Scores fall into ``num_bins`` equal bins; too few under-report. A score of exactly 1 has a bin of its own, and one on an
edge may fall on either side. Choe et al., arXiv 2001.07437 (``px_ap``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from methods.measures.table import Measure

IGNORED = 255
"""Value of pixels in a true mask that are not judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelPrecisionRules:
    """How finely scores are told apart."""

    num_bins: int = 1000
    """Equal parts of 0..1."""

    def __post_init__(self) -> None:
        if self.num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {self.num_bins}")


def score_histograms(scores: np.ndarray, truth: np.ndarray, rules: PixelPrecisionRules) -> np.ndarray:
    """Pixels by score, background in the first row and object in the second, ``[2, num_bins + 1]`` int64.

    Args:
        scores: In 0..1, any shape; of one picture.
        truth: 1 on the object, 0 beside it, 255 where nothing is judged; of the same shape.
        rules: Number of bins.

    Raises:
        ValueError: Shapes differ, or scores or truth have other values.
    """
    if scores.shape != truth.shape:
        raise ValueError(f"scores are {scores.shape}, the true mask {truth.shape}: resize the scores first")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(
            f"scores must lie in 0..1, got {scores.min()!r}..{scores.max()!r}: scale the map first (scaled_scores)"
        )
    if not np.isin(truth, (0, 1, IGNORED)).all():
        raise ValueError(f"a true mask holds 0, 1 and {IGNORED} only, got {np.unique(truth)[:5].tolist()}")
    judged = truth != IGNORED
    bins = (np.asarray(scores, dtype=np.float64)[judged] * rules.num_bins).astype(np.int64)
    width = rules.num_bins + 1
    return np.bincount(truth[judged].astype(np.int64) * width + bins, minlength=2 * width).reshape(2, width)


def pixel_precision_sums(
    scores: Iterable[np.ndarray], truths: Iterable[np.ndarray], rules: PixelPrecisionRules
) -> dict[str, Tensor]:
    """Whole numbers over pictures that add up over batches and workers."""
    histograms = [score_histograms(*pair, rules) for pair in zip(scores, truths, strict=True)]
    return {
        "count": torch.tensor(len(histograms)),
        "score_histograms": torch.from_numpy(np.sum(histograms, axis=0)),
    }


def summarise_pixel_precision(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """``px_ap`` in percent; NaN where there is no pixel of an object."""
    background, objects = totals["score_histograms"].double().flip(-1).cumsum(dim=-1)
    if not objects[-1]:
        return {"px_ap": math.nan}
    precision = (objects / (objects + background)).nan_to_num(0.0)
    recall = objects / objects[-1]
    return {"px_ap": 100 * float((precision * recall.diff(prepend=recall.new_zeros(1))).sum())}


class HistogramRow(NamedTuple):
    """The histograms of one picture."""

    counts: bytes
    """``[2, num_bins + 1]`` int32."""


class PixelPrecisionMeasure(Measure[HistogramRow]):
    """``px_ap`` over pictures of any sizes. Keeps 8 bytes per picture and bin."""

    def __init__(self, rules: PixelPrecisionRules) -> None:
        super().__init__(rules)
        self.rules = rules

    def update(self, sample_ids: Sequence[str], scores: Iterable[np.ndarray], truths: Iterable[np.ndarray]) -> None:  # fmt: skip
        """Count score maps in 0..1 against true masks, picture by picture."""
        for sample_id, scores_HW, truth_HW in zip(sample_ids, scores, truths, strict=True):
            counts = score_histograms(scores_HW, truth_HW, self.rules)
            self.table.add(sample_id, HistogramRow(counts.astype(np.int32).tobytes()))

    def compute(self, *, expected: Iterable[str] = ()) -> dict[str, float]:
        totals = np.zeros(2 * (self.rules.num_bins + 1), dtype=np.int64)
        for row in self.table.rows(expected):
            totals += np.frombuffer(row.counts, dtype=np.int32)
        return summarise_pixel_precision({"score_histograms": torch.from_numpy(totals.reshape(2, -1))})
