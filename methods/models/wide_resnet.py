"""Wide ResNets for small images: pre-activation blocks, widths multiplied by a factor.

Zagoruyko, Komodakis: "Wide Residual Networks", arXiv 1605.07146. ``wrn_D_K`` has depth D = 6 n + 4 and width factor
K: a bare 3x3 stem, three stages of n blocks, a last norm and activation, global average pool. A shortcut that
changes the shape is a bare 1x1 convolution of the *activated* input.

Feature maps follow the distillation benchmarks: a stage's map is its output, which the next stage's first norm has
yet to see; the map before activation is what that norm makes of it.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from methods.models.initialise import initialise
from methods.models.maps import MapTaps


class PreActivationBlock(nn.Module):
    """Norm, activation, 3x3 convolution, twice: ``[B, in, H, W] -> [B, out, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        activated = F.relu(self.norm1(maps))  # not in place: the norm's output is tapped
        hidden = F.relu(self.norm2(self.conv1(activated)), inplace=True)
        kept: Tensor = maps if self.shortcut is None else self.shortcut(activated)
        result: Tensor = kept + self.conv2(hidden)
        return result


class WideResNet(nn.Module):
    """Stem, three stages, norm, global average pool, classifier: ``[B, in_channels, H, W] -> [B, C]``."""

    classifier_path = "classifier"
    map_taps = MapTaps(
        stem="stem",
        stages=("stages.0", "stages.1", "stages.2"),
        before_activation=("stages.1.0.norm1", "stages.2.0.norm1", "norm"),
    )

    def __init__(self, depth: int, width_factor: int, *, num_classes: int, in_channels: int) -> None:
        """Build the network.

        Args:
            depth: ``6 n + 4`` for n blocks per stage.
            width_factor: Multiplies the 16, 32 and 64 channels of the stages; the stem keeps 16.
            num_classes: Width of the logits.
            in_channels: Channels of the images.
        """
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 10, 16, 22, ... (6 n + 4), got {depth}")
        super().__init__()
        num_blocks = (depth - 4) // 6
        widths = (16, 16 * width_factor, 32 * width_factor, 64 * width_factor)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.stages = nn.Sequential(
            _stage(widths[0], widths[1], num_blocks, stride=1),
            _stage(widths[1], widths[2], num_blocks, stride=2),
            _stage(widths[2], widths[3], num_blocks, stride=2),
        )
        self.norm = nn.BatchNorm2d(widths[3])
        self.classifier = nn.Linear(widths[3], num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.stages(self.stem(images))))
        logits: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    rest = (PreActivationBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)


wrn_16_2 = partial(WideResNet, 16, 2)
wrn_40_1 = partial(WideResNet, 40, 1)
wrn_40_2 = partial(WideResNet, 40, 2)
