"""Patches that ask words: a transformer decoder from text to image, and the head that a sentence writes (CM-MaskSD).

Published: a CLIP-based segmenter whose masked branches share all weights. Reconstructed after CRIS: the decoder, the
up-sampling and the dynamic head.

Shape legend: B = batch, P = patches, L = text length, E = shared width, C = decoder width, h, w = sides of a map.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_SIDE = 3


class TextToPatchDecoder(nn.Module):
    """Layers of self-attention over patches, cross-attention to words, and feed-forward, norm first."""

    def __init__(self, width: int, *, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, patches_BPE: Tensor, words_BLE: Tensor, token_mask_BL: Tensor) -> Tensor:
        """Patches that know the words, ``[B, P, E]``; padded words are removed from the keys."""
        side = math.isqrt(patches_BPE.shape[1])
        states_BPE = patches_BPE + sine_positions(side, patches_BPE.shape[2], device=patches_BPE.device)
        for layer in self.layers:
            states_BPE = layer(states_BPE, words_BLE, memory_key_padding_mask=~token_mask_BL)
        normed: Tensor = self.norm(states_BPE)
        return normed


class DynamicHead(nn.Module):
    """A sentence vector becomes a 3x3 kernel and a bias, by which its own picture is convolved."""

    def __init__(self, width: int, channels: int, *, bias: float) -> None:
        super().__init__()
        self.channels = channels
        self.kernel = nn.Linear(width, channels * KERNEL_SIDE**2 + 1)
        with torch.no_grad():
            self.kernel.bias[-1] = bias

    def kernels(self, sentence_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels ``[B, C, 3, 3]``, small at first (divided by sqrt C), and biases ``[B]``."""
        written_BK = self.kernel(sentence_BE)
        kernels_BC33 = written_BK[:, :-1].unflatten(1, (self.channels, KERNEL_SIDE, KERNEL_SIDE))
        return kernels_BC33 / math.sqrt(self.channels), written_BK[:, -1]

    def forward(self, pixels_BChw: Tensor, sentence_BE: Tensor) -> Tensor:
        """Mask logits, ``[B, 1, h, w]``."""
        kernels_BC33, biases_B = self.kernels(sentence_BE)
        num_rows = len(pixels_BChw)
        # One grouped convolution: the batch becomes channels, and each group is one sample.
        joined_1Mhw = pixels_BChw.flatten(0, 1)[None]
        logits_1Bhw = F.conv2d(joined_1Mhw, kernels_BC33, biases_B, padding=KERNEL_SIDE // 2, groups=num_rows)
        return logits_1Bhw.transpose(0, 1)


def sine_positions(side: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a square grid, row by row, ``[side * side, width]``: half the width for rows, half for columns.

    Raises:
        ValueError: ``width`` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4 for positions in two directions, got {width!r}")
    rates = 10_000.0 ** (-torch.arange(width // 4, device=device) / (width // 4))
    angles = torch.arange(side, device=device, dtype=torch.float32)[:, None] * rates
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = along[:, None].expand(side, side, -1)
    columns = along[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
