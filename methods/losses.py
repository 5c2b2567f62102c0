"""Losses that methods share: cross-entropy, and divergence from a softened target.

Shape legend: B = batch, C = classes. Every loss is a pure function from tensors to one scalar. It is computed in
float32 even under autocast; float64 inputs stay float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

SMALLEST_PROBABILITY = 1e-12
"""Probabilities are raised to this before a logarithm; it is a normal number in float32."""


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` outside autocast, its half-precision tensor arguments raised to float32."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.autocast(device_type, enabled=False):
            raised: Any = {name: _raised(value) for name, value in kwargs.items()}
            return function(*map(_raised, args), **raised)

    return wrapped


@in_full_precision
def cross_entropy(logits_BC: Tensor, labels_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy with hard labels, of which ``label_smoothing`` is spread over all classes."""
    return F.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)


@in_full_precision
def soften(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature: softmax of ``logits / temperature`` on the last axis."""
    return (logits / temperature).softmax(dim=-1)


@in_full_precision
def softened_kl(student_logits_BC: Tensor, target_probs_BC: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened student from a softened target: ``T^2 KL(target || p_T(student))``.

    Summed over classes, averaged over the batch (Hinton et al., arXiv 1503.02531). The factor ``T^2`` keeps the
    size of the gradient when the temperature changes. A class of probability 0 adds 0. A target whose rows sum to
    ``c`` multiplies the student's gradient by ``c``. The target is not detached here.

    Args:
        student_logits_BC: Logits at temperature 1.
        target_probs_BC: Probabilities that are *already* softened with ``temperature``.
        temperature: ``T``, above 0.

    Returns:
        Scalar tensor.
    """
    log_student_BC = F.log_softmax(student_logits_BC / temperature, dim=-1)
    log_target_BC = target_probs_BC.clamp_min(SMALLEST_PROBABILITY).log()
    divergence_B = (target_probs_BC * (log_target_BC - log_student_BC)).sum(dim=-1)
    return temperature**2 * divergence_B.mean()


def _raised(value: Any) -> Any:
    """A half-precision tensor as float32, anything else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value
