"""MobileNetV2 of half width for small images.

Sandler et al.: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381, as the distillation
benchmarks use it on CIFAR. It differs from the ImageNet network of torchvision and timm: plain ReLU, stride 1 in the
first 24-channel group, channels halved without rounding to multiples of eight, a head of 1280 channels at any width,
no dropout; and the first block, whose expansion is 1, keeps its 1x1 convolution.

Blocks end linearly, without an activation, so there are no maps from before one.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from methods.models.initialise import initialise
from methods.models.maps import MapTaps

GROUPS = (
    # expansion, channels at full width, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """Expand by 1x1, convolve each channel by 3x3, project by 1x1; added to its input where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.is_residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            *_convolution(in_channels, hidden, 1),
            *_convolution(hidden, hidden, 3, stride=stride, groups=hidden),
            *_convolution(hidden, out_channels, 1)[:-1],
        )

    def forward(self, maps: Tensor) -> Tensor:
        projected: Tensor = self.layers(maps)
        return maps + projected if self.is_residual else projected


class MobileNetV2Cifar(nn.Module):
    """Stem of stride 2, seven groups, 1x1 head, global average pool: ``[B, in_channels, H, W] -> [B, C]``."""

    classifier_path = "classifier"
    map_taps = MapTaps(stem="stem", stages=("groups.1", "groups.2", "groups.4", "groups.6"))

    def __init__(self, width_factor: float, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        before = int(STEM_CHANNELS * width_factor)
        self.stem = nn.Sequential(*_convolution(in_channels, before, 3, stride=2))
        groups = []
        for expansion, full_width, num_blocks, stride in GROUPS:
            after = int(full_width * width_factor)
            blocks = [InvertedResidual(before, after, stride, expansion)]
            blocks += [InvertedResidual(after, after, 1, expansion) for _ in range(num_blocks - 1)]
            groups.append(nn.Sequential(*blocks))
            before = after
        self.groups = nn.Sequential(*groups)
        self.head = nn.Sequential(*_convolution(before, HEAD_CHANNELS, 1))
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.head(self.groups(self.stem(images)))
        logits: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return logits


def _convolution(
    in_channels: int, out_channels: int, side: int, *, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module, nn.Module]:
    convolution = nn.Conv2d(
        in_channels, out_channels, side, stride=stride, padding=side // 2, groups=groups, bias=False
    )
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


mobilenet_v2_half = partial(MobileNetV2Cifar, 0.5)
