"""Noisy copies of what a teacher says.

Shape legend: B = batch, K = copies, C = classes, D = pooled feature width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from methods.base import Signals


class NoiseSettings(Protocol):
    """What is needed of the settings of ``tekap``."""

    @property
    def num_copies(self) -> int: ...
    @property
    def noise_share(self) -> float: ...
    @property
    def logit_noise(self) -> float: ...
    @property
    def feature_noise(self) -> float: ...


def noisy_copies(signals: Signals, settings: NoiseSettings) -> Signals:
    """``num_copies`` of logits and features, each mixed with its own Gaussian noise, as views of the signals.

    Drawn anew at every call from torch's generator of the device, which is part of every checkpoint.
    """
    share = settings.noise_share
    return signals._replace(
        view_logits=blurred(signals.logits, settings.num_copies, share, settings.logit_noise),
        view_pooled=blurred(signals.pooled, settings.num_copies, share, settings.feature_noise),
    )


def blurred(values_BX: Tensor, num_copies: int, share: float, scale: float) -> Tensor:
    """``(1 - share) x + share * scale * noise`` for each copy, ``[B, K, X]``, float32."""
    copies_BKX = values_BX.float()[:, None].expand(-1, num_copies, -1)
    noise_BKX = torch.randn_like(copies_BKX, memory_format=torch.contiguous_format)
    return (1 - share) * copies_BKX + share * scale * noise_BKX
