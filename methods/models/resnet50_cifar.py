"""ResNet-50 for small images: bottleneck blocks behind a 3x3 stem of stride 1, without max-pool.

He et al.: "Deep Residual Learning", arXiv 1512.03385. Four stages of 3, 4, 6 and 3 blocks; the sides of 32x32 images
go 32, 32, 16, 8, 4.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from methods.models.initialise import initialise
from methods.models.maps import MapTaps

EXPANSION = 4
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Inner width, number of blocks, stride of each stage."""


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; gives ``EXPANSION * width`` channels."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.activation = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(maps)), inplace=True)
        hidden = F.relu(self.norm2(self.conv2(hidden)), inplace=True)
        result: Tensor = self.activation(self.norm3(self.conv3(hidden)) + self.shortcut(maps))
        return result


class ResNet50Cifar(nn.Module):
    """Stem, four stages, global average pool, classifier: ``[B, in_channels, H, W] -> [B, C]``."""

    classifier_path = "classifier"
    map_taps = MapTaps(
        stem="stem",
        stages=("stages.0", "stages.1", "stages.2", "stages.3"),
        before_activation=(
            "stages.0.2.activation:input",
            "stages.1.3.activation:input",
            "stages.2.5.activation:input",
            "stages.3.2.activation:input",
        ),
    )

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        before = STAGES[0][0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU()
        )
        stages = []
        for width, num_blocks, stride in STAGES:
            blocks = [BottleneckBlock(before, width, stride)]
            before = EXPANSION * width
            blocks += [BottleneckBlock(before, width, 1) for _ in range(num_blocks - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(before, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stages(self.stem(images))
        logits: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return logits


resnet50 = ResNet50Cifar
