"""Sums over a batch from which accuracy and loss are computed, whatever the batch size or number of workers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.losses import in_full_precision


@in_full_precision
def classification_sums(logits_BC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Summed ``top1`` and ``top5`` (100 per hit, so that means are percents), ``loss``, and the ``count`` B.

    With fewer than five classes ``top5`` looks at all of them. Log-probabilities may stand for logits.
    """
    num_guesses = min(5, logits_BC.shape[-1])
    hits_BG = logits_BC.topk(num_guesses, dim=-1).indices == labels_B[:, None]
    return {
        "count": torch.full((), len(labels_B), dtype=logits_BC.dtype, device=logits_BC.device),
        "top1": 100 * hits_BG[:, 0].sum(dtype=logits_BC.dtype),
        "top5": 100 * hits_BG.sum(dtype=logits_BC.dtype),
        "loss": F.cross_entropy(logits_BC, labels_B, reduction="sum"),
    }
