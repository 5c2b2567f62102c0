"""Shared-RIS: one encoder, one pyramid and one mask decoder, each with the same operators for pixels and words.

"A Simple Baseline with Single-encoder for Referring Image Segmentation", arXiv 2408.15521. Published: the BEiT-3
encoder, a *Shared FPN* and a *Shared Mask Decoder*, and their principle. Reconstructed: everything inside those two, as
neither code nor formulas are public; mask weights 2 and 0.5; the logit's first bias. The box and no-target heads are
ours, and so is ``encoder: dual``, a control. It has as many parameters as the single encoder, in which every parameter
exists once per modality.

No table of the paper could be verified. The nearest anchor, Latent-VG's ablation without latent expressions (same
authors, same backbone), has 68.76 mIoU on RefCOCO+ val. On ShapesRef, 48 px, 800 steps, one seed: 55.5 mIoU.

Shape legend: B = batch, D = encoder width, C = decoder width, L = text length, P = patches, h, w = sides of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from methods.checks import check_choice
from methods.grounding.contracts import GroundingBatch, GroundingOutput, GroundingTask
from methods.grounding.draws import Draws
from methods.grounding.heads import BoxHead, DotHead, EmptyHead
from methods.grounding.method import GroundingNetwork
from methods.grounding.multiway import MultiwayEncoder, MultiwaySettings
from methods.grounding.multiway_method import MultiwayMethod
from methods.grounding.pixel_decoder import Pyramid, as_map, resized
from methods.grounding.presets import SHARED_RIS
from methods.grounding.settings import RANGES, GroundingSettings, without_effect
from methods.grounding.shared_decoder import Rise, SharedMaskDecoder, SharedProjection


@dataclass(frozen=True, kw_only=True)
class SharedRISSettings(GroundingSettings, MultiwaySettings):
    """Settings of ``shared_ris``. The defaults are the paper's size; preset ``shared_ris_small`` is for two cores."""

    encoder: Literal["single", "dual"] = "single"
    """``single``: pixels and words attend to each other in every layer. ``dual``: two towers of the same depth and width
    that meet in the mask decoder only, what the single encoder is to be compared with."""
    taps: tuple[int, ...] = (4, 8, 12)
    """Encoder layers whose states are decoded, counted from 1, rising. A pyramid takes three."""
    share_projection: bool = True
    """One projection per tap for pixels and words; false gives each modality its own."""
    decoder_layers: int = 2
    """Self-attention layers of the mask decoder, 0 to 3. With 0 only the encoder mixes pixels and words."""
    decoder_heads: int = 8
    """Attention heads of the mask decoder; must divide the channels."""
    decoder_stride: Literal[16, 32] = 16
    """Which level of the pyramid passes the mask decoder (for patches of 16 pixels; coarser is quicker)."""
    sentence: Literal["first_token", "mean_of_words"] = "first_token"
    """What stands for the sentence when pixels are compared with it."""
    pyramid: bool = True
    """Decode by a pyramid of three strides; without, the taps are summed on their one grid, which small grids need."""

    def __post_init__(self) -> None:
        GroundingSettings.__post_init__(self)
        MultiwaySettings.__post_init__(self)
        check_choice(self, sentence=("first_token", "mean_of_words"), encoder=("single", "dual"))
        rising = all(before < after for before, after in pairwise((0, *self.taps)))
        if not self.taps or not rising or self.taps[-1] != self.num_layers:
            raise ValueError(
                f"taps must be rising layers that end with the last one ({self.num_layers}), got {self.taps!r}"
            )
        if self.pyramid and len(self.taps) != 3:
            raise ValueError(f"taps must be three layers for a pyramid, got {self.taps!r}")
        if not 0 <= self.decoder_layers <= 3:
            raise ValueError(f"decoder_layers must be from 0 to 3, got {self.decoder_layers!r}")
        if self.decoder_stride not in (16, 32):
            raise ValueError(f"decoder_stride must be 16 or 32, got {self.decoder_stride!r}")
        if self.decoder_heads < 1 or self.channels % self.decoder_heads:
            raise ValueError(
                f"decoder_heads must divide channels ({self.channels}), got {self.decoder_heads!r}"
            )

    @property
    def is_coarse(self) -> bool:
        """Whether the mask decoder works on the coarsest level. Without layers there is nothing to be quicker about."""
        return self.pyramid and self.decoder_layers > 0 and self.decoder_stride == 32


