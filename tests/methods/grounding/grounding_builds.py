"""Small methods of two towers for the tests: a CLIP pair, and Swin with BERT."""

from __future__ import annotations

from typing import Any

import torch
from grounding_samples import TASK
from torch import Tensor

from methods.grounding.cm_masksd import CmMaskSD
from methods.grounding.contracts import GroundingBatch, GroundingTask
from methods.grounding.magnet import MagNet
from methods.grounding.method import GroundingMethod

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


def rows(batch: GroundingBatch, part: slice) -> GroundingBatch:
    """Some rows of a batch, as another worker would see them."""
    return GroundingBatch(*(value[part] if isinstance(value, Tensor) else value for value in batch))


def values(method: GroundingMethod, batch: GroundingBatch) -> dict[str, float]:
    """Each loss of a step."""
    with torch.no_grad():
        return {name: float(loss.value) for name, loss in method(batch).losses.items()}


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
