"""How a masked pass is asked to agree with the unmasked one (CM-MaskSD). The forms are reconstructions.

Shape legend: B = batch, H, W = image sides, P = patches, E = shared width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from methods.losses import in_full_precision


@in_full_precision
def mask_divergence(
    student_logits_B1HW: Tensor, teacher_logits_B1HW: Tensor, *, temperature: float
) -> Tensor:
    """``T^2 KL(Bernoulli(teacher) || Bernoulli(student))``, mean over pixels, scalar; 0 where they agree.

    Written as cross-entropy minus the entropy of the target. The factor ``T^2`` keeps the size of the gradient: near
    zero logits the loss is an eighth of the squared difference, whatever ``T``. The teacher gets no gradient.
    """
    target_B1HW = (teacher_logits_B1HW.detach() / temperature).sigmoid()
    scaled_B1HW = teacher_logits_B1HW.detach() / temperature
    entropy = F.binary_cross_entropy_with_logits(scaled_B1HW, target_B1HW, reduction="none")
    crossed = F.binary_cross_entropy_with_logits(
        student_logits_B1HW / temperature, target_B1HW, reduction="none"
    )
    return temperature**2 * (crossed - entropy).mean()


@in_full_precision
def feature_distance(student_BPE: Tensor, teacher_BPE: Tensor) -> Tensor:
    """One minus the cosine of each patch with its unmasked self, mean over patches, scalar. The teacher is detached."""
    return (1 - F.cosine_similarity(student_BPE, teacher_BPE.detach(), dim=-1)).mean()


def ramp_factor(progress: float, ramp_fraction: float) -> float:
    """Factor from 0 to 1 on the weight of self-distillation: an untrained teacher teaches nothing.

    Args:
        progress: Share of the run that lies behind, from 0 to 1.
        ramp_fraction: Share of the run over which the factor grows; 0 gives 1 at once.
    """
    return 1.0 if ramp_fraction == 0 else min(1.0, progress / ramp_fraction)
