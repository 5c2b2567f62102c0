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

Shape legend: B = batch, N = latent expressions, D = encoder width, C = decoder width, T = tokens of the joint sequence,
P = patches, L = text length, K = attribute tokens of one expression, h, w = sides of the pixel map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.checks import check_choice, check_positive, check_weights
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.draws import Draws
from methods.grounding.gather import gathered_with_gradient
from methods.grounding.heads import BoxHead, DotHead
from methods.grounding.latent_expressions import (
    NUM_FIXED_TOKENS,
    ConceptInjector,
    Denominator,
    DropUnit,
    ExpressionInitialiser,
    SubjectSelector,
    margin_contrast,
    mean_map_difference,
    mean_pairwise_cosine,
)
from methods.grounding.mask_losses import average_of_probabilities
from methods.grounding.method import GroundingMethod, GroundingNetwork
from methods.grounding.multiway import MultiwayEncoder, MultiwayLayer, MultiwaySettings, Part, attention_mask
from methods.grounding.multiway_weights import load_multiway
from methods.grounding.pixel_decoder import PixelDecoder, as_map, resized
from methods.grounding.presets import LATENT_VG
from methods.grounding.settings import RANGES, GroundingSettings, without_effect

LATENT = {
    *("word_drop", "drop_unit", "margin", "contrast_temperature", "contrast_weight", "denominator"),
    *("num_concepts", "concept_temperature", "slot_temperature", "inject", "inject_at"),
    *("use_subject_distributor", "use_concept_injector"),
}
CONTRAST = {"margin", "contrast_temperature", "denominator"}
INJECTOR = {"num_concepts", "concept_temperature", "slot_temperature", "inject"}


@dataclass(frozen=True, kw_only=True)
class LatentVGSettings(GroundingSettings, MultiwaySettings):
    """Settings of ``latent_vg``. The defaults are the paper's size; preset ``latent_vg_small`` is for two cores."""

    attribute_lengths: tuple[int, ...] = (4, 10)
    """Attribute tokens of each latent expression; its length is their number (N). Empty: no latent expressions."""
    word_drop: tuple[float, ...] = (0.2, 0.15)
    """Rate at which each latent expression misses words in training; one number stands for all."""
    drop_unit: DropUnit = "word"
    """Whether whole words are missed, or single numbers of their vectors."""
    margin: float = 0.2
    """How far below 1 the cosine of a sentence and its own expressions may stay for free (gamma)."""
    contrast_weight: float = 0.1
    """Weight of the positive-margin contrast (lambda). 0 turns it off."""
    contrast_temperature: float = 0.07
    """Divides the cosines of the contrast (tau)."""
    denominator: Denominator = "with_margin"
    """What the contrast is normalised by, beside other samples: the own pair with or without margin, or nothing."""
    num_concepts: int = 100
    """Rows of the bank of visual concepts, at most the width."""
    concept_temperature: float = 0.1
    """Divides the cosines of concepts and patches."""
    slot_temperature: float = 0.1
    """Divides the cosines of attribute slots and concepts."""
    inject: Literal["residual", "replace"] = "residual"
    """Whether what is injected is added to the attributes or takes their place."""
    inject_at: Literal["layer_end", "after_attention"] = "layer_end"
    """Where in a layer subject and concepts reach the latent expressions."""
    use_subject_distributor: bool = True
    """Overwrite each expression's subject with what vision has made of it, in every layer."""
    use_concept_injector: bool = True
    """Give attributes visual concepts, in every layer."""
    pyramid: bool = True
    """Decode pixels by a pyramid of three strides; else patches are doubled twice, which small grids need."""

    def __post_init__(self) -> None:
        GroundingSettings.__post_init__(self)
        MultiwaySettings.__post_init__(self)
        check_weights(self, "contrast_weight", "margin")
        check_positive(
            self, "contrast_temperature", "num_concepts", "concept_temperature", "slot_temperature"
        )
        check_choice(
            self,
            denominator=("with_margin", "raw", "negatives_only"),
            drop_unit=("word", "element"),
            inject=("residual", "replace"),
            inject_at=("layer_end", "after_attention"),
        )
        self._check_latent()

    def _check_latent(self) -> None:
        if any(length < 1 for length in self.attribute_lengths):
            raise ValueError(f"attribute_lengths must be at least 1 each, got {self.attribute_lengths!r}")
        if not all(0 <= rate < 1 for rate in self.word_drop):
            raise ValueError(f"word_drop must be at least 0 and below 1 each, got {self.word_drop!r}")
        if self.attribute_lengths and len(self.word_drop) not in (1, self.num_expressions):
            raise ValueError(
                f"word_drop must name one rate, or one for each of {self.num_expressions} latent expressions, "
                f"got {self.word_drop!r}"
            )
        if self.margin > 2:
            raise ValueError(f"margin must be at most 2, the span of a cosine, got {self.margin!r}")
        if self.num_concepts > self.width:
            raise ValueError(
                f"num_concepts must be at most the width ({self.width}), got {self.num_concepts!r}"
            )

    @property
    def num_expressions(self) -> int:
        """N"""
        return len(self.attribute_lengths)

    @property
    def word_drop_rates(self) -> tuple[float, ...]:
        """A rate for each latent expression."""
        return self.word_drop if len(self.word_drop) != 1 else self.word_drop * self.num_expressions


