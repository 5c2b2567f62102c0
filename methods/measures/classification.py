"""Accuracy from ranks, and the loss, as sums over a batch that do not depend on its size or the number of workers.

The rank of the true class is the number of classes with a higher score, plus those with an equal score and a smaller
index. So ties are decided alike everywhere (which of several equal scores a library's top-k names first is not defined),
and rank 0 is argmax.

Shape legend: B = batch, C = classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.losses import in_full_precision
from methods.measures.table import Measure, percent

NUM_GUESSES = 5


@in_full_precision
def classification_sums(logits_BC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Summed ``top1`` and ``top5`` (100 per hit, so that means are percents), ``loss``, and the ``count`` B.

    With fewer than five classes ``top5`` looks at all of them. Log-probabilities may stand for logits.
    """
    ranks_B = ranks(logits_BC, labels_B)
    return {
        "count": torch.full((), len(labels_B), dtype=logits_BC.dtype, device=logits_BC.device),
        "top1": 100 * (ranks_B == 0).sum(dtype=logits_BC.dtype),
        "top5": 100 * (ranks_B < num_guesses(logits_BC.shape[-1])).sum(dtype=logits_BC.dtype),
        "loss": F.cross_entropy(logits_BC, labels_B, reduction="sum"),
    }


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one, int64 of the shape of ``labels``: 0 where it is the first.

    A sample whose scores hold a NaN or plus infinity is wrong whatever they say: its rank is C.

    Args:
        scores: ``[..., C]``
        labels: The true class, ``[...]`` int64.
    """
    num_classes = scores.shape[-1]
    own = scores.gather(-1, labels[..., None])
    before = torch.arange(num_classes, device=scores.device) < labels[..., None]
    found = ((scores > own) | ((scores == own) & before)).sum(dim=-1)
    return found.masked_fill(nonfinite(scores), num_classes)


def nonfinite(scores: Tensor) -> Tensor:
    """Which samples have a NaN or plus infinity among their scores. Minus infinity is the logarithm of nothing."""
    return (scores.isnan() | scores.isposinf()).any(dim=-1)


def num_guesses(num_classes: int) -> int:
    """How many guesses ``top5`` has: five, or as many as there are classes."""
    return min(NUM_GUESSES, num_classes)


class ClassifiedRow(NamedTuple):
    """What is known about the classification of one sample."""

    label: int
    rank: int
    num_classes: int
    is_nonfinite: bool


class ClassificationMeasure(Measure[ClassifiedRow]):
    """``top1``, ``top5``, their means over classes (``mean_class_top1``) and ``num_nonfinite`` samples."""

    def __init__(self) -> None:
        super().__init__(rules="ranks")

    def update(self, sample_ids: Sequence[str], scores_BC: Tensor, labels_B: Tensor) -> None:
        """Judge a batch; its rows are named by ``sample_ids``."""
        columns = (labels_B.tolist(), ranks(scores_BC, labels_B).tolist(), nonfinite(scores_BC).tolist())
        for sample_id, label, rank, is_nonfinite in zip(sample_ids, *columns, strict=True):
            self.table.add(sample_id, ClassifiedRow(label, rank, scores_BC.shape[-1], is_nonfinite))

    def compute(self, *, expected: Iterable[str] = ()) -> dict[str, float]:
        rows = self.table.rows(expected)
        first = [row.rank == 0 for row in rows]
        labels = [row.label for row in rows]
        return {
            "top1": percent(sum(first), len(rows)),
            "top5": percent(sum(row.rank < num_guesses(row.num_classes) for row in rows), len(rows)),
            "mean_class_top1": class_mean(first, labels),
            "num_nonfinite": float(sum(row.is_nonfinite for row in rows)),
        }


def class_mean(hits: Sequence[bool], labels: Sequence[int]) -> float:
    """Percent of hits in each class that has samples, and of these the mean: rare classes weigh as much as others."""
    counts: dict[int, list[int]] = {}
    for hit, label in zip(hits, labels, strict=True):
        count = counts.setdefault(label, [0, 0])
        count[0] += hit
        count[1] += 1
    return percent(math.fsum(part / whole for part, whole in counts.values()), len(counts))
