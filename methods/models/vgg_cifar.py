"""VGG for small images: five blocks of 3x3 convolutions with batch norm, and one linear layer.

Simonyan, Zisserman: "Very Deep Convolutional Networks", arXiv 1409.1556, as the distillation benchmarks use it on
CIFAR: a 2x2 max-pool after the first three blocks only (32x32 images keep maps of 4x4), a global average pool, none
of the 4096-unit layers and no dropout. Convolutions have a bias.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from methods.models.initialise import initialise
from methods.models.maps import MapTaps

WIDTHS = (64, 128, 256, 512, 512)
NUM_POOLED = 3
"""How many of the first blocks are followed by a max-pool."""


class VGGCifar(nn.Module):
    """Five blocks, global average pool, classifier: ``[B, in_channels, H, W] -> [B, C]``, sides of 8 or more."""

    classifier_path = "classifier"

    def __init__(self, convolutions_per_block: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        ins = (in_channels, *WIDTHS[:-1])
        self.blocks = nn.ModuleList(
            _block(before, after, convolutions_per_block) for before, after in zip(ins, WIDTHS, strict=True)
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        self.map_taps = MapTaps(
            stem="blocks.0",
            stages=tuple(f"blocks.{number}" for number in range(1, len(WIDTHS))),
            before_activation=tuple(
                f"blocks.{number}.{3 * convolutions_per_block - 2}" for number in range(1, len(WIDTHS))
            ),
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for number, block in enumerate(self.blocks):
            maps = block(maps)
            if number < NUM_POOLED:
                maps = F.max_pool2d(maps, 2)
        logits: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return logits


def _block(in_channels: int, out_channels: int, num_convolutions: int) -> nn.Sequential:
    """Convolution, norm, activation, repeated. Not in place: the output of the last norm is tapped."""
    layers: list[nn.Module] = []
    for number in range(num_convolutions):
        before = in_channels if number == 0 else out_channels
        layers += [nn.Conv2d(before, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


vgg8 = partial(VGGCifar, 1)
vgg13 = partial(VGGCifar, 2)