class SharedRISNetwork(GroundingNetwork):
    """Multiway encoder, shared projections and pyramid, shared mask decoder, and a dot-product head."""

    def __init__(self, settings: SharedRISSettings, task: GroundingTask) -> None:
        super().__init__()
        self.settings = settings
        width, channels = settings.width, settings.channels
        self.encoder = MultiwayEncoder(
            settings,
            image_size=task.image_size,
            text_length=task.text_length,
            vocabulary_size=task.vocabulary_size,
            has_norms=False,
        )
        self.projections = nn.ModuleList(
            SharedProjection(width, channels, is_shared=settings.share_projection) for _ in settings.taps
        )
        self.pyramid = Pyramid(channels) if settings.pyramid else None
        self.mask_decoder = SharedMaskDecoder(channels, settings.decoder_heads, settings.decoder_layers)
        self.pixel_decoder = Rise(channels, 3 if settings.is_coarse else 2)
        self.mask_head = DotHead(channels, channels, bias=settings.mask_bias, project_pixels=True)
        self.box_head = BoxHead(channels) if settings.box_head else None
        self.empty_head = EmptyHead(channels) if settings.empty_head else None

    def forward(self, batch: GroundingBatch, draws: Draws | None = None) -> GroundingOutput:
        levels, words_BLC = self._levels(batch)
        maps, words_BLC = self.mask_decoder(levels[0], words_BLC, batch.token_mask)
        pixels_BChw = self.pixel_decoder(maps, levels[1:])
        sentence_BC = self._sentence(words_BLC, batch.token_mask)
        logits_B1hw = self.mask_head(pixels_BChw, sentence_BC[:, None])
        embed_BC = self.mask_head.vectors(sentence_BC)
        return GroundingOutput(
            mask_logits=resized(logits_B1hw, batch.images.shape[-2:]),
            pixel_embed=pixels_BChw,
            sentence_embed=embed_BC,
            empty_logit=None if self.empty_head is None else self.empty_head(pixels_BChw, embed_BC),
            boxes=None if self.box_head is None else self.box_head(pixels_BChw, embed_BC),
        )

    def _levels(self, batch: GroundingBatch) -> tuple[list[Tensor], Tensor]:
        """The level that is decoded and the finer ones, coarse to fine; and the mean of the projected words."""
        length = batch.token_ids.shape[1]
        states = self.encoder.states(
            batch.images, batch.token_ids, batch.token_mask, is_joint=self.settings.encoder == "single"
        )
        tapped = [state for number, state in enumerate(states, start=1) if number in self.settings.taps]
        maps, words = [], []
        for projection, state in zip(self.projections, tapped, strict=True):
            patches_BPD, words_BLD = (
                state[:, 1 : state.shape[1] - length],
                state[:, state.shape[1] - length :],
            )
            patches_BPC, words_BLC = projection(patches_BPD, words_BLD)
            maps.append(as_map(patches_BPC))
            words.append(words_BLC)
        mean_BLC = sum(words[1:], words[0]) / len(words)
        if self.pyramid is None:
            return [sum(maps[1:], maps[0])], mean_BLC
        fine, same, coarse = self.pyramid(*maps)
        return [coarse, same, fine] if self.settings.is_coarse else [same, fine], mean_BLC

    def _sentence(self, words_BLC: Tensor, token_mask_BL: Tensor) -> Tensor:
        if self.settings.sentence == "first_token":
            return words_BLC[:, 0]
        real_BL1 = token_mask_BL[..., None].to(words_BLC.dtype)
        return (words_BLC * real_BL1).sum(dim=1) / real_BL1.sum(dim=1)


class SharedRIS(MultiwayMethod):
    """One encoder, pyramid and mask decoder for pixels and words. Losses ``mask_bce``, ``mask_dice``."""

    network_type = SharedRISNetwork
    Settings = SharedRISSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = SHARED_RIS
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **RANGES,
        "decoder_layers": {"grid": [0, 1, 2, 3]},
        "share_projection": {"choice": [True, False]},
        "decoder_stride": {"choice": [16, 32]},
        "sentence": {"choice": ["first_token", "mean_of_words"]},
        "encoder": {"choice": ["single", "dual"]},
        "drop_path": {"uniform": [0, 0.3]},
    }
    settings: SharedRISSettings

    @classmethod
    def inactive(cls, settings: Any) -> frozenset[str]:
        names = set(without_effect(settings))
        if settings.encoder == "single":  # as in artifacts from before there was a choice
            names |= {"encoder"}
        if settings.decoder_layers == 0:
            names |= {"decoder_heads"}
        if settings.decoder_layers == 0 or not settings.pyramid:
            names |= {"decoder_stride"}
        return frozenset(names)
