"""Padding, cropping and mirroring of a whole batch at once, on the device where it lies.

What happens to an image follows from (seed, epoch, sample id), see ``randomness``: the same sample in the same
epoch is augmented alike whatever the batch, its place in it, or the worker.

Shape legend: n = samples, B = batch, C = channels, H, W = image sides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.data.base import Augment
from methods.data.randomness import integers, uniform


class Draws(NamedTuple):
    """What was drawn for each of n samples."""

    top: Tensor
    """First row of the crop in the padded image, 0..2 * pad, ``[n]``, int64."""
    left: Tensor
    """First column of the crop in the padded image, ``[n]``, int64."""
    flip: Tensor
    """Whether the crop is mirrored, ``[n]``, bool."""
    pad: int
    """Black pixels around each image."""

    def select(self, part: slice) -> Draws:
        """The draws of a part of the samples."""
        return Draws(self.top[part], self.left[part], self.flip[part], self.pad)


def draw(augment: Augment, *, seed: int, epoch: int, ids: np.ndarray, device: torch.device) -> Draws:
    """Draw for the samples ``ids`` ``[n]`` in ``epoch``."""
    choices = 2 * augment.pad + 1
    top = integers(seed, "crop_top", epoch, ids, high=choices)
    left = integers(seed, "crop_left", epoch, ids, high=choices)
    flip = uniform(seed, "flip", epoch, ids) < (0.5 if augment.flip else 0.0)
    on_device = [torch.from_numpy(values).to(device) for values in (top, left, flip)]
    return Draws(on_device[0], on_device[1], on_device[2], augment.pad)


def apply_draws(images: Tensor, draws: Draws) -> Tensor:
    """Pad ``images`` ``[B, C, H, W]`` with zeros, crop them back to size and mirror some, as drawn: a new tensor.

    Meant for pixels before normalisation, where zero is black: the order of torchvision's crop, then normalise.
    """
    batch, channels, height, width = images.shape
    pad = draws.pad
    padded = F.pad(images, (pad, pad, pad, pad)) if pad else images
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = draws.top[:, None] + row
    columns = draws.left[:, None] + torch.where(draws.flip[:, None], width - 1 - column, column)
    flat = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(batch, 1, height * width)
    cropped = padded.reshape(batch, channels, -1).gather(2, flat.expand(-1, channels, -1))
    return cropped.view(batch, channels, height, width)


class Normalise:
    """Pixels 0..255 to float32 with the given mean and deviation per channel: ``(pixels / 255 - mean) / std``."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        exact_mean, exact_std = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
        self.scale = _per_channel(1.0 / (255.0 * exact_std), device)
        self.shift = _per_channel(-exact_mean / exact_std, device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[B, C, H, W]`` uint8 -> float32."""
        return pixels.to(torch.float32).mul_(self.scale).add_(self.shift)


def _per_channel(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