class LatentBranch(nn.Module):
    """What a latent expression has of its own in one layer: the norm before attention, and a light feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())


class LatentVGNetwork(GroundingNetwork):
    """Multiway encoder with latent expressions, pixel decoder, dot-product head, and the optional heads."""

    def __init__(self, settings: LatentVGSettings, task: GroundingTask) -> None:
        super().__init__()
        self.settings = settings
        width, channels, lengths = settings.width, settings.channels, settings.attribute_lengths
        self.encoder = MultiwayEncoder(
            settings,
            image_size=task.image_size,
            text_length=task.text_length,
            vocabulary_size=task.vocabulary_size,
            has_class_token=not lengths,
        )
        self.pixel_decoder = PixelDecoder(width, channels, is_pyramid=settings.pyramid)
        self.mask_head = DotHead(width, channels, bias=settings.mask_bias)
        self.box_head = BoxHead(width) if settings.box_head else None
        self.empty_token = nn.Parameter(0.02 * torch.randn(1, 1, width)) if settings.empty_head else None
        self.empty_head = nn.Linear(width, channels) if settings.empty_head else None
        self.empty_bias = nn.Parameter(torch.zeros(())) if settings.empty_head else None
        if lengths:
            self.subject = SubjectSelector(width)
            self.initialiser = ExpressionInitialiser(
                width,
                text_length=task.text_length,
                attribute_lengths=lengths,
                word_drop=settings.word_drop_rates,
                drop_unit=settings.drop_unit,
            )
            self.branches = nn.ModuleList(
                nn.ModuleList(LatentBranch(width) for _ in lengths) for _ in range(settings.num_layers)
            )
            self.injector = _injector(settings) if settings.use_concept_injector else None

    def forward(self, batch: GroundingBatch, draws: Draws | None = None) -> GroundingOutput:
        vision_BTD, text_BLD, latent = self._encoded(batch, draws if self.training else None)
        num_patches = self.encoder.num_patches
        patches_BPD = vision_BTD[:, 1 : 1 + num_patches]
        sentence_BD = text_BLD[:, 0]
        vectors_BND = torch.stack([sentence_BD, *(expression[:, 0] for expression in latent)], dim=1)
        pixels_BChw = self.pixel_decoder([patches_BPD])
        maps_BNhw = self.mask_head(pixels_BChw, vectors_BND)
        return GroundingOutput(
            mask_logits=self._mask(maps_BNhw, batch.images),
            pixel_embed=pixels_BChw,
            sentence_embed=self.mask_head.vectors(sentence_BD),
            expression_logits=maps_BNhw if latent else None,
            empty_logit=self._empty(vision_BTD[:, -1], vectors_BND),
            boxes=None if self.box_head is None else self.box_head(as_map(patches_BPD), sentence_BD),
            extras=_extras(vectors_BND, latent),
        )

    def _encoded(self, batch: GroundingBatch, draws: Draws | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Vision ``[B, 1 + P (+ 1), D]``, text ``[B, L, D]`` and latent expressions ``[B, 2 + K, D]`` each, all normed."""
        encoder, words_BLD = self.encoder, self.encoder.embed_words(batch.token_ids)
        vision_BTD, latent = self._begin(batch, words_BLD, draws)
        runs = [vision_BTD, words_BLD, *latent]
        lengths = [run.shape[1] for run in runs]
        tokens_BTD = torch.cat(runs, dim=1)
        attended = attention_mask(lengths[0], batch.token_mask, sum(lengths[2:]))
        for number, layer in enumerate(encoder.layers):
            tokens_BTD = self._layer(number, layer, tokens_BTD, lengths, attended)
        vision_BTD, text_BLD, *latent = tokens_BTD.split(lengths, dim=1)
        return (
            encoder.vision_norm(vision_BTD),
            encoder.text_norm(text_BLD),
            [encoder.text_norm(z) for z in latent],
        )

    def _begin(
        self, batch: GroundingBatch, words_BLD: Tensor, draws: Draws | None
    ) -> tuple[Tensor, list[Tensor]]:
        patches_BPD = self.encoder.embed_patches(batch.images)
        if self.settings.attribute_lengths:
            first_B1D = self.subject(words_BLD, batch.token_mask, draws)
            latent = self.initialiser(words_BLD, batch.token_mask, first_B1D, draws)
        else:
            first_B1D, latent = self.encoder.embed_class(len(batch.images)), []
        vision = [first_B1D, patches_BPD]
        if self.empty_token is not None:
            vision.append(self.empty_token.expand(len(batch.images), -1, -1))
        return torch.cat(vision, dim=1), latent

    def _layer(
        self, number: int, layer: nn.Module, tokens_BTD: Tensor, lengths: list[int], attended: Tensor
    ) -> Tensor:
        assert isinstance(layer, MultiwayLayer)
        parts = [Part(lengths[0], layer.vision), Part(lengths[1], layer.language)]
        if len(lengths) == len(parts):
            return layer(tokens_BTD, parts, attended)
        for branch, length in zip(self.branches[number], lengths[2:], strict=True):
            parts.append(Part(length, layer.language, branch.norm, branch.feed_forward))

        def exchange(tokens: Tensor) -> Tensor:
            return self._exchanged(tokens, lengths)

        place = "after" if self.settings.inject_at == "layer_end" else "between"
        return layer(tokens_BTD, parts, attended, **{place: exchange})

    def _exchanged(self, tokens_BTD: Tensor, lengths: list[int]) -> Tensor:
        """Subject distributor and concept injector: the joint sequence with other latent expressions."""
        vision_BTD, text_BLD, *latent = tokens_BTD.split(lengths, dim=1)
        slots = [expression[:, NUM_FIXED_TOKENS:] for expression in latent]
        if self.injector is not None:
            patches_BPD = vision_BTD[:, 1 : 1 + self.encoder.num_patches]
            injected_BAD = self.injector(torch.cat(slots, dim=1), patches_BPD, text_BLD[:, 0])
            slots = list(injected_BAD.split([slot.shape[1] for slot in slots], dim=1))
        runs = [vision_BTD, text_BLD]
        for expression, slot in zip(latent, slots, strict=True):
            subject = vision_BTD[:, :1] if self.settings.use_subject_distributor else expression[:, 1:2]
            runs += [expression[:, :1], subject, slot]
        return torch.cat(runs, dim=1)

    def _mask(self, maps_BNhw: Tensor, images: Tensor) -> Tensor:
        maps_BNHW = resized(maps_BNhw, images.shape[-2:])
        return maps_BNHW if maps_BNHW.shape[1] == 1 else average_of_probabilities(maps_BNHW)

    def _empty(self, token_BD: Tensor, vectors_BND: Tensor) -> Tensor | None:
        if self.empty_head is None or self.empty_bias is None:
            return None
        mean_BC = self.mask_head.vectors(vectors_BND).mean(dim=1)
        product_B = (self.empty_head(token_BD) * mean_BC).sum(dim=-1)
        return product_B.float() / math.sqrt(self.settings.channels) + self.empty_bias


class LatentVG(GroundingMethod):
    """Masks of a sentence and of its latent expressions, averaged. Losses ``mask_bce``, ``mask_dice``, ``contrast``."""

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
    def build_network(cls, settings: Any, task: GroundingTask) -> GroundingNetwork:
        network = LatentVGNetwork(settings, task)
        if settings.checkpoint:
            load_multiway(network.encoder, settings.checkpoint)
        return network

    @classmethod
    def without_sources(cls, settings: Any) -> Any:
        return replace(settings, checkpoint="")

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        names = set(without_effect(settings))
        if settings.num_expressions == 0:
            return frozenset(names | LATENT)
        if settings.contrast_weight == 0:
            names |= CONTRAST
        if not settings.use_concept_injector:
            names |= INJECTOR
        if not settings.use_concept_injector and not settings.use_subject_distributor:
            names |= {"inject_at"}
        if not any(settings.word_drop):
            names |= {"drop_unit"}
        return frozenset(names)

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


def _injector(settings: LatentVGSettings) -> ConceptInjector:
    return ConceptInjector(
        settings.width,
        settings.num_concepts,
        concept_temperature=settings.concept_temperature,
        slot_temperature=settings.slot_temperature,
        is_residual=settings.inject == "residual",
    )


def _extras(vectors_BND: Tensor, latent: list[Tensor]) -> dict[str, Tensor]:
    if not latent:
        return {}
    return {
        "sentence": vectors_BND[:, 0],
        "expressions": vectors_BND[:, 1:],
        "slots": torch.cat([expression[:, NUM_FIXED_TOKENS:] for expression in latent], dim=1),
    }
