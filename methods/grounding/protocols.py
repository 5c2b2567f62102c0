"""How predictions are judged: named protocols, because the same masks give other numbers in other houses.

The presets follow the evaluators that their authors published. The geometry of the input belongs to the data: CRIS and
ETRIS are reproduced with ``image_size: 416, fit: letterbox`` beside ``protocol: cris``. What is counted during training
(one random sentence in some, the first in others) is not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from methods.checks import check_choice
from methods.names import did_you_mean

Size = Literal["original", "model"]
Overlap = Literal["union", "sum_is_one"]
Rasteriser = Literal["coco", "pil"]
Comparison = Literal["at_least", "above", "above_float32"]
NoneRule = Literal["flag", "flag_clears_mask", "area"]
Resampling = Literal["bilinear_logits", "cubic_probabilities"]
CHOICES = {
    "size": ("original", "model"),
    "overlap": ("union", "sum_is_one"),
    "rasteriser": ("coco", "pil"),
    "comparison": ("at_least", "above", "above_float32"),
    "none_rule": ("flag", "flag_clears_mask", "area"),
    "resampling": ("bilinear_logits", "cubic_probabilities"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProtocol:
    """One way of turning masks into numbers."""

    name: str
    """What every number that it gives is quoted with."""
    size: Size = "original"
    """Where masks are compared: at the size of the stored picture, to which logits are up-sampled, or of the input."""
    resampling: Resampling = "bilinear_logits"
    """What is brought to the size of the truth, and how."""
    scaled_polygons: bool = False
    """At the size of the input: polygons are scaled before they become pixels, instead of their pixels afterwards."""
    threshold: float = 0.5
    """Probability above which a pixel belongs to the mask."""
    overlap: Overlap = "union"
    """Truth where parts of an annotation overlap: kept, or lost because only pixels *equal to one* count."""
    rasteriser: Rasteriser = "coco"
    """Who turns polygons into pixels. ``pil`` draws the outline too, which makes small objects much larger."""
    epsilon: float = 0.0
    """Added to the union before the division."""
    comparison: Comparison = "at_least"
    """How a ratio is held against 0.5 ... 0.9: exactly, strictly, or strictly against rounded float32 thresholds."""
    empty_union_iou: float = 0.0
    """Ratio of a pair that is empty on both sides."""
    none_rule: NoneRule = "flag"
    """When a prediction says that there is nothing: by the network's own output (the mask stays, or is cleared), or
    by too small a mask. A network without such an output says so by an empty mask."""
    min_area: int = 0
    """Pixels below which ``area`` takes a mask for nothing; an empty mask always is."""
    rejected_keeps_mask: bool = False
    """Whether a target that was wrongly called absent still earns what its mask is worth."""
    version: int = 1
    """Raised whenever the same predictions would give other numbers: part of the data's fingerprint."""

    def __post_init__(self) -> None:
        check_choice(self, **CHOICES)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {self.threshold!r}")
        if self.epsilon < 0 or self.min_area < 0 or not 0 <= self.empty_union_iou <= 1:
            raise ValueError(
                f"epsilon and min_area must not be negative and empty_union_iou must lie in 0..1, got "
                f"{self.epsilon!r}, {self.min_area!r} and {self.empty_union_iou!r}"
            )


_ALL = (
    EvaluationProtocol(name="ours"),
    EvaluationProtocol(name="lavt", size="model", overlap="sum_is_one"),
    EvaluationProtocol(
        name="cris",
        threshold=0.35,
        epsilon=1e-6,
        comparison="above_float32",
        resampling="cubic_probabilities",
        version=2,
    ),
    EvaluationProtocol(name="global_local_clip", overlap="sum_is_one"),
    EvaluationProtocol(name="rela", size="model", scaled_polygons=True, version=2),
    EvaluationProtocol(name="gsva", rejected_keeps_mask=True),
    EvaluationProtocol(name="lisa", epsilon=1e-5, empty_union_iou=1.0, none_rule="area"),
    EvaluationProtocol(name="phrasecut", rasteriser="pil", comparison="above"),
    EvaluationProtocol(name="deployed", none_rule="flag_clears_mask"),
    EvaluationProtocol(name="area", none_rule="area"),
)

PROTOCOLS: Mapping[str, EvaluationProtocol] = {protocol.name: protocol for protocol in _ALL}
"""Name -> protocol. ``ours`` is what we quote; the others are for comparison with published tables."""


def protocol_named(name: str) -> EvaluationProtocol:
    """The protocol of that name. Raises ValueError listing the known ones."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    raise ValueError(
        f"{name!r} is not a protocol{did_you_mean(name, PROTOCOLS)} (known: {', '.join(PROTOCOLS)})"
    )
