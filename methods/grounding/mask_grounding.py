"""Mask grounding: predict hidden words from the other words, the picture and the mask (MagNet). Training only.

Published: the task, its three inputs, and (in the code that the authors point to) 15 % of the words selected, nine in ten
of them replaced. Reconstructed: that one word is always selected, the form of the mask's feature, the number of predictor
layers, and that the loss is averaged over the words of a sentence before it is averaged over sentences.

Shape legend: B = batch, L = text length, D = text width, C = width of the image features, V = vocabulary, k = side of the
pooled picture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.grounding.token_masking import content_words
from methods.losses import in_full_precision

POOLED_SIDE = 6


class WordSelection(NamedTuple):
    """Which words are to be predicted, and what the network reads instead."""

    selected: Tensor
    """``[B, L]`` bool"""
    token_ids: Tensor
    """``[B, L]`` with the mask token at nine in ten of them."""


def select_words(
    token_ids_BL: Tensor,
    token_mask_BL: Tensor,
    draws_2BL: tuple[Tensor, Tensor],
    *,
    mask_id: int,
    probability: float,
    replace_probability: float = 0.9,
    at_least_one: bool = True,
) -> WordSelection:
    """Draw the words to predict; start, end and padding never are.

    Args:
        draws_2BL: Two sets of numbers from [0, 1): which words, and which of them are replaced.
        at_least_one: Where nothing was drawn, take the word with the lowest number, so that short sentences count.
    """
    drawn_BL, kept_BL = draws_2BL
    words_BL = content_words(token_mask_BL)
    selected_BL = words_BL & (drawn_BL < probability)
    if at_least_one:
        lowest_BL = F.one_hot(drawn_BL.masked_fill(~words_BL, 2.0).argmin(dim=1), words_BL.shape[1]).bool()
        selected_BL |= lowest_BL & words_BL & ~selected_BL.any(dim=1, keepdim=True)
    replaced_BL = selected_BL & (kept_BL < replace_probability)
    return WordSelection(selected_BL, token_ids_BL.masked_fill(replaced_BL, mask_id))


class WordPredictor(nn.Module):
    """A small transformer over words, pooled picture and mask, and the logits of every word."""

    def __init__(
        self,
        width: int,
        image_width: int,
        vocabulary_size: int,
        *,
        num_layers: int,
        num_heads: int,
        expansion: int,
        inputs: tuple[str, ...],
    ) -> None:
        """Build the predictor.

        Args:
            expansion: Width of the feed-forward part over ``width``.
            inputs: What it sees beside the words: of ``image`` and ``mask``.
        """
        super().__init__()
        self.image = nn.Linear(image_width, width) if "image" in inputs else None
        self.mask = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, width)) if "mask" in inputs else None  # fmt: skip
        self.types = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(width)) for name in ("words", *inputs)}
        )
        layer = nn.TransformerEncoderLayer(
            width, num_heads, expansion * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(
        self,
        words_BLD: Tensor,
        token_mask_BL: Tensor,
        pixel_embed_BChw: Tensor,
        masks_B1HW: Tensor,
        vocabulary_VD: Tensor,
    ) -> Tensor:
        """Logits of every word at every place, ``[B, L, V]``; the output matrix is the word embedding."""
        parts, keys = [words_BLD + self.types["words"]], [token_mask_BL]
        if self.image is not None:
            pooled_BQC = F.adaptive_avg_pool2d(pixel_embed_BChw, POOLED_SIDE).flatten(2).transpose(1, 2)
            parts.append(self.image(pooled_BQC) + self.types["image"])
        if self.mask is not None:
            parts.append(self.mask(mask_features(masks_B1HW))[:, None] + self.types["mask"])
        keys += [token_mask_BL.new_ones(part.shape[:2]) for part in parts[1:]]
        states_BTD = self.layers(torch.cat(parts, dim=1), src_key_padding_mask=~torch.cat(keys, dim=1))
        return F.linear(states_BTD[:, : words_BLD.shape[1]], vocabulary_VD, self.bias)


@torch.no_grad()
def mask_features(masks_B1HW: Tensor) -> Tensor:
    """Centre of mass (x, y), covered share, and a constant 1, ``[B, 4]``; an empty mask has 0, 0, 0, 1."""
    masks_BHW = masks_B1HW[:, 0].float()
    area_B = masks_BHW.sum(dim=(1, 2))
    height, width = masks_BHW.shape[1:]
    x_W = (torch.arange(width, device=masks_BHW.device) + 0.5) / width
    y_H = (torch.arange(height, device=masks_BHW.device) + 0.5) / height
    centre_x_B = (masks_BHW.sum(dim=1) * x_W).sum(dim=1) / area_B.clamp_min(1)
    centre_y_B = (masks_BHW.sum(dim=2) * y_H).sum(dim=1) / area_B.clamp_min(1)
    return torch.stack([centre_x_B, centre_y_B, area_B / (height * width), torch.ones_like(area_B)], dim=1)


@in_full_precision
def word_loss(logits_BLV: Tensor, token_ids_BL: Tensor, selected_BL: Tensor) -> Tensor:
    """Cross-entropy of the selected words, averaged per sentence, then over sentences, scalar.

    A sentence without a selected word adds 0.
    """
    losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), token_ids_BL, reduction="none")
    sums_B = (losses_BL * selected_BL).sum(dim=1)
    return (sums_B / selected_BL.sum(dim=1).clamp_min(1)).mean()
