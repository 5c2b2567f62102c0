"""What grounders on a Multiway encoder have in common: first weights from a BEiT-3 checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from methods.base import WeightSource
from methods.grounding.contracts import GroundingTask
from methods.grounding.method import GroundingMethod, GroundingNetwork
from methods.grounding.multiway_weights import load_multiway


class MultiwayMethod(GroundingMethod):
    """Base of methods whose network has a ``MultiwayEncoder`` as ``encoder``, and whose settings a ``checkpoint``."""

    network_type: ClassVar[type[GroundingNetwork]]
    """Built from ``(settings, task)``."""

    weight_sources: ClassVar[Mapping[str, WeightSource]] = {"checkpoint": "timm"}

    @classmethod
    def build_network(cls, settings: Any, task: GroundingTask) -> GroundingNetwork:
        network: Any = cls.network_type(settings, task)
        if settings.checkpoint:
            load_multiway(network.encoder, settings.checkpoint)
        built: GroundingNetwork = network
        return built

    @classmethod
    def without_sources(cls, settings: Any) -> Any:
        return replace(settings, checkpoint="")
