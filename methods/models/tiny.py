"""Networks of a few thousand weights for 8x8 digits, so that a whole sweep fits into minutes on one core.

Measured on ``digits`` (SGD .05 with momentum .9, cosine to 0, batch 64, pad 1, three seeds, test set):

=========  ==========  =============  =============  ============================
name       parameters  top1, 20 ep.   top1, 40 ep.   role
=========  ==========  =============  =============  ============================
tiny_cnn       56 554  98.2 to 98.7   98.2 to 99.1   the teacher
mini_cnn        1 698  89.8 to 91.8   94.9 to 95.8   a student
tiny_mlp        1 810  90.4 to 92.2   92.2 to 93.3   a student without convolutions
=========  ==========  =============  =============  ============================
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from methods.models.initialise import initialise
from methods.models.maps import MapTaps


class TinyConvNet(nn.Module):
    """3x3 convolutions with batch norm, then a global average pool and a linear classifier."""

    classifier_path = "classifier"

    def __init__(
        self, widths: tuple[int, ...], strides: tuple[int, ...], *, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for after, stride in zip(widths, strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes)
        # Every layer is a convolution, a norm and an activation; the first is the stem.
        later = range(1, len(widths))
        self.map_taps = MapTaps(
            stem="layers.2",
            stages=tuple(f"layers.{3 * layer + 2}" for layer in later),
            before_activation=tuple(f"layers.{3 * layer + 1}" for layer in later),
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.layers(images).mean(dim=(2, 3))
        logits: Tensor = self.classifier(pooled)
        return logits


class TinyMLP(nn.Module):
    """One hidden layer on the image averaged down to 8x8, whatever its size."""

    classifier_path = "classifier"

    def __init__(self, num_hidden: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_channels * 8 * 8, num_hidden)
        self.classifier = nn.Linear(num_hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pixels = F.adaptive_avg_pool2d(images, 8).flatten(1)
        logits: Tensor = self.classifier(F.relu(self.hidden(pixels)))
        return logits


tiny_cnn = partial(TinyConvNet, (32, 64, 64), (1, 2, 2))
mini_cnn = partial(TinyConvNet, (8, 8, 12), (1, 2, 1))
tiny_mlp = partial(TinyMLP, 24)
