"""Weakly supervised localisation: how well boxes of score maps fit, at one threshold and at the best one.

``gt_known`` looks at the map of the true class only; ``top1_localisation`` also wants that class first and
``top5_localisation`` among the five best. ``max_box_acc`` and ``max_box_acc_v2`` choose one threshold for the whole set on
the set itself, so they are for validation data, or for data that are never tuned on.

Choe et al., arXiv 2001.07437 (``max_box_acc``) and its journal version (``max_box_acc_v2``).

Shape legend: H, W = sides of a map, M = true boxes, T = thresholds, L = levels of overlap, B = batch, C = classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from methods.grounding.boxes import box_iou
from methods.measures.classification import num_guesses, ranks
from methods.measures.localisation_rules import LocalisationRules
from methods.measures.score_maps import Parts, parts_by_threshold, scaled_scores
from methods.measures.table import Measure, percent

LOCALISATION_METRICS = (
    "gt_known", "top1_localisation", "top5_localisation", "max_box_acc", "max_box_acc_v2", "best_threshold",
)  # fmt: skip
LEVEL = 0.5
"""Overlap that makes a box right, in every metric but ``max_box_acc_v2``."""
_ONE_MORE = np.array([0, 0, 1, 1])


class LocalisedRow(NamedTuple):
    """What is known about one picture: any metric follows from it."""

    hits: bytes
    """At each threshold: whether the box of the largest part overlaps by half, then for each level whether the box of
    any part reaches it, ``[1 + L, T]`` bytes of 0 and 1."""
    box_iou: float
    """Overlap of the box of the largest part at the one fixed threshold."""
    rank: int
    """Of the true class, from 0."""
    label: int
    num_classes: int


class LocalisationMeasure(Measure[LocalisedRow]):
    """The metrics of ``summarise_localisation``, from maps of the true class."""

    def __init__(self, rules: LocalisationRules) -> None:
        super().__init__(rules)
        self.rules = rules

    def update(
        self,
        sample_ids: Sequence[str],
        maps: Iterable[np.ndarray],
        boxes: Iterable[np.ndarray],
        scores_BC: Tensor,
        labels_B: Tensor,
    ) -> None:
        """Judge a batch.

        Args:
            sample_ids: Names of its rows.
            maps: For each picture the map of its *true* class, ``[H, W]``, at the size where boxes are compared.
            boxes: For each picture its true boxes ``[M, 4]`` at that size; the one that fits best counts.
            scores_BC: What the classifier says.
            labels_B: The true classes.
        """
        rows = localised_rows(maps, boxes, scores_BC, labels_B, self.rules)
        for sample_id, row in zip(sample_ids, rows, strict=True):
            self.table.add(sample_id, row)

    def compute(self, *, expected: Iterable[str] = ()) -> dict[str, float]:
        rows = self.table.rows(expected)
        num_classes = max((row.num_classes for row in rows), default=0)
        return summarise_localisation(
            localisation_sums(rows, self.rules, num_classes=num_classes), self.rules
        )


def localised_rows(
    maps: Iterable[np.ndarray],
    boxes: Iterable[np.ndarray],
    scores_BC: Tensor,
    labels_B: Tensor,
    rules: LocalisationRules,
) -> list[LocalisedRow]:
    """What there is to know about each picture of a batch; arguments as in ``LocalisationMeasure.update``."""
    columns = (ranks(scores_BC, labels_B).tolist(), labels_B.tolist())
    return [
        LocalisedRow(*judge_map(map_HW, truth_M4, rules), rank, label, scores_BC.shape[-1])
        for map_HW, truth_M4, rank, label in zip(maps, boxes, *columns, strict=True)
    ]


def judge_map(map_HW: np.ndarray, truth_M4: np.ndarray, rules: LocalisationRules) -> tuple[bytes, float]:
    """``hits`` and ``box_iou`` of a row.

    Raises:
        ValueError: There is no true box.
    """
    truth = np.asarray(truth_M4, dtype=np.float64).reshape(-1, 4)
    if not len(truth):
        raise ValueError(
            "a picture without a true box cannot be judged: leave it out of the localisation set"
        )
    scores = scaled_scores(map_HW)
    thresholds = np.append(rules.thresholds, rules.threshold)
    order = np.argsort(thresholds, kind="stable")
    parts = parts_by_threshold(scores, thresholds[order], quantised=rules.quantised)
    overlaps = np.empty((2, len(thresholds)))
    overlaps[:, order] = np.array([_overlaps(part, truth, scores.shape, rules) for part in parts]).T
    largest, best = overlaps[:, :-1]
    hits = [rules.reached(largest, LEVEL), *(rules.reached(best, level) for level in rules.iou_levels)]
    return np.array(hits, dtype=np.uint8).tobytes(), float(overlaps[0, -1])


def boxes_in_view(boxes_M4: np.ndarray, height: int, width: int, rules: LocalisationRules) -> np.ndarray:
    """True boxes of a picture of ``height`` x ``width`` where the rules compare them, ``[M, 4]`` float64."""
    resized, side = rules.resized_side or rules.side, rules.side
    boxes = np.asarray(boxes_M4, dtype=np.float64).reshape(-1, 4) * resized / [width, height, width, height]
    if rules.whole_boxes:
        boxes = np.trunc(boxes)
    if resized == side:
        return boxes
    cropped: np.ndarray = np.clip(boxes - (resized - side) // 2, 0, side - rules.inclusive_pixels)
    return cropped


def _overlaps(
    parts: Parts, truth_M4: np.ndarray, sides: tuple[int, ...], rules: LocalisationRules
) -> tuple[float, float]:
    """Overlap of the largest part's box with the true box that it fits best, and the best of any part's box."""
    boxes = parts.boxes.astype(np.float64)
    if rules.inclusive_pixels:
        # Half-open corners are kept inside the picture and then taken for last pixels: what the benchmark does.
        boxes[:, 2:] = np.minimum(boxes[:, 2:], [sides[1] - 1, sides[0] - 1])
        boxes, truth_M4 = boxes + _ONE_MORE, truth_M4 + _ONE_MORE
    ious = box_iou(boxes, truth_M4).max(axis=1)
    return float(ious[parts.largest]), float(ious.max())


def localisation_sums(
    rows: Sequence[LocalisedRow], rules: LocalisationRules, *, num_classes: int
) -> dict[str, Tensor]:
    """Whole numbers that add up over batches and workers; those ending in ``_by_class`` are ``[C]``."""
    shape = (1 + len(rules.iou_levels), rules.num_thresholds)
    hits = np.zeros(shape, dtype=np.int64)
    for row in rows:
        hits += np.frombuffer(row.hits, dtype=np.uint8).reshape(shape)
    by_class = torch.zeros(4, num_classes, dtype=torch.int64)
    for row in rows:
        by_class[:, row.label] += torch.tensor([1, *_right(row, rules)])
    names = ("count", "gt_known", "top1_localisation", "top5_localisation")
    return {
        "count": by_class[0].sum(),
        "threshold_hits": torch.from_numpy(hits),
        **{f"{name}_by_class": column for name, column in zip(names, by_class, strict=True)},
    }


def _right(row: LocalisedRow, rules: LocalisationRules) -> tuple[bool, bool, bool]:
    fits = bool(rules.reached(np.array(row.box_iou), LEVEL))
    return fits, fits and row.rank == 0, fits and row.rank < num_guesses(row.num_classes)


def threshold_shares(totals: Mapping[str, Tensor]) -> Tensor:
    """Share of pictures that are right at each threshold, ``[1 + L, T]``: by the largest part, then by any at each level."""
    return totals["threshold_hits"].double() / totals["count"]


def summarise_localisation(totals: Mapping[str, Tensor], rules: LocalisationRules) -> dict[str, float]:
    """Metrics in percent, and the ``best_threshold`` of ``max_box_acc`` (the lowest of several) as a fraction."""
    shares = threshold_shares(totals)
    largest, levels = shares[0], shares[1:]
    names = ("gt_known", "top1_localisation", "top5_localisation")
    return {
        **{name: _mean(totals[f"{name}_by_class"], totals["count_by_class"], rules) for name in names},
        "max_box_acc": 100 * float(largest.max()),
        "max_box_acc_v2": 100 * float(levels.max(dim=1).values.mean()),
        "best_threshold": float(rules.thresholds[int(largest.argmax())]),
    }


def _mean(hits_C: Tensor, counts_C: Tensor, rules: LocalisationRules) -> float:
    if rules.average == "image":
        return percent(float(hits_C.sum()), float(counts_C.sum()))
    there = counts_C > 0
    return 100 * float((hits_C[there].double() / counts_C[there]).mean())
