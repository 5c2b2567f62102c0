"""From the patches of a plain transformer to pixel features at stride 4: the common pyramid, and a flat form of it.

Neither is described in the public material of the methods that use it; both are reconstructions.

Shape legend: B = batch, D = encoder width, C = decoder width, g = patches per side, h, w = sides of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

MOST_GROUPS = 8


class ConvolutionBlock(nn.Sequential):
    """3x3 convolution, group norm, GELU: ``[B, C, h, w]`` to the same shape."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.GroupNorm(math.gcd(MOST_GROUPS, channels), channels),
            nn.GELU(),
        )


class UpBlock(nn.Module):
    """Twice the sides (bilinear), then a convolution block: ``[B, C, h, w] -> [B, C', 2h, 2w]``."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.block = ConvolutionBlock(in_channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        grown: Tensor = self.block(resized(maps, (2 * maps.shape[-2], 2 * maps.shape[-1])))
        return grown


class Pyramid(nn.Module):
    """Three maps of one stride become strides one half, one and two, and are joined from coarse to fine."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.finer = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.blocks = nn.ModuleList(ConvolutionBlock(channels, channels) for _ in range(3))

    def forward(self, shallow: Tensor, middle: Tensor, deep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps ``[B, C, g, g]`` to ``[B, C, 2g, 2g]``, ``[B, C, g, g]`` and ``[B, C, g // 2, g // 2]``."""
        coarse: Tensor = self.blocks[2](F.max_pool2d(deep, 2))
        same: Tensor = self.blocks[1](middle + resized(coarse, middle.shape[-2:]))
        fine = self.finer(shallow)
        return self.blocks[0](fine + resized(same, fine.shape[-2:])), same, coarse


class PixelDecoder(nn.Module):
    """Patch features of one or several layers to pixel features: a projection per layer, then up.

    With ``is_pyramid`` one layer (or three, shallow to deep) passes the pyramid and one doubling; without, all layers
    are summed on their one grid and doubled twice. Both end at a quarter of the patch size.
    """

    def __init__(self, width: int, channels: int, *, num_taps: int = 1, is_pyramid: bool = True) -> None:
        """Build the decoder.

        Raises:
            ValueError: A pyramid is asked for with another number of layers than one or three.
        """
        super().__init__()
        if is_pyramid and num_taps not in (1, 3):
            raise ValueError(f"a pyramid takes one layer or three, got {num_taps}")
        self.projections = nn.ModuleList(nn.Linear(width, channels) for _ in range(num_taps))
        self.pyramid = Pyramid(channels) if is_pyramid else None
        num_doublings = 1 if is_pyramid else 2
        self.up = nn.Sequential(*(UpBlock(channels, channels) for _ in range(num_doublings)))

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Patch features ``[B, g * g, D]`` of each layer to ``[B, C, 4g, 4g]``."""
        maps = [as_map(layer(tap)) for layer, tap in zip(self.projections, taps, strict=True)]
        if self.pyramid is None:
            joined = sum(maps[1:], maps[0])
        else:
            joined = self.pyramid(*(maps if len(maps) == 3 else 3 * maps))[0]
        pixels: Tensor = self.up(joined)
        return pixels


def as_map(tokens_BPC: Tensor) -> Tensor:
    """Patches of a square picture, row by row, as a map ``[B, C, g, g]``."""
    batch, num_patches, channels = tokens_BPC.shape
    side = math.isqrt(num_patches)
    return tokens_BPC.transpose(1, 2).reshape(batch, channels, side, side)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear to ``size``; a map that has it already comes back as it is."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
