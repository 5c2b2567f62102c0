"""The network of Latent-VG: a Multiway encoder that carries latent expressions beside the sentence.

Shape legend: B = batch, N = latent expressions, D = encoder width, C = decoder width, T = tokens of the joint sequence,
P = patches, L = text length, K = attribute tokens of one expression, h, w = sides of the pixel map.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.draws import Draws
from methods.grounding.heads import BoxHead, DotHead
from methods.grounding.latent_expressions import (
    NUM_FIXED_TOKENS,
    ConceptInjector,
    ExpressionInitialiser,
    SubjectSelector,
)
from methods.grounding.latent_settings import LatentVGSettings
from methods.grounding.mask_losses import average_of_probabilities
from methods.grounding.method import GroundingNetwork
from methods.grounding.multiway import MultiwayEncoder, MultiwayLayer, Part, attention_mask
from methods.grounding.pixel_decoder import PixelDecoder, as_map, resized


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
        vision_BTD, text_BLD, *latent = torch.split(tokens_BTD, lengths, dim=1)
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
            return cast(Tensor, layer(tokens_BTD, parts, attended))
        branches = cast(nn.ModuleList, self.branches[number])
        for branch, length in zip(branches, lengths[2:], strict=True):
            assert isinstance(branch, LatentBranch)
            parts.append(Part(length, layer.language, branch.norm, branch.feed_forward))

        def exchange(tokens: Tensor) -> Tensor:
            return self._exchanged(tokens, lengths)

        place = "after" if self.settings.inject_at == "layer_end" else "between"
        return cast(Tensor, layer(tokens_BTD, parts, attended, **{place: exchange}))

    def _exchanged(self, tokens_BTD: Tensor, lengths: list[int]) -> Tensor:
        """Subject distributor and concept injector: the joint sequence with other latent expressions."""
        vision_BTD, text_BLD, *latent = torch.split(tokens_BTD, lengths, dim=1)
        slots = [expression[:, NUM_FIXED_TOKENS:] for expression in latent]
        if self.injector is not None:
            patches_BPD = vision_BTD[:, 1 : 1 + self.encoder.num_patches]
            injected_BAD = self.injector(torch.cat(slots, dim=1), patches_BPD, text_BLD[:, 0])
            slots = list(torch.split(injected_BAD, [slot.shape[1] for slot in slots], dim=1))
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
        product_B: Tensor = (self.empty_head(token_BD) * mean_BC).sum(dim=-1)
        return product_B.float() / math.sqrt(self.settings.channels) + self.empty_bias


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
