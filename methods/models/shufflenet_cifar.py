"""ShuffleNet V1 and V2 for small images: a 1x1 stem of stride 1 and no max-pool.

Zhang et al.: "ShuffleNet", arXiv 1707.01083 (V1, three groups); Ma et al.: "ShuffleNet V2", arXiv 1807.11164 (V2,
width 1). Deeper layers halve the side three times. Weights start from torch's defaults, as in the benchmarks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.models.maps import MapTaps

STEM_CHANNELS = 24
TAPS = MapTaps(
    stem="stem",
    stages=("stages.0", "stages.1", "stages.2"),
    before_activation=(
        "stages.0.3.activation:input",
        "stages.1.7.activation:input",
        "stages.2.3.activation:input",
    ),
)
"""Both versions have 4, 8 and 4 blocks; a block joins its two paths and then activates."""


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1; joined to its (averaged) input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        # A block of stride 2 puts its averaged input beside the new channels.
        new_channels = out_channels - in_channels if stride == 2 else out_channels
        middle = new_channels // 4
        # The stem's 24 channels are too few to be grouped.
        self.first_groups = 1 if in_channels == STEM_CHANNELS else groups
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=self.first_groups, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, groups=middle, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, new_channels, 1, groups=groups, bias=False)
        self.norm3 = nn.BatchNorm2d(new_channels)
        self.activation = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(maps)), inplace=True)
        hidden = shuffle_channels(hidden, self.first_groups)
        hidden = F.relu(self.norm2(self.conv2(hidden)), inplace=True)
        new = self.norm3(self.conv3(hidden))
        if self.stride == 2:
            joined = torch.cat([new, F.avg_pool2d(maps, 3, stride=2, padding=1)], dim=1)
        else:
            joined = new + maps
        result: Tensor = self.activation(joined)
        return result


class ShuffleV2Block(nn.Module):
    """Half of the channels pass, the others go through 1x1, depthwise 3x3, 1x1; both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)
        self.activation = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        kept, changed = maps.chunk(2, dim=1)
        # The kept half is activated already, which once more does not change it.
        joined = torch.cat([kept, self.branch(changed)], dim=1)
        return shuffle_channels(self.activation(joined), 2)


class ShuffleV2Down(nn.Module):
    """Two paths of stride 2, side by side: ``[B, in, H, W] -> [B, out, H / 2, W / 2]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels // 2, 1, bias=False),
            nn.BatchNorm2d(out_channels // 2),
        )
        self.branch = _branch(in_channels, out_channels // 2, stride=2)
        self.activation = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        joined = torch.cat([self.shortcut(maps), self.branch(maps)], dim=1)
        return shuffle_channels(self.activation(joined), 2)


class ShuffleNet(nn.Module):
    """Stem, three stages, an optional 1x1 head, global average pool: ``[B, in_channels, H, W] -> [B, C]``."""

    classifier_path = "classifier"
    map_taps = TAPS

    def __init__(
        self, stages: list[nn.Sequential], head: nn.Module, width: int, *, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, STEM_CHANNELS, 1, bias=False), nn.BatchNorm2d(STEM_CHANNELS), nn.ReLU()
        )
        self.stages = nn.Sequential(*stages)
        self.head = head
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.head(self.stages(self.stem(images)))
        logits: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return logits


def shuffle_channels(maps: Tensor, num_groups: int) -> Tensor:
    """Mix groups: channel ``g * n + i`` of group g goes to ``i * num_groups + g``."""
    if num_groups == 1:
        return maps
    batch, _, height, width = maps.shape
    return maps.view(batch, num_groups, -1, height, width).transpose(1, 2).flatten(1, 2)


def shuffle_v1(*, num_classes: int, in_channels: int) -> ShuffleNet:
    """ShuffleNet V1 with three groups and 240, 480, 960 channels."""
    stages, before = [], STEM_CHANNELS
    for width, num_blocks in ((240, 4), (480, 8), (960, 4)):
        blocks = [ShuffleV1Block(before, width, 2, groups=3)]
        blocks += [ShuffleV1Block(width, width, 1, groups=3) for _ in range(num_blocks - 1)]
        stages.append(nn.Sequential(*blocks))
        before = width
    return ShuffleNet(stages, nn.Identity(), before, num_classes=num_classes, in_channels=in_channels)


def shuffle_v2(*, num_classes: int, in_channels: int) -> ShuffleNet:
    """ShuffleNet V2 of width 1 with 116, 232, 464 channels and a head of 1024."""
    stages, before, width = [], STEM_CHANNELS, 1024
    for channels, num_blocks in ((116, 4), (232, 8), (464, 4)):
        blocks: list[nn.Module] = [ShuffleV2Down(before, channels)]
        blocks += [ShuffleV2Block(channels) for _ in range(num_blocks - 1)]
        stages.append(nn.Sequential(*blocks))
        before = channels
    head = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return ShuffleNet(stages, head, width, num_classes=num_classes, in_channels=in_channels)


def _branch(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    """1x1, depthwise 3x3, 1x1; its activation is the block's."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, stride=stride, padding=1, groups=out_channels, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )
