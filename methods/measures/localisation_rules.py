"""How boxes are made of score maps and judged: named rules, because published scripts differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from methods.checks import check_choice
from methods.names import did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalisationRules:
    """One way of turning score maps into numbers."""

    name: str
    """What every number that it gives is quoted with."""
    num_thresholds: int = 100
    """Fractions of a map's maximum that are tried: 0, 1 / this, 2 / this, ... below 1."""
    threshold: float = 0.2
    """The one fraction at which ``gt_known``, ``top1_localisation`` and ``top5_localisation`` are measured. Choose it on
    validation data."""
    iou_levels: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Overlaps over which ``max_box_acc_v2`` is a mean."""
    comparison: Literal["at_least", "above"] = "at_least"
    """Whether an overlap of exactly the level counts."""
    inclusive_pixels: bool = False
    """Box corners are the first and last pixel, inside the picture, and areas count both: ``(x1 - x0 + 1)``. Ours are
    half open: ``x1`` is one more than the last column."""
    side: int = 224
    """Side of the square in which boxes are compared: maps are brought to it, and so are true boxes (``boxes_in_view``)."""
    resized_side: int = 0
    """Pictures are stretched to this square, of which the middle of ``side`` is seen; 0 where all of it is."""
    whole_boxes: bool = False
    """Cut the corners of scaled true boxes to whole numbers."""
    quantised: bool = False
    """Cut scores to 8 bits before they are compared."""
    average: Literal["image", "class"] = "image"
    """Mean over all pictures, or of the means of classes: the same only where classes are balanced."""

    def __post_init__(self) -> None:
        check_choice(self, comparison=("at_least", "above"), average=("image", "class"))
        if self.num_thresholds < 1:
            raise ValueError(f"num_thresholds must be at least 1, got {self.num_thresholds}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, got {self.threshold!r}")
        if not self.iou_levels or not all(0 < level <= 1 for level in self.iou_levels):
            raise ValueError(f"iou_levels must be above 0 and at most 1, got {self.iou_levels!r}")
        if self.side < 1 or 0 < self.resized_side < self.side or self.resized_side < 0:
            raise ValueError(
                f"side must be at least 1 and resized_side 0 or at least side, got {self.side} and {self.resized_side}"
            )

    @property
    def thresholds(self) -> np.ndarray:
        """The fractions that are tried, ascending, ``[T]`` float64."""
        tried: np.ndarray = np.arange(self.num_thresholds) / self.num_thresholds
        return tried

    def reached(self, ious: np.ndarray, level: float) -> np.ndarray:
        """Which overlaps count at this level. Exact for whole-numbered boxes: their ratios are rounded as the level is."""
        counted: np.ndarray = ious >= level if self.comparison == "at_least" else ious > level
        return counted


_ALL = (
    LocalisationRules(name="ours"),
    LocalisationRules(
        name="wsol", num_thresholds=1000, inclusive_pixels=True, quantised=True, whole_boxes=True
    ),
    LocalisationRules(
        name="bas",
        inclusive_pixels=True,
        quantised=True,
        whole_boxes=True,
        comparison="above",
        average="class",
        resized_side=256,
    ),
)
LOCALISATION_RULES: Mapping[str, LocalisationRules] = {rules.name: rules for rules in _ALL}
"""Name -> rules. ``ours`` is what we quote. ``wsol`` follows the published benchmark, whose largest part is the one of the
largest contour area (ours: most pixels; thin shapes differ) and which also takes holes for parts. ``bas`` follows older
scripts of single methods; their ten-crop classification is the business of whoever makes the scores."""


def localisation_rules_named(name: str) -> LocalisationRules:
    """The rules of that name. Raises ValueError listing the known ones."""
    if name in LOCALISATION_RULES:
        return LOCALISATION_RULES[name]
    raise ValueError(
        f"{name!r} is not a set of localisation rules{did_you_mean(name, LOCALISATION_RULES)} "
        f"(known: {', '.join(LOCALISATION_RULES)})"
    )
