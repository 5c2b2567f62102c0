"""Small methods of two towers for the tests: a CLIP pair, and Swin with BERT."""

from __future__ import annotations

from typing import Any

import torch
from grounding_samples import TASK

from methods.grounding.cm_masksd import CmMaskSD
from methods.grounding.contracts import GroundingTask
from methods.grounding.magnet import MagNet

DEFORMABLE = {
    "decoder": "deformable",
    "channels": 32,
    "decoder_heads": 4,
    "decoder_layers": 1,
    "query_layers": 3,
}


def cm_masksd(*, seed: int = 0, task: GroundingTask = TASK, **changes: Any) -> CmMaskSD:
    """The small preset, with ``changes``."""
    torch.manual_seed(seed)
    settings = CmMaskSD.Settings(**{**CmMaskSD.presets["cm_masksd_small"], **changes})
    return CmMaskSD(settings, task=task, model=None, inputs={})


def magnet(*, seed: int = 0, task: GroundingTask = TASK, **changes: Any) -> MagNet:
    """The small preset, with ``changes``."""
    torch.manual_seed(seed)
    settings = MagNet.Settings(**{**MagNet.presets["magnet_small"], **changes})
    return MagNet(settings, task=task, model=None, inputs={})


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
