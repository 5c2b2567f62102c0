"""Modules that bring a student's features into the shape of the teacher's. They train with the student and are thrown away.

Shape legend: B = batch, C = channels, H, W = sides of a map, D = width of a pooled feature, E = width of an embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.angular.losses import unit

MapShape = tuple[int, int, int]
"""``(C, H, W)``"""


class MapNorm(nn.BatchNorm2d):
    """Batch norm of maps ``[B, C, H, W]``.

    A training batch with a single number per channel (one sample of 1x1) has no variance: it is normalised with the
    running statistics, which it leaves unchanged.
    """

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training or maps.numel() > maps.shape[1]:
            return super().forward(maps)
        return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Regressor(nn.Module):
    """One convolution, norm and activation from a student's map to the shape of the teacher's (FitNet).

    The convolution halves the side (3x3), doubles it (4x4, transposed), or cuts it by a kernel that just fits.
    """

    def __init__(self, student: MapShape, teacher: MapShape) -> None:
        super().__init__()
        self.convolution = _resizing(student, teacher)
        self.norm = MapNorm(teacher[0])

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolution(maps)))


class Projection(nn.Module):
    """1x1 convolution and norm: other channels, same sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = MapNorm(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        projected: Tensor = self.norm(self.convolution(maps))
        return projected


class Embedding(nn.Module):
    """A linear layer whose result has length 1: ``[B, D] -> [B, E]``, in float32."""

    def __init__(self, num_features: int, num_dimensions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_dimensions)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        with torch.autocast(pooled_BD.device.type, enabled=False):
            return unit(self.linear(pooled_BD.to(self.linear.weight.dtype)))


class ReviewFusion(nn.Module):
    """Joins a level of the student with what deeper levels made (ReviewKD's attention-based fusion).

    The deeper result is resized to this level, two attention maps weigh both, and the mixture is resized to the
    teacher's side and brought to its channels.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        teacher: MapShape,
        side: tuple[int, int],
        *,
        is_deepest: bool,
    ) -> None:
        """Build the fusion of a level.

        Args:
            in_channels: Of the student's map.
            mid_channels: Of everything in between.
            teacher: Shape of the teacher's map.
            side: ``(H, W)`` of the student's map.
            is_deepest: There is nothing deeper to join with.
        """
        super().__init__()
        self.side, self.teacher_side = side, teacher[1:]
        self.narrow = Projection(in_channels, mid_channels)
        self.attention = None if is_deepest else nn.Conv2d(2 * mid_channels, 2, 1)
        self.widen = nn.Sequential(
            nn.Conv2d(mid_channels, teacher[0], 3, padding=1, bias=False), MapNorm(teacher[0])
        )
        for module in (self.narrow.convolution, self.widen[0]):
            nn.init.kaiming_uniform_(module.weight, a=1)  # type: ignore[arg-type]

    def forward(self, maps: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher's map, and what the next shallower level is joined with."""
        own = self.narrow(maps)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, self.side, mode="nearest")
            weights = torch.sigmoid(self.attention(torch.cat([own, deeper], dim=1)))
            own = own * weights[:, :1] + deeper * weights[:, 1:]
        if own.shape[2:] != self.teacher_side:
            own = F.interpolate(own, self.teacher_side, mode="nearest")
        return self.widen(own), own


def _resizing(student: MapShape, teacher: MapShape) -> nn.Module:
    channels, (height, width) = (student[0], teacher[0]), student[1:]
    if (height, width) == (2 * teacher[1], 2 * teacher[2]):
        return nn.Conv2d(*channels, 3, stride=2, padding=1)
    if (2 * height, 2 * width) == teacher[1:]:
        return nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    if height >= teacher[1] and width >= teacher[2]:
        return nn.Conv2d(*channels, (1 + height - teacher[1], 1 + width - teacher[2]))
    raise ValueError(
        f"a map of {height}x{width} cannot be regressed to one of {teacher[1]}x{teacher[2]}: it must be at least as "
        "large, or half of it; choose another layer, or name other taps"
    )
