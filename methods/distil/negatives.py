"""Which other samples a sample is contrasted with: drawn uniformly from all classes but its own.

The draw is a function of (seed, epoch, sample), so that it is the same for any number of workers and after an interruption.

Shape legend: n = samples of the training split, B = batch, K = negatives of a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MASK = 0xFFFFFFFF
"""Hashes have 32 bits, kept in int64 so that products do not lose the bits that count."""


class Negatives(nn.Module):
    """Draws negatives for the samples of a training split. Neither trained nor saved: it follows from the labels."""

    def __init__(self, labels_n: Tensor) -> None:
        """Prepare the draw.

        Args:
            labels_n: Label of each sample, ``[n]``; -1 for those that must not be drawn.

        Raises:
            ValueError: All samples are of one class.
        """
        super().__init__()
        order = torch.argsort(labels_n, stable=True)
        self.labels = labels_n.clone()
        self.samples = order[int((labels_n < 0).sum()) :]
        """Samples that can be drawn, class after class."""
        counts = torch.bincount(labels_n[labels_n >= 0])
        if int((counts > 0).sum()) < 2:
            raise ValueError("negatives come from other classes, but all training samples are of one class")
        self.class_counts = counts
        self.class_starts = counts.cumsum(0) - counts

    def forward(self, indices_B: Tensor, *, seed: Tensor, epoch: int, num_negatives: int) -> Tensor:
        """Samples of other classes than each of ``indices_B``, ``[B, K]``, with repetition. ``seed`` is a whole number."""
        labels_B = self.labels[indices_B]
        counts_B1 = self.class_counts[labels_B][:, None]
        starts_B1 = self.class_starts[labels_B][:, None]
        keys_B1 = mixed(indices_B + mixed(epoch + mixed(seed)))[:, None]
        numbers_K = torch.arange(1, num_negatives + 1, device=indices_B.device)
        hashes_BK = mixed(keys_B1 ^ mixed(numbers_K))
        # A place among all samples but those of the own class, which form one block in ``samples``.
        places_BK = (hashes_BK * (len(self.samples) - counts_B1)) >> 32
        places_BK = places_BK + counts_B1 * (places_BK >= starts_B1)
        return self.samples[places_BK]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Negatives:
        """Follow ``.to(device)``, as buffers would."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("labels", "samples", "class_counts", "class_starts"):
            setattr(self, name, fn(getattr(self, name)))
        return self


def mixed(values: Tensor) -> Tensor:
    """Bits of whole numbers, well mixed: 32 bits in int64 (two rounds of multiply and xor-shift)."""
    values = values & MASK
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & MASK
    values = ((values ^ (values >> 15)) * 0x846CA68B) & MASK
    return values ^ (values >> 16)
