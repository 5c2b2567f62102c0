"""Random numbers of a training step, as functions of (seed, epoch, sample, purpose).

So the same sample gets the same draw on any number of workers, in any order, and after an interruption.

Shape legend: B = batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.distil.negatives import mixed

STEPS = 2**24
"""Values that a draw can take: as many as float32 tells apart in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What may be drawn for one batch. Asking twice for one purpose gives the same numbers."""

    seed: Tensor
    """Whole number, scalar int64."""
    indices: Tensor
    """Which samples the batch holds, ``[B]`` int64."""
    epoch: int = 0

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Numbers from [0, 1), ``[B, *shape]`` float32; another purpose gives independent ones."""
        stream = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
        keys_B1 = mixed(self.indices + mixed(mixed(self.seed + stream) + self.epoch))[:, None]
        num_draws = torch.Size(shape).numel()
        numbers = torch.arange(1, num_draws + 1, device=self.indices.device)
        bits = mixed(keys_B1 ^ mixed(numbers)) >> 8
        return (bits.to(torch.float32) / STEPS).view(len(self.indices), *shape)

    def gumbel(self, purpose: str, *shape: int) -> Tensor:
        """Standard Gumbel noise, ``[B, *shape]`` float32."""
        uniform = self.uniform(purpose, *shape) + 0.5 / STEPS
        return -(-uniform.log()).log()
