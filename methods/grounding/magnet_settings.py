"""Settings of MagNet, and which of them have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from methods.checks import check_choice, check_positive, check_weights
from methods.grounding.settings import GroundingSettings, without_effect
from methods.grounding.swin_bert import SwinBertSettings

Decoder = Literal["deformable", "pyramid"]
GroundingPass = Literal["shared", "separate"]
GROUND_INPUTS = ("image", "mask")
GROUP_SIZE = 32
"""Group norm of the deformable decoder has 32 groups."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "magnet_base": {
        "swin_checkpoint": "timm/swin_base_patch4_window12_384.ms_in22k",
        "bert_checkpoint": "google-bert/bert-base-uncased",
    },
    "magnet_small": {
        "patch_size": 2,
        "swin_width": 16,
        "swin_depths": (1, 1, 2, 1),
        "swin_heads": (2, 2, 4, 4),
        "window_size": 6,
        "drop_path": 0.0,
        "bert_width": 96,
        "bert_layers": 4,
        "bert_heads": 4,
        "table_text_length": 0,
        "bert_dropout": 0.0,
        "decoder": "pyramid",
        "channels": 48,
        "predictor_layers": 1,
        "predictor_heads": 4,
        "predictor_expansion": 1,
    },
}
"""``magnet_base``: Swin-B and BERT-base from published weights, 480 px. ``magnet_small``: 48 px, from random weights."""


@dataclass(frozen=True, kw_only=True)
class MagNetSettings(GroundingSettings, SwinBertSettings):
    """Settings of ``magnet``; the defaults are the paper's size."""

    pool_sizes: tuple[int, ...] = (1, 2, 3, 6)
    """Sides to which a stage's map is pooled for global context. Empty: no pooled context."""
    decoder: Decoder = "deformable"
    """``deformable``: Mask2Former's decoders and one object query. ``pyramid``: convolutions and a 1x1 head."""
    decoder_layers: int = 4
    """Layers of deformable attention."""
    query_layers: int = 9
    """Masked-attention layers through which the object query goes."""
    decoder_heads: int = 8
    """Attention heads of both."""
    ground_weight: float = 0.5
    """Weight of the prediction of hidden words. 0 leaves mask grounding out."""
    word_mask_probability: float = 0.15
    """Probability with which a word is to be predicted."""
    word_replace_probability: float = 0.9
    """Probability with which such a word is replaced by the mask token; else it stays as it is."""
    select_at_least_one: bool = True
    """Where no word was drawn, take one: short sentences would hardly ever train the predictor."""
    grounding_pass: GroundingPass = "shared"
    """Whether the pass with hidden words also feeds the mask losses, or the network runs twice (``separate``)."""
    ground_inputs: tuple[str, ...] = GROUND_INPUTS
    """What the predictor sees beside the words: of ``image`` and ``mask``."""
    predictor_layers: int = 2
    """Layers of the predictor of words."""
    predictor_heads: int = 12
    """Its attention heads."""
    predictor_expansion: int = 4
    """Width of its feed-forward part over its width."""
    align_pixel_weight: float = 0.1
    """Weight of the contrast between pixels. 0 turns it off."""
    align_text_weight: float = 0.1
    """Weight of the contrast between the sentence and pixels. 0 turns it off."""
    align_temperature: float = 0.1
    """Temperature of both contrasts (tau)."""
    num_positives: int = 64
    """At most so many pixels inside the mask take part in a contrast."""
    num_negatives: int = 128
    """At most so many pixels outside do."""

    def __post_init__(self) -> None:
        GroundingSettings.__post_init__(self)
        SwinBertSettings.__post_init__(self)
        check_choice(self, decoder=("deformable", "pyramid"), grounding_pass=("shared", "separate"))
        check_weights(self, "ground_weight", "align_pixel_weight", "align_text_weight")
        check_positive(self, "decoder_layers", "query_layers", "decoder_heads", "align_temperature")
        check_positive(self, "predictor_layers", "predictor_heads", "predictor_expansion")
        check_positive(self, "num_negatives")
        for name in ("word_mask_probability", "word_replace_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if self.num_positives < 2:
            raise ValueError(f"num_positives must be at least 2 (pairs), got {self.num_positives!r}")
        self._check_shapes()

    def _check_shapes(self) -> None:
        if any(size < 1 for size in self.pool_sizes) or len(set(self.pool_sizes)) < len(self.pool_sizes):
            raise ValueError(f"pool_sizes must be different sides of at least 1, got {self.pool_sizes!r}")
        unknown = sorted(set(self.ground_inputs) - set(GROUND_INPUTS))
        if unknown or len(set(self.ground_inputs)) < len(self.ground_inputs):
            raise ValueError(
                f"ground_inputs must be some of {', '.join(GROUND_INPUTS)}, once each, got {self.ground_inputs!r}"
            )
        if self.has_grounding and self.bert_width % self.predictor_heads:
            raise ValueError(
                f"predictor_heads must divide bert_width {self.bert_width}, got {self.predictor_heads!r}"
            )
        if self.decoder == "deformable" and (
            self.channels % GROUP_SIZE or self.channels % self.decoder_heads
        ):
            raise ValueError(
                f"channels must be a multiple of {GROUP_SIZE} and of decoder_heads {self.decoder_heads} with the "
                f"deformable decoder, got {self.channels!r}"
            )

    @property
    def has_grounding(self) -> bool:
        """Whether words are hidden and predicted."""
        return self.ground_weight > 0 and (self.word_mask_probability > 0 or self.select_at_least_one)

    @property
    def has_alignment(self) -> bool:
        """Whether pixels are contrasted with anything."""
        return self.align_pixel_weight > 0 or self.align_text_weight > 0

    def inactive(self) -> frozenset[str]:
        """Names of settings that change nothing at this point."""
        names = set(without_effect(self))
        if not self.has_grounding:
            names |= {"word_replace_probability", "grounding_pass", "ground_inputs"}
            names |= {"predictor_layers", "predictor_heads", "predictor_expansion"}
        if self.ground_weight == 0:
            names |= {"word_mask_probability", "select_at_least_one"}
        elif not self.has_grounding:
            names.add("ground_weight")
        if not self.has_alignment:
            names |= {"align_temperature", "num_positives", "num_negatives"}
        if self.decoder == "pyramid":
            names |= {"decoder_layers", "query_layers", "decoder_heads"}
        else:
            names.add("mask_bias")
        return frozenset(names)
