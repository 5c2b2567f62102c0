"""CM-MaskSD: hide part of one modality, and ask that the other one makes up for it.

"CM-MaskSD: Cross-Modality Masked Self-Distillation for Referring Image Segmentation", IEEE TMM 2024, arXiv 2305.11481.

    L = L_mask(z) + lambda_v KD(z_vision) + lambda_t KD(z_language) [+ w L_mask(z_vision) + w L_mask(z_language)]

Published (abstract and readings of the paper; the official repository holds no code): CLIP encoders; a main branch and two
masked ones that share its weights; masking guided by the correlation of patches and words; agreement with the unmasked
branch as distillation; next to no parameters of its own and no cost in use. Reconstructed, hence settings: ratios,
strategy, temperature, form and weights of the agreement, its ramp, the decoder, the up-sampling and the dynamic head
(after CRIS), and that the sentence vector of a masked branch is that of the whole sentence, since the head itself would
otherwise leak or lose the hidden word.

Expected at paper size: mIoU 74.89 / 77.54 / 71.28 on RefCOCO val / testA / testB (a secondary source). On synthetic shapes
the branches have not been seen to help: 40.8 with and 40.0 without, after 400 steps, one seed.

Shape legend: B = batch, P = patches, L = text length, E = shared width, C = decoder width, H, W = image sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from methods.base import Teacher, WeightSource
from methods.grounding.clip_encoder import ClipEncoder
from methods.grounding.cm_masksd_settings import PRESETS, CmMaskSDSettings
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.draws import Draws
from methods.grounding.heads import BoxHead, EmptyHead
from methods.grounding.mask_losses import mask_bce, mask_dice
from methods.grounding.method import GroundingMethod, GroundingNetwork
from methods.grounding.pixel_decoder import UpBlock, as_map, resized
from methods.grounding.self_distillation import feature_distance, mask_divergence, ramp_factor
from methods.grounding.text_decoder import DynamicHead, TextToPatchDecoder
from methods.grounding.token_masking import choose_hidden, content_words, correlations, hide


class CmMaskSDNetwork(GroundingNetwork):
    """The main branch, which is all there is in use: CLIP, a decoder in which patches ask words, a dynamic head."""

    def __init__(self, settings: CmMaskSDSettings, task: GroundingTask) -> None:
        super().__init__()
        width, channels = settings.shared_width, settings.channels
        self.encoder = ClipEncoder(settings, task)
        self.fusion = TextToPatchDecoder(
            width, num_layers=settings.decoder_layers, num_heads=settings.decoder_heads
        )
        self.pixel_decoder = nn.Sequential(UpBlock(width, channels), UpBlock(channels, channels))
        self.mask_head = DynamicHead(width, channels, bias=settings.mask_bias)
        self.box_head = BoxHead(channels) if settings.box_head else None
        self.empty_head = EmptyHead(channels) if settings.empty_head else None

    def forward(self, batch: GroundingBatch, draws: Draws | None = None) -> GroundingOutput:
        image = self.encoder.encode_images(batch.images)
        sentence = self.encoder.encode_sentences(batch.token_ids, batch.token_mask)
        features_BPE = self.fusion(image.patches, sentence.words, batch.token_mask)
        pixels_BChw, logits_B1HW = self.segment(features_BPE, sentence.whole, batch.images)
        # The mean over the kernel's places is what a pixel's own surroundings are compared with.
        sentence_BC = self.mask_head.kernels(sentence.whole)[0].mean(dim=(2, 3))
        return GroundingOutput(
            mask_logits=logits_B1HW,
            pixel_embed=pixels_BChw,
            sentence_embed=sentence_BC,
            empty_logit=self.empty_head(pixels_BChw, sentence_BC) if self.empty_head else None,
            boxes=self.box_head(pixels_BChw, sentence_BC) if self.box_head else None,
            extras={
                "patches": image.patches,
                "image": image.whole,
                "features": features_BPE,
                "words": sentence.words,
                "sentence": sentence.whole,
            },
        )

    def segment(
        self, features_BPE: Tensor, sentence_BE: Tensor, images_B3HW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pixel features ``[B, C, h, w]`` and mask logits at the size of the images."""
        pixels_BChw = self.pixel_decoder(as_map(features_BPE))
        logits_B1hw = self.mask_head(pixels_BChw, sentence_BE)
        return pixels_BChw, resized(logits_B1hw, images_B3HW.shape[2:])


class Masked(NamedTuple):
    """What a masked branch arrives at."""

    features: Tensor
    """``[B, P, E]``"""
    mask_logits: Tensor | None
    """``[B, 1, H, W]``; None where no loss reads it."""


