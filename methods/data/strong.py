"""The strongly varied view of an image: crop and mirror, two random operations, and a grey square.

The operations and their ranges are those of FixMatch (Sohn et al., arXiv 2001.07685, RandAugment variant), each with
a magnitude drawn anew; the square has a random side of up to half the image. What happens to an image follows from
(seed, epoch, sample id) alone, as for the weak view, and is drawn independently of that one.

Shape legend: B = batch, b = images of a batch that get one operation, C = channels, H, W = image sides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.data.augment import apply_draws, draw
from methods.data.base import Augment
from methods.data.randomness import derive_seed, integers, uniform

NUM_OPERATIONS = 2
GREY = 127
Operation = Callable[[Tensor, Tensor], Tensor]
"""Float pixels 0..255 ``[b, C, H, W]`` and a level from [0, 1) for each image, ``[b]`` -> varied pixels."""


def strong_view(pixels: Tensor, augment: Augment, *, seed: int, epoch: int, ids: np.ndarray) -> Tensor:
    """A new uint8 tensor of the shape of ``pixels`` ``[B, C, H, W]``, the images of samples ``ids``."""
    seed = derive_seed(seed, "strong")
    cropped = apply_draws(pixels, draw(augment, seed=seed, epoch=epoch, ids=ids, device=pixels.device))
    varied = cropped.float()
    for turn in range(NUM_OPERATIONS):
        choices = integers(seed, f"operation_{turn}", epoch, ids, high=len(OPERATIONS))
        levels = uniform(seed, f"level_{turn}", epoch, ids)
        varied = _apply_chosen(varied, choices, levels)
    return _cut_out(varied, seed=seed, epoch=epoch, ids=ids).to(torch.uint8)


def _apply_chosen(pixels: Tensor, choices: np.ndarray, levels: np.ndarray) -> Tensor:
    """Each image gets its own operation; images of one operation are varied together."""
    varied = pixels.clone()
    for number in np.unique(choices):
        chosen = np.flatnonzero(choices == number)
        where = torch.from_numpy(chosen).to(pixels.device)
        level = torch.from_numpy(levels[chosen]).to(pixels.device, torch.float32)
        changed = OPERATIONS[number](pixels.index_select(0, where), level)
        varied.index_copy_(0, where, changed.round().clamp(0, 255))
    return varied


def _cut_out(pixels: Tensor, *, seed: int, epoch: int, ids: np.ndarray) -> Tensor:
    height, width = pixels.shape[2:]
    side = 1 + integers(seed, "cut_side", epoch, ids, high=max(1, min(height, width) // 2))
    top = integers(seed, "cut_row", epoch, ids, high=height) - side // 2
    left = integers(seed, "cut_column", epoch, ids, high=width) - side // 2
    bounds = torch.from_numpy(np.stack([top, top + side, left, left + side])).to(pixels.device)[..., None]
    row = torch.arange(height, device=pixels.device)
    column = torch.arange(width, device=pixels.device)
    in_rows_BH = (row >= bounds[0]) & (row < bounds[1])
    in_columns_BW = (column >= bounds[2]) & (column < bounds[3])
    is_cut = in_rows_BH[:, None, :, None] & in_columns_BW[:, None, None, :]
    return pixels.masked_fill(is_cut, GREY)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _blend(pixels: Tensor, other: Tensor, level: Tensor) -> Tensor:
    """From ``other`` towards the image: a factor from 0.05 to 0.95."""
    return other + _per_image(0.05 + 0.9 * level) * (pixels - other)


def _grey(pixels: Tensor) -> Tensor:
    """Luminance of colour images, the mean of any other number of channels, ``[b, 1, H, W]``."""
    if pixels.shape[1] != 3:
        return pixels.mean(dim=1, keepdim=True).round()
    luminance = 0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2]
    return luminance.round()[:, None]


def identity(pixels: Tensor, level: Tensor) -> Tensor:
    return pixels


def autocontrast(pixels: Tensor, level: Tensor) -> Tensor:
    """Each channel stretched to 0..255; one of a single value stays."""
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    stretched = (pixels - low) * (255 / (high - low).clamp_min(1))
    return torch.where(high > low, stretched, pixels)


def brightness(pixels: Tensor, level: Tensor) -> Tensor:
    return _blend(pixels, torch.zeros_like(pixels), level)


def colour(pixels: Tensor, level: Tensor) -> Tensor:
    return _blend(pixels, _grey(pixels), level)


def contrast(pixels: Tensor, level: Tensor) -> Tensor:
    mean = _grey(pixels).double().mean(dim=(1, 2, 3), keepdim=True).round().to(pixels.dtype)
    return _blend(pixels, mean, level)


def equalize(pixels: Tensor, level: Tensor) -> Tensor:
    """Each channel's values spread so that all are about equally frequent."""
    flat = pixels.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    before = counts.cumsum(dim=2) - counts
    highest = counts.gather(2, flat.amax(dim=2, keepdim=True))
    step = torch.div(flat.shape[2] - highest, 255, rounding_mode="floor")
    table = torch.div(before + step // 2, step.clamp_min(1), rounding_mode="floor").clamp(0, 255)
    spread = table.gather(2, flat).view_as(pixels).to(pixels.dtype)
    return torch.where(step[..., None] > 0, spread, pixels)


def posterize(pixels: Tensor, level: Tensor) -> Tensor:
    """Only the 4 to 8 highest bits of each value."""
    size = _per_image(2.0 ** (4 - (5 * level).floor()))
    return (pixels / size).floor() * size


def sharpness(pixels: Tensor, level: Tensor) -> Tensor:
    """Blend with the image smoothed by a 3x3 window; the border stays as it is."""
    height, width = pixels.shape[2:]
    around = F.unfold(pixels, 3).view(len(pixels), pixels.shape[1], 9, height - 2, width - 2).sum(dim=2)
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = ((around + 4 * pixels[:, :, 1:-1, 1:-1]) / 13).round()
    return _blend(pixels, smooth, level)


def solarize(pixels: Tensor, level: Tensor) -> Tensor:
    """Values from a threshold on are inverted."""
    return torch.where(pixels >= _per_image(256 * level), 255 - pixels, pixels)


def rotate(pixels: Tensor, level: Tensor) -> Tensor:
    angle = torch.deg2rad(60 * level.double() - 30)
    return _moved(pixels, angle.cos(), angle.sin(), -angle.sin(), angle.cos())


def shear_x(pixels: Tensor, level: Tensor) -> Tensor:
    return _moved(pixels, across=0.6 * level.double() - 0.3)


def shear_y(pixels: Tensor, level: Tensor) -> Tensor:
    return _moved(pixels, down=0.6 * level.double() - 0.3)


def translate_x(pixels: Tensor, level: Tensor) -> Tensor:
    return _moved(pixels, right=(0.6 * level.double() - 0.3) * pixels.shape[3])


def translate_y(pixels: Tensor, level: Tensor) -> Tensor:
    return _moved(pixels, below=(0.6 * level.double() - 0.3) * pixels.shape[2])


def _moved(
    pixels: Tensor,
    wide: Tensor | float = 1.0,
    across: Tensor | float = 0.0,
    down: Tensor | float = 0.0,
    high: Tensor | float = 1.0,
    *,
    right: Tensor | float = 0.0,
    below: Tensor | float = 0.0,
) -> Tensor:
    """Nearest pixel at ``(wide x + across y + right, down x + high y + below)`` from the centre; black outside."""
    batch, channels, height, width = pixels.shape
    numbers = [torch.as_tensor(each, dtype=torch.float64, device=pixels.device).expand(batch)[:, None, None] for each in (wide, across, down, high, right, below)]  # fmt: skip
    wide, across, down, high, right, below = numbers
    y = torch.arange(height, dtype=torch.float64, device=pixels.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64, device=pixels.device) - (width - 1) / 2
    column = (wide * x + across * y + right + (width - 1) / 2).round().long()
    row = (down * x + high * y + below + (height - 1) / 2).round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    flat = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).view(batch, 1, -1)
    taken = pixels.flatten(2).gather(2, flat.expand(-1, channels, -1)).view_as(pixels)
    return torch.where(inside[:, None], taken, torch.zeros_like(taken))


OPERATIONS: tuple[Operation, ...] = (
    identity, autocontrast, brightness, colour, contrast, equalize, posterize, rotate, sharpness, shear_x, shear_y,
    solarize, translate_x, translate_y,
)  # fmt: skip
"""What one of the two draws may be, each equally likely."""
