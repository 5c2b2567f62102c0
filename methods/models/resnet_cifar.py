"""ResNets for small images, as the distillation literature uses them on CIFAR.

They differ from the ImageNet family of torchvision and timm: a 3x3 stem of stride 1, no max-pool, three stages of
``(depth - 2) / 6`` basic blocks, a global average pool. Deeper layers halve the side twice, so any image of 8x8
or more fits. A shortcut is the identity, or a 1x1 convolution with batch norm wherever the shape changes.

A stage's map is read behind its last activation, or as the *input* of that activation.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from methods.models.initialise import initialise
from methods.models.maps import MapTaps


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[B, in, H, W] -> [B, out, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        # A module, and not in place, so that the map before the activation can be tapped as its input.
        self.activation = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(maps)), inplace=True)
        result: Tensor = self.activation(self.norm2(self.conv2(hidden)) + self.shortcut(maps))
        return result


class ResNetCifar(nn.Module):
    """Stem, three stages, global average pool, linear classifier: ``[B, in_channels, H, W] -> [B, C]``."""

    classifier_path = "classifier"

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], *, num_classes: int, in_channels: int
    ) -> None:
        """Build the network.

        Args:
            depth: ``6 n + 2`` for n blocks per stage.
            widths: Channels of the stem and of the three stages.
            num_classes: Width of the logits.
            in_channels: Channels of the images.
        """
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 8, 14, 20, ... (6 n + 2), got {depth}")
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.stages = nn.Sequential(
            _stage(widths[0], widths[1], num_blocks, stride=1),
            _stage(widths[1], widths[2], num_blocks, stride=2),
            _stage(widths[2], widths[3], num_blocks, stride=2),
        )
        self.classifier = nn.Linear(widths[3], num_classes)
        self.map_taps = MapTaps(
            stem="stem",
            stages=tuple(f"stages.{stage}" for stage in range(3)),
            before_activation=tuple(
                f"stages.{stage}.{num_blocks - 1}.activation:input" for stage in range(3)
            ),
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stages(self.stem(images))
        logits: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))


PLAIN_WIDTHS = (16, 16, 32, 64)
WIDE_WIDTHS = (32, 64, 128, 256)
"""The ``x4`` networks: the stem is narrower than the first stage, which therefore starts with a projection."""

resnet8 = partial(ResNetCifar, 8, PLAIN_WIDTHS)
resnet20 = partial(ResNetCifar, 20, PLAIN_WIDTHS)
resnet32 = partial(ResNetCifar, 32, PLAIN_WIDTHS)
resnet56 = partial(ResNetCifar, 56, PLAIN_WIDTHS)
resnet110 = partial(ResNetCifar, 110, PLAIN_WIDTHS)
resnet8x4 = partial(ResNetCifar, 8, WIDE_WIDTHS)
resnet32x4 = partial(ResNetCifar, 32, WIDE_WIDTHS)
