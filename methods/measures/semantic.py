"""Semantic segmentation from one confusion matrix over all pixels of all pictures.

Pixels without a known class are left out before anything else, so a prediction there is never a false positive. Labels
are never resized; logits are. Averaging per picture is another number (``picture_miou``) and has another name.

Shape legend: B = batch, K = classes, H, W = sides of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.checks import check_choice
from methods.measures.table import Measure, percent

SEMANTIC_METRICS = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "picture_miou")
_UNIT = 2.0**32
"""Means of pictures are summed as multiples of 1 / this: whole numbers add up to the same in any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticRules:
    """How label maps are compared."""

    num_classes: int
    """Classes that are told apart (K), background included."""
    ignore_label: int = 255
    """Label of pixels that are not judged."""
    absent_classes: Literal["left_out", "zero"] = "left_out"
    """A class that is neither there nor predicted: left out of the mean, or counted 0 as some toolkits do."""

    def __post_init__(self) -> None:
        check_choice(self, absent_classes=("left_out", "zero"))
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if 0 <= self.ignore_label < self.num_classes:
            raise ValueError(
                f"ignore_label must not be one of the {self.num_classes} classes, got {self.ignore_label}"
            )


def predicted_labels(logits_BKHW: Tensor, height: int, width: int) -> Tensor:
    """The class of each pixel at the size of the labels, ``[B, height, width]``: logits are resized, never labels."""
    logits = logits_BKHW.float()
    if logits.shape[-2:] != (height, width):
        logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)


def confusions(predictions_BHW: Tensor, labels_BHW: Tensor, rules: SemanticRules) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns), for each picture, ``[B, K, K]`` int64.

    Raises:
        ValueError: The maps differ in size, or a judged pixel has a class outside 0..K-1.
    """
    if predictions_BHW.shape != labels_BHW.shape:
        raise ValueError(
            f"predictions are {tuple(predictions_BHW.shape)}, labels {tuple(labels_BHW.shape)}: resize the logits to "
            "the size of the labels first"
        )
    num_pictures, num_classes = len(labels_BHW), rules.num_classes
    labels, predictions = labels_BHW.long().flatten(1), predictions_BHW.long().flatten(1)
    judged = labels != rules.ignore_label
    _refuse_outside("label", labels[judged], num_classes)
    _refuse_outside("prediction", predictions[judged], num_classes)
    pictures = torch.arange(num_pictures, device=labels.device)[:, None].expand_as(labels)
    cells = (pictures * num_classes + labels) * num_classes + predictions
    counts = torch.bincount(cells[judged], minlength=num_pictures * num_classes**2)
    return counts.view(num_pictures, num_classes, num_classes)


def class_ious(confusion: Tensor) -> Tensor:
    """Overlap of each class, ``[..., K]`` float64; NaN where a class is neither there nor predicted."""
    hits = confusion.diagonal(dim1=-2, dim2=-1).double()
    return hits / (confusion.sum(dim=-1) + confusion.sum(dim=-2) - hits)


def semantic_sums(predictions_BHW: Tensor, labels_BHW: Tensor, rules: SemanticRules) -> dict[str, Tensor]:
    """Whole numbers over a batch, from which ``summarise_semantic`` makes metrics: ``confusion`` is ``[K, K]``."""
    return _sums(confusions(predictions_BHW, labels_BHW, rules), rules)


def summarise_semantic(totals: Mapping[str, Tensor], rules: SemanticRules) -> dict[str, float]:
    """Metrics in percent, NaN where nothing was counted. Classes without a pixel have no accuracy."""
    confusion = totals["confusion"].double().cpu()
    truth, hits, ious = confusion.sum(dim=1), confusion.diagonal(), class_ious(confusion)
    total = float(truth.sum())
    there = truth > 0
    return {
        "miou": 100 * float(_mean_iou(ious, rules)) if total else math.nan,
        "pixel_accuracy": percent(float(hits.sum()), total),
        "mean_accuracy": 100 * float((hits[there] / truth[there]).mean()),
        "frequency_weighted_iou": percent(float((truth[there] * ious[there]).sum()), total),
        "picture_miou": percent(float(totals["picture_iou"]) / _UNIT, float(totals["pictures"])),
    }


class SemanticRow(NamedTuple):
    """The confusion of one picture: only the cells that are not zero, so that many classes cost little."""

    cells: tuple[int, ...]
    """True class times K, plus predicted class."""
    counts: tuple[int, ...]
    """Pixels in each of these cells."""


class SemanticMeasure(Measure[SemanticRow]):
    """The metrics of ``summarise_semantic`` over pictures of any sizes."""

    def __init__(self, rules: SemanticRules) -> None:
        super().__init__(rules)
        self.rules = rules

    def update(self, sample_ids: Sequence[str], predictions: Iterable[Tensor], labels: Iterable[Tensor]) -> None:  # fmt: skip
        """Compare label maps ``[H, W]``, each pair at the size of its labels."""
        for sample_id, predicted, truth in zip(sample_ids, predictions, labels, strict=True):
            cells = confusions(predicted[None], truth[None], self.rules).flatten()
            filled = cells.nonzero()[:, 0]
            self.table.add(sample_id, SemanticRow(tuple(filled.tolist()), tuple(cells[filled].tolist())))

    def compute(self, *, expected: Iterable[str] = ()) -> dict[str, float]:
        return summarise_semantic(self._totals(expected), self.rules)

    def report(self, names: Sequence[str] = ()) -> dict[str, float]:
        """Overlap of each class in percent, by its name or number; NaN for a class that is absent."""
        ious = 100 * class_ious(self._totals(())["confusion"])
        keys = names or [str(number) for number in range(self.rules.num_classes)]
        return dict(zip(keys, ious.tolist(), strict=True))

    def _totals(self, expected: Iterable[str]) -> dict[str, Tensor]:
        """Sums over all pictures, one by one: not all matrices fit into memory at once."""
        num_classes = self.rules.num_classes
        totals = _sums(torch.zeros(0, num_classes, num_classes, dtype=torch.int64), self.rules)
        for row in self.table.rows(expected):
            cells = torch.zeros(num_classes**2, dtype=torch.int64)
            cells[list(row.cells)] = torch.tensor(row.counts, dtype=torch.int64)
            for name, value in _sums(cells.view(1, num_classes, num_classes), self.rules).items():
                totals[name] = totals[name] + value
        return totals


def _sums(confusions_BKK: Tensor, rules: SemanticRules) -> dict[str, Tensor]:
    judged = confusions_BKK.flatten(1).sum(dim=1) > 0
    means = _mean_iou(class_ious(confusions_BKK[judged]), rules)
    return {
        "count": torch.full((), len(confusions_BKK), device=confusions_BKK.device),
        "confusion": confusions_BKK.sum(dim=0),
        "picture_iou": (means * _UNIT).round().long().sum(),
        "pictures": judged.sum(),
    }


def _mean_iou(ious: Tensor, rules: SemanticRules) -> Tensor:
    return ious.nan_to_num(0.0).mean(dim=-1) if rules.absent_classes == "zero" else ious.nanmean(dim=-1)


def _refuse_outside(what: str, classes: Tensor, num_classes: int) -> None:
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if len(outside):
        raise ValueError(
            f"{len(outside)} judged pixels have {what} {int(outside[0])}, expected a class in 0..{num_classes - 1}"
        )
