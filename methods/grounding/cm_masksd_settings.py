"""Settings of CM-MaskSD, and which of them have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from methods.checks import check_choice, check_positive, check_weights
from methods.grounding.clip_encoder import ClipSettings
from methods.grounding.settings import GroundingSettings, without_effect
from methods.grounding.token_masking import STRATEGIES, MaskStrategy

MaskAt = Literal["decoder_input", "encoder_input"]
DistillOn = Literal["logits", "features"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cm_masksd_base": {"checkpoint": "openai/clip-vit-base-patch16"},
    "cm_masksd_small": {
        "patch_size": 6,
        "vision_width": 96,
        "vision_layers": 4,
        "vision_heads": 4,
        "text_width": 96,
        "text_layers": 4,
        "text_heads": 4,
        "shared_width": 64,
        "table_image_size": 0,
        "table_text_length": 0,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "channels": 32,
        "ramp_fraction": 0.0,
    },
}
"""``cm_masksd_base``: ViT-B/16 from its published weights, 480 px. ``cm_masksd_small``: 48 px, from random weights."""


@dataclass(frozen=True, kw_only=True)
class CmMaskSDSettings(GroundingSettings, ClipSettings):
    """Settings of ``cm_masksd``; the defaults are the paper's size. All of the masked branches' values are reconstructions: sweep them."""

    decoder_layers: int = 3
    """Layers in which patches ask words."""
    decoder_heads: int = 8
    """Attention heads of these layers."""
    vision_mask_ratio: float = 0.5
    """Share of the patches that the vision branch hides, floored (r_v). 0 leaves the branch out."""
    text_mask_ratio: float = 0.3
    """Share of the words that the language branch hides, floored (r_t). 0 leaves the branch out."""
    mask_strategy: MaskStrategy = "high"
    """Which tokens are hidden: of ``high`` or ``low`` correlation with the other modality, ``random``, or ``sampled``
    in proportion to softmax(correlation / ``sampling_temperature``)."""
    sampling_temperature: float = 0.1
    """Temperature of ``sampled``."""
    mask_at: MaskAt = "decoder_input"
    """Where hidden tokens are replaced: behind the encoders, or before them (the towers then run once more)."""
    vision_weight: float = 1.0
    """Weight of the vision branch's agreement with the main one (lambda_v). 0 leaves the branch out."""
    language_weight: float = 1.0
    """Weight of the language branch's agreement with the main one (lambda_t). 0 leaves the branch out."""
    distill_on: DistillOn = "logits"
    """What has to agree: mask ``logits``, or ``features`` of the patches behind the decoder."""
    distill_temperature: float = 1.0
    """Temperature of the agreement of logits (T)."""
    ramp_fraction: float = 0.05
    """Share of the run over which both weights grow from 0. 0: full from the start."""
    supervise_masked: bool = False
    """Give the masked branches the true mask too."""
    supervised_weight: float = 0.5
    """Weight of that, times the weights of the mask losses."""

    def __post_init__(self) -> None:
        GroundingSettings.__post_init__(self)
        ClipSettings.__post_init__(self)
        check_choice(self, mask_strategy=STRATEGIES, mask_at=("decoder_input", "encoder_input"))
        check_choice(self, distill_on=("logits", "features"))
        check_weights(self, "vision_weight", "language_weight")
        check_positive(self, "decoder_heads", "decoder_layers", "distill_temperature", "sampling_temperature")
        check_positive(self, "supervised_weight")
        for name in ("vision_mask_ratio", "text_mask_ratio", "ramp_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}")
        if self.shared_width % (4 * self.decoder_heads):
            raise ValueError(
                f"decoder_heads {self.decoder_heads} does not fit shared_width {self.shared_width}: "
                "the width must be a multiple of four times the heads"
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """The masked branches that run in training: of ``vision`` and ``language``."""
        has_vision = self.vision_weight > 0 and self.vision_mask_ratio > 0
        has_language = self.language_weight > 0 and self.text_mask_ratio > 0
        return ("vision",) * has_vision + ("language",) * has_language

    def inactive(self) -> frozenset[str]:
        """Names of settings that change nothing at this point."""
        names = set(without_effect(self))
        if self.vision_weight == 0:
            names.add("vision_mask_ratio")
        elif self.vision_mask_ratio == 0:
            names.add("vision_weight")
        if self.language_weight == 0:
            names.add("text_mask_ratio")
        elif self.text_mask_ratio == 0:
            names.add("language_weight")
        if not self.branches:
            names |= {"mask_strategy", "mask_at", "distill_on", "ramp_fraction", "supervise_masked"}
        if self.mask_strategy != "sampled" or not self.branches:
            names.add("sampling_temperature")
        if self.distill_on == "features" or not self.branches:
            names.add("distill_temperature")
        if not self.supervise_masked or not self.branches:
            names.add("supervised_weight")
        return frozenset(names)