class CmMaskSD(GroundingMethod):
    """Segments with a CLIP pair that also has to agree with masked views of itself.

    Losses: those of masks, ``vision_agreement``, ``language_agreement``, and with ``supervise_masked`` ``vision_bce``,
    ``vision_dice``, ``language_bce``, ``language_dice``.
    """

    Settings = CmMaskSDSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **GroundingMethod.ranges,
        "vision_mask_ratio": {"uniform": [0, 0.9]},
        "text_mask_ratio": {"uniform": [0, 0.7]},
        "mask_strategy": {"choice": ["high", "low", "random", "sampled"]},
        "vision_weight": {"loguniform": [0.1, 5]},
        "language_weight": {"loguniform": [0.1, 5]},
        "distill_temperature": {"uniform": [1, 4]},
        "supervise_masked": {"choice": [False, True]},
        "distill_on": {"choice": ["logits", "features"]},
        "ramp_fraction": {"uniform": [0, 0.3]},
    }
    settings: CmMaskSDSettings
    weight_sources: ClassVar[Mapping[str, WeightSource]] = {"checkpoint": "hub"}
    network: CmMaskSDNetwork
    num_rows_seen: Tensor

    def __init__(
        self, settings: Any, *, task: Any, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.stand_ins = nn.ParameterDict(
            {
                branch: nn.Parameter(0.02 * torch.randn(self._stand_in_width(branch)))
                for branch in settings.branches
            }
        )
        self.num_rows_to_see = 0
        self.register_buffer("num_rows_seen", torch.zeros((), dtype=torch.int64))

    @classmethod
    def build_network(cls, settings: CmMaskSDSettings, task: GroundingTask) -> CmMaskSDNetwork:
        return CmMaskSDNetwork(settings, task)

    @classmethod
    def without_sources(cls, settings: CmMaskSDSettings) -> CmMaskSDSettings:
        return replace(settings, checkpoint="")

    @classmethod
    def inactive(cls, settings: CmMaskSDSettings) -> frozenset[str]:
        return settings.inactive()

    def prepare(self, labels_n: Tensor, *, num_epochs: int) -> None:
        """Learn how long the run is, for the ramp."""
        self.num_rows_to_see = len(labels_n) * num_epochs

    def loss_weights(self, batch: GroundingBatch) -> dict[str, float]:
        settings, weights = self.settings, super().loss_weights(batch)
        ramp = ramp_factor(self._progress(), settings.ramp_fraction) if settings.ramp_fraction else 1.0
        for branch in settings.branches:
            weights[f"{branch}_agreement"] = ramp * getattr(settings, f"{branch}_weight")
            if settings.supervise_masked:
                weights[f"{branch}_bce"] = settings.supervised_weight * settings.mask_bce_weight
                weights[f"{branch}_dice"] = settings.supervised_weight * settings.mask_dice_weight
        return weights

    def compute_losses(self, output: GroundingOutput, batch: GroundingBatch) -> dict[str, Tensor]:
        losses, settings = super().compute_losses(output, batch), self.settings
        for branch in settings.branches:
            masked = self.masked(branch, output, batch)
            losses[f"{branch}_agreement"] = self._agreement(masked, output)
            if settings.supervise_masked and masked.mask_logits is not None:
                if settings.mask_bce_weight:
                    losses[f"{branch}_bce"] = mask_bce(masked.mask_logits, batch.masks)
                if settings.mask_dice_weight:
                    losses[f"{branch}_dice"] = mask_dice(masked.mask_logits, batch.masks)
        self.num_rows_seen += len(batch.indices) * num_workers()
        return losses

    def hidden(self, branch: str, output: GroundingOutput, batch: GroundingBatch) -> Tensor:
        """True at the patches or words that ``branch`` hides, ``[B, P]`` or ``[B, L]``."""
        settings, extras = self.settings, output.extras
        if branch == "vision":
            scores = correlations(extras["patches"], extras["sentence"])
            valid, ratio = torch.ones_like(scores, dtype=torch.bool), settings.vision_mask_ratio
        else:
            scores = correlations(extras["words"], extras["image"])
            valid, ratio = content_words(batch.token_mask), settings.text_mask_ratio
        draws = Draws(seed=self.seed, indices=batch.indices, epoch=batch.epoch)
        return choose_hidden(
            scores,
            valid,
            draws.uniform(f"hidden {branch}", scores.shape[1]),
            ratio=ratio,
            strategy=settings.mask_strategy,
            sampling_temperature=settings.sampling_temperature,
        )

    def masked(self, branch: str, output: GroundingOutput, batch: GroundingBatch) -> Masked:
        """Run a masked branch: the other modality and the sentence vector stay whole, all weights are shared."""
        extras, network = output.extras, self.network
        patches_BPE, words_BLE = extras["patches"], extras["words"]
        hidden, stand_in = self.hidden(branch, output, batch), self.stand_ins[branch]
        if self.settings.mask_at == "decoder_input":
            if branch == "vision":
                patches_BPE = hide(patches_BPE, hidden, stand_in)
            else:
                words_BLE = hide(words_BLE, hidden, stand_in)
        elif branch == "vision":
            patches_BPE = network.encoder.encode_images(batch.images, hidden, stand_in).patches
        else:
            words_BLE = network.encoder.encode_sentences(
                batch.token_ids, batch.token_mask, hidden, stand_in
            ).words
        features_BPE = network.fusion(patches_BPE, words_BLE, batch.token_mask)
        if self.settings.distill_on == "features" and not self.settings.supervise_masked:
            return Masked(features_BPE, None)
        return Masked(features_BPE, network.segment(features_BPE, extras["sentence"], batch.images)[1])

    def _agreement(self, masked: Masked, output: GroundingOutput) -> Tensor:
        if self.settings.distill_on == "features" or masked.mask_logits is None:
            return feature_distance(masked.features, output.extras["features"])
        return mask_divergence(
            masked.mask_logits, output.mask_logits, temperature=self.settings.distill_temperature
        )

    def _stand_in_width(self, branch: str) -> int:
        settings = self.settings
        if settings.mask_at == "decoder_input":
            return settings.shared_width
        return settings.vision_width if branch == "vision" else settings.text_width

    def _progress(self) -> float:
        """Share of the run that lies behind; 1 where its length was not told."""
        return int(self.num_rows_seen) / self.num_rows_to_see if self.num_rows_to_see else 1.0


def num_workers() -> int:
    """Workers that share each batch."""
    distributed = torch.distributed
    is_shared = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_shared else 1
