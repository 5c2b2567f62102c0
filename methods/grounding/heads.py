"""Heads that grounding methods share: mask by dot product, box, and "no such object".

Shape legend: B = batch, N = vectors compared with the pixels, C = decoder width, D = width of a vector, h, w = sides of a
map.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.losses import in_full_precision


class DotHead(nn.Module):
    """Mask logits as scaled products of pixels and projected vectors, plus one bias: ``<pixel, W e> / sqrt(C) + b``."""

    def __init__(self, width: int, channels: int, *, bias: float, project_pixels: bool = False) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(channels, channels, 1) if project_pixels else nn.Identity()
        self.vectors = nn.Linear(width, channels)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, pixels_BChw: Tensor, vectors_BND: Tensor) -> Tensor:
        """One map of logits per vector, ``[B, N, h, w]``."""
        keys_BNC = self.vectors(vectors_BND) / math.sqrt(pixels_BChw.shape[1])
        return torch.einsum("bchw,bnc->bnhw", self.pixels(pixels_BChw), keys_BNC) + self.bias


class BoxHead(nn.Module):
    """A box from the pixels that agree with the sentence (the regressor of OneRef, arXiv 2410.08021).

    Pixels are averaged with weights ``softmax(cos(sentence, pixel))`` and pass three linear layers and a sigmoid.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, 4)
        )  # fmt: skip

    def forward(self, pixels_BChw: Tensor, sentence_BC: Tensor) -> Tensor:
        """Centre x, centre y, width and height in [0, 1], ``[B, 4]``."""
        boxes_B4: Tensor = self.layers(attended(pixels_BChw, sentence_BC))
        return boxes_B4.float().sigmoid()


class EmptyHead(nn.Module):
    """Whether the sentence names nothing here, from the sentence and the pixels that agree with it. A reconstruction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * channels, channels), nn.GELU(), nn.Linear(channels, 1))

    def forward(self, pixels_BChw: Tensor, sentence_BC: Tensor) -> Tensor:
        """Logit, above 0 for "no such object", ``[B]``."""
        joined_B2C = torch.cat([sentence_BC, attended(pixels_BChw, sentence_BC)], dim=1)
        logits_B1: Tensor = self.layers(joined_B2C)
        return logits_B1.float()[:, 0]


@in_full_precision
def attended(pixels_BChw: Tensor, sentence_BC: Tensor) -> Tensor:
    """Mean of the pixels, weighted by the softmax of their cosine with the sentence, ``[B, C]``."""
    pixels_BCP = pixels_BChw.flatten(2)
    cosine_BP = torch.einsum("bcp,bc->bp", F.normalize(pixels_BCP, dim=1), F.normalize(sentence_BC, dim=1))
    return torch.einsum("bcp,bp->bc", pixels_BCP, cosine_BP.softmax(dim=1))
