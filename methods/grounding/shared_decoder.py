"""Parts of Shared-RIS that treat pixels and words alike: projection, self-attention; and the way up to pixels.

All are reconstructions: public is that such parts exist, and their principle.

Shape legend: B = batch, C = decoder width, L = text length, P = patches, S = tokens of map and words, h, w = sides of a
map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.grounding.multiway import attention_mask
from methods.grounding.pixel_decoder import UpBlock, resized


class SharedProjection(nn.Module):
    """Norm and linear layer from the encoder's width to the decoder's, for pixels and words alike (unless not shared)."""

    def __init__(self, width: int, channels: int, *, is_shared: bool) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.own_text = None if is_shared else nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))

    def forward(self, patches_BPD: Tensor, words_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, P, C]`` and ``[B, L, C]``"""
        text = self.vision if self.own_text is None else self.own_text
        return self.vision(patches_BPD), text(words_BLD)


class SharedLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, with one set of weights for all tokens."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, tokens_BSC: Tensor, attended_B11S: Tensor) -> Tensor:
        """``[B, S, C]``; padding is not attended to."""
        projected = self.qkv(self.norm_attention(tokens_BSC)).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=attended_B11S)
        tokens_BSC = tokens_BSC + self.out(mixed.transpose(1, 2).flatten(2))
        further_BSC: Tensor = self.feed_forward(self.norm_feed_forward(tokens_BSC))
        return tokens_BSC + further_BSC


class SharedMaskDecoder(nn.Module):
    """Self-attention over one map and the words: ``[B, C, h, w]`` and ``[B, L, C]`` to the same shapes."""

    def __init__(self, channels: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SharedLayer(channels, num_heads) for _ in range(num_layers))

    def forward(self, maps: Tensor, words_BLC: Tensor, token_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        num_pixels, length = maps.shape[-2] * maps.shape[-1], words_BLC.shape[1]
        tokens_BSC = torch.cat([maps.flatten(2).transpose(1, 2), words_BLC], dim=1)
        attended = attention_mask(num_pixels, token_mask_BL)
        for layer in self.layers:
            tokens_BSC = layer(tokens_BSC, attended)
        pixels_BPC, words_BLC = torch.split(tokens_BSC, [num_pixels, length], dim=1)
        return pixels_BPC.transpose(1, 2).reshape(maps.shape), words_BLC


class Rise(nn.Module):
    """From the decoded level up to a quarter of the patch size, adding the finer levels on the way."""

    def __init__(self, channels: int, num_doublings: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UpBlock(channels, channels) for _ in range(num_doublings))

    def forward(self, maps: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """Pixel features ``[B, C, h, w]``. ``finer`` are the levels above ``maps``, coarse to fine."""
        for number, block in enumerate(self.blocks):
            maps = block(maps)
            if number < len(finer):
                maps = resized(maps, finer[number].shape[-2:]) + finer[number]
        return maps
