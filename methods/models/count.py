"""How large a network is, and what one image costs it: parameters and multiply-adds.

Counted are convolutions, products of matrices and attention, as everywhere in the literature; norms, activations,
pooling and element-wise products are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from methods.models.tapped import evaluating


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """The size of a network."""

    parameters: int
    """Numbers that can be trained, shared ones once."""
    macs: int
    """Multiply-adds of one image."""


@torch.no_grad()
def count(network: nn.Module, task: Any) -> Count:
    """Count ``network`` for the example of ``task``; works on the ``meta`` device too, without weights.

    Mode, weights and statistics of the network stay as they are. A product inside a kernel of its own is not seen.
    """
    parameter = next(network.parameters())
    example = task.example(parameter.device, parameter.dtype)
    with evaluating(network), FlopCounterMode(display=False) as counter:
        network(*example)
    return Count(
        parameters=sum(each.numel() for each in network.parameters()), macs=counter.get_total_flops() // 2
    )
