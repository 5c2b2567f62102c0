"""MagNet: words are grounded by predicting hidden ones from the picture and the mask.

"Mask Grounding for Referring Image Segmentation", CVPR 2024, arXiv 2312.12198.

    L = 2 BCE + 0.5 Dice + 0.5 L_ground + 0.1 L_pp + 0.1 L_pt

Published (model code and weights; there is no training code): Swin and BERT with fusion after each of four stages in both
directions, pooled context before it, the deformable decoder with one object query, the three inputs of the word
predictor, the share of words selected, and the projection of the sentence. Reconstructed, hence settings: the weights of
all losses, the formulas of the alignment loss, that the pass with hidden words also feeds the mask loss, and the
predictor's depth. Three faults of the released model code are not repeated, see ``gated_fusion``; and its class score,
always 1 with a single query, is left out. The pyramid with a 1x1 head is ours, for small runs; its padded 3x3 blocks
on the coarse maps are what tells the trunk left from right.

Expected at paper size: oIoU 75.24 / 78.24 / 71.05 on RefCOCO val / testA / testB, evaluated at the resized square. On
synthetic shapes one seed says that both extra losses help by 11 points, and another that they hurt by 5.

Shape legend: B = batch, L = text length, D = text width, C = decoder width, H, W = image sides, h, w = sides of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Loss, Step, Teacher, WeightSource
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.draws import Draws
from methods.grounding.heads import BoxHead, EmptyHead
from methods.grounding.magnet_settings import PRESETS, MagNetSettings
from methods.grounding.mask_grounding import WordPredictor, WordSelection, select_words, word_loss
from methods.grounding.method import GroundingMethod, GroundingNetwork
from methods.grounding.pixel_contrast import pixel_contrast, sample_pixels, text_contrast
from methods.grounding.pixel_decoder import resized
from methods.grounding.scale_decoders import DeformableScales, FourScalePyramid, QueryHead
from methods.grounding.swin_bert import NUM_STAGES, SwinBertEncoder


class MagNetNetwork(GroundingNetwork):
    """The fused trunk, a pixel decoder and a mask head. The auxiliary losses leave nothing in it."""

    def __init__(self, settings: MagNetSettings, task: GroundingTask) -> None:
        super().__init__()
        channels = settings.channels
        self.encoder = SwinBertEncoder(settings, task, pool_sizes=settings.pool_sizes)
        self.scales: DeformableScales | None = None
        self.pixel_decoder: nn.Module
        self.mask_head: nn.Module
        if settings.decoder == "deformable":
            strides = [settings.patch_size * 2**stage for stage in range(NUM_STAGES)]
            heads = settings.decoder_heads
            self.scales = DeformableScales(
                settings.stage_widths, strides, channels, num_layers=settings.decoder_layers, num_heads=heads
            )
            self.pixel_decoder = nn.Conv2d(channels, channels, 1)
            self.mask_head = QueryHead(channels, strides, num_layers=settings.query_layers, num_heads=heads)
        else:
            self.pixel_decoder = FourScalePyramid(settings.stage_widths, channels)
            self.mask_head = nn.Conv2d(channels, 1, 1)
            nn.init.constant_(self.mask_head.bias, settings.mask_bias)  # type: ignore[arg-type]
        self.sentence = nn.Linear(settings.bert_width, channels)
        self.box_head = BoxHead(channels) if settings.box_head else None
        self.empty_head = EmptyHead(channels) if settings.empty_head else None

    def forward(self, batch: GroundingBatch, draws: Draws | None = None) -> GroundingOutput:
        fused = self.encoder(batch.images, batch.token_ids, batch.token_mask)
        if self.scales is None:
            pixels_BChw = self.pixel_decoder(fused.maps)
            logits_B1hw = self.mask_head(pixels_BChw)
        else:
            finest_BChw, coarse_maps = self.scales(fused.maps)
            pixels_BChw = self.pixel_decoder(finest_BChw)
            logits_B1hw = self.mask_head(pixels_BChw, coarse_maps)
        sentence_BC = F.normalize(self.sentence(mean_of_words(fused.words, batch.token_mask)), dim=1)
        return GroundingOutput(
            mask_logits=resized(logits_B1hw, batch.images.shape[2:]),
            pixel_embed=pixels_BChw,
            sentence_embed=sentence_BC,
            empty_logit=self.empty_head(pixels_BChw, sentence_BC) if self.empty_head else None,
            boxes=self.box_head(pixels_BChw, sentence_BC) if self.box_head else None,
            extras={"words": fused.words},
        )


class MagNet(GroundingMethod):
    """Segments with a fused trunk that also has to predict hidden words and to tell pixels apart.

    Losses: those of masks, ``ground``, ``align_pixel`` and ``align_text``.
    """

    version: ClassVar[int] = 2
    Settings = MagNetSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **GroundingMethod.ranges,
        "word_mask_probability": {"uniform": [0.05, 0.5]},
        "ground_weight": {"loguniform": [0.05, 2]},
        "align_pixel_weight": {"loguniform": [0.01, 1]},
        "align_text_weight": {"loguniform": [0.01, 1]},
        "align_temperature": {"loguniform": [0.05, 0.5]},
        "pool_sizes": {"choice": [[], [1], [1, 2, 3, 6]]},
        "drop_path": {"uniform": [0, 0.3]},
    }
    settings: MagNetSettings
    weight_sources: ClassVar[Mapping[str, WeightSource]] = {
        "swin_checkpoint": "timm",
        "bert_checkpoint": "hub",
    }
    network: MagNetNetwork

    def __init__(
        self, settings: Any, *, task: Any, model: nn.Module | None, inputs: Mapping[str, Teacher]
    ) -> None:
        super().__init__(settings, task=task, model=model, inputs=inputs)
        self.word_predictor: WordPredictor | None = None
        if settings.has_grounding:
            self.word_predictor = WordPredictor(
                settings.bert_width,
                settings.channels,
                task.vocabulary_size,
                num_layers=settings.predictor_layers,
                num_heads=settings.predictor_heads,
                expansion=settings.predictor_expansion,
                inputs=settings.ground_inputs,
            )

    @classmethod
    def build_network(cls, settings: MagNetSettings, task: GroundingTask) -> MagNetNetwork:
        return MagNetNetwork(settings, task)

    @classmethod
    def without_sources(cls, settings: MagNetSettings) -> MagNetSettings:
        return replace(settings, swin_checkpoint="", bert_checkpoint="")

    @classmethod
    def inactive(cls, settings: MagNetSettings) -> frozenset[str]:
        return settings.inactive()

    def forward(self, batch: GroundingBatch) -> Step:
        is_shared = self.word_predictor is not None and self.settings.grounding_pass == "shared"
        seen = batch._replace(token_ids=self.selection(batch).token_ids) if is_shared else batch
        output = self.network(seen, self._draws(batch))
        weights, losses = self.loss_weights(batch), self.compute_losses(output, batch)
        return Step(
            {name: Loss(value, weights[name]) for name, value in losses.items()}, self.step_metrics(output)
        )

    def loss_weights(self, batch: GroundingBatch) -> dict[str, float]:
        settings = self.settings
        return {
            **super().loss_weights(batch),
            "ground": settings.ground_weight,
            "align_pixel": settings.align_pixel_weight,
            "align_text": settings.align_text_weight,
        }

    def compute_losses(self, output: GroundingOutput, batch: GroundingBatch) -> dict[str, Tensor]:
        """Unweighted losses of ``output``, which has read the sentences of ``selection`` in a shared pass."""
        losses = super().compute_losses(output, batch)
        if self.word_predictor is not None:
            losses["ground"] = self._ground(self.word_predictor, output, batch)
        if self.settings.has_alignment:
            losses |= self._alignment(output, batch)
        return losses

    def selection(self, batch: GroundingBatch) -> WordSelection:
        """The words to predict in this epoch: the same whenever they are asked for."""
        settings, draws, length = self.settings, self._draws(batch), batch.token_ids.shape[1]
        return select_words(
            batch.token_ids,
            batch.token_mask,
            (draws.uniform("selected words", length), draws.uniform("replaced words", length)),
            mask_id=self.task.mask_id,
            probability=settings.word_mask_probability,
            replace_probability=settings.word_replace_probability,
            at_least_one=settings.select_at_least_one,
        )

    def _ground(self, predictor: WordPredictor, output: GroundingOutput, batch: GroundingBatch) -> Tensor:
        selection = self.selection(batch)
        if self.settings.grounding_pass == "separate":
            output = self.network(batch._replace(token_ids=selection.token_ids), self._draws(batch))
        logits_BLV = predictor(
            output.extras["words"],
            batch.token_mask,
            output.pixel_embed,
            batch.masks,
            self.network.encoder.vocabulary,
        )
        return word_loss(logits_BLV, batch.token_ids, selection.selected)

    def _alignment(self, output: GroundingOutput, batch: GroundingBatch) -> dict[str, Tensor]:
        settings, num_pixels = self.settings, output.pixel_embed.shape[2:].numel()
        positives, negatives = sample_pixels(
            output.pixel_embed,
            batch.masks,
            self._draws(batch).uniform("pixels", num_pixels),
            num_positives=settings.num_positives,
            num_negatives=settings.num_negatives,
        )
        losses, temperature = {}, settings.align_temperature
        if settings.align_pixel_weight:
            losses["align_pixel"] = pixel_contrast(*positives, *negatives, temperature=temperature)
        if settings.align_text_weight:
            sentence_BC = output.sentence_embed
            losses["align_text"] = text_contrast(*positives, *negatives, sentence_BC, temperature=temperature)
        return losses

    def _draws(self, batch: GroundingBatch) -> Draws:
        return Draws(seed=self.seed, indices=batch.indices, epoch=batch.epoch)


def mean_of_words(words_BLD: Tensor, token_mask_BL: Tensor) -> Tensor:
    """Mean of the real tokens, ``[B, D]``."""
    real_BL1 = token_mask_BL[:, :, None]
    return (words_BLD * real_BL1).sum(dim=1) / real_BL1.sum(dim=1)
