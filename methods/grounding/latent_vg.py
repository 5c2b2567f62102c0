"""Latent-VG: a sentence becomes several latent expressions of one subject, each is segmented, the masks are averaged.

"Latent Expression Generation for Referring Image Segmentation and Grounding", ICCV 2025, arXiv 2508.05123. The paper's
code is not public as a repository; what is known is known from secondary sources.

Published in secondary sources: the subject in the class token's place, expressions mixed from words of which some are
dropped, the language expert's attention with norms and light feed-forwards of their own, subject distributor and concept
injector after every layer, the mean of probabilities, the margin 0.2, N = 2 with lengths (4, 10), mask weights 2 and 0.5,
boxes from masks, the empty token. Reconstructed: pixel decoder, contrast temperature 0.07 and weight 0.1, the
contrast's denominator, temperatures and residual form of the injector (preset ``latent_vg_as_released`` has the form
that was described, in which all attribute slots become equal), one text projection for all, how the empty token is
read, drop path and learning rates.

Expected: RefCOCO+ val 73.19 mIoU (72.63 without contrast, 68.76 without latent expressions), one data set; combined
training 81.01 mIoU on RefCOCO val, 91.75 acc@0.5. On ShapesRef, 48 px, 800 steps, one seed: 58.4 mIoU, 58.3 with N = 0.

Shape legend: B = batch, N = latent expressions, D = encoder width, G = samples of all workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from methods.grounding.contracts import GroundingBatch, GroundingOutput
from methods.grounding.gather import gathered_with_gradient
from methods.grounding.latent_expressions import margin_contrast, mean_map_difference, mean_pairwise_cosine
from methods.grounding.latent_network import LatentVGNetwork
from methods.grounding.latent_settings import LatentVGSettings, latent_without_effect
from methods.grounding.multiway_method import MultiwayMethod
from methods.grounding.presets import LATENT_VG
from methods.grounding.settings import RANGES


class LatentVG(MultiwayMethod):
    """Masks of a sentence and of its latent expressions, averaged. Losses ``mask_bce``, ``mask_dice``, ``contrast``."""

    network_type = LatentVGNetwork
    Settings = LatentVGSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = LATENT_VG
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **RANGES,
        "attribute_lengths": {"choice": [[], [8], [4, 10], [4, 10, 16], [2, 4, 8, 16]]},
        "word_drop": {"choice": [[0.0], [0.2], [0.5]]},
        "margin": {"uniform": [0, 0.6]},
        "contrast_temperature": {"loguniform": [0.03, 0.5]},
        "contrast_weight": {"loguniform": [0.01, 1]},
        "denominator": {"choice": ["with_margin", "raw", "negatives_only"]},
        "num_concepts": {"grid": [16, 32, 64]},
        "concept_temperature": {"loguniform": [0.03, 1]},
        "slot_temperature": {"loguniform": [0.03, 1]},
        "inject": {"choice": ["residual", "replace"]},
        "use_subject_distributor": {"choice": [True, False]},
        "use_concept_injector": {"choice": [True, False]},
        "drop_path": {"uniform": [0, 0.3]},
    }
    settings: LatentVGSettings

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        return latent_without_effect(settings)

    def loss_weights(self, batch: GroundingBatch) -> dict[str, float]:
        weights = super().loss_weights(batch)
        return (
            {**weights, "contrast": self.settings.contrast_weight}
            if self.settings.num_expressions
            else weights
        )

    def compute_losses(self, output: GroundingOutput, batch: GroundingBatch) -> dict[str, Tensor]:
        losses = super().compute_losses(output, batch)
        if self.settings.num_expressions and self.settings.contrast_weight > 0:
            own_BND = output.extras["expressions"]
            all_GND, first = gathered_with_gradient(own_BND)
            losses["contrast"] = margin_contrast(
                output.extras["sentence"],
                own_BND,
                margin=self.settings.margin,
                temperature=self.settings.contrast_temperature,
                denominator=self.settings.denominator,
                all_expressions_GND=all_GND,
                first=first,
            )
        return losses

    def step_metrics(self, output: GroundingOutput) -> dict[str, Tensor]:
        """How alike attribute slots are, and how much the maps differ: what to look at when N > 0 brings nothing."""
        if output.expression_logits is None:
            return {}
        return {
            "slot_cosine": mean_pairwise_cosine(output.extras["slots"].detach()),
            "map_difference": mean_map_difference(output.expression_logits.detach()),
        }
