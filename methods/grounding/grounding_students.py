"""The grounding methods as students: each with its own settings and losses, and those of distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from methods.grounding.cm_masksd import CmMaskSD
from methods.grounding.cm_masksd_settings import CmMaskSDSettings
from methods.grounding.grounding_kd import KD_RANGES, GroundingKdSettings, GroundingStudent
from methods.grounding.latent_settings import LatentVGSettings
from methods.grounding.latent_vg import LatentVG
from methods.grounding.magnet import MagNet
from methods.grounding.magnet_settings import MagNetSettings
from methods.grounding.shared_ris import SharedRIS, SharedRISSettings


@dataclass(frozen=True, kw_only=True)
class SharedRISKdSettings(SharedRISSettings, GroundingKdSettings):
    """Settings of ``shared_ris_kd``."""

    def __post_init__(self) -> None:
        SharedRISSettings.__post_init__(self)
        self.check_kd()


class SharedRISStudent(GroundingStudent, SharedRIS):
    """Shared-RIS that also learns from a grounder. Losses those of ``shared_ris``, and ``kd``, ``pixels``, ``sentence``."""

    Settings = SharedRISKdSettings
    settings: SharedRISKdSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {**SharedRIS.ranges, **KD_RANGES}


@dataclass(frozen=True, kw_only=True)
class LatentVGKdSettings(LatentVGSettings, GroundingKdSettings):
    """Settings of ``latent_vg_kd``."""

    def __post_init__(self) -> None:
        LatentVGSettings.__post_init__(self)
        self.check_kd()


class LatentVGStudent(GroundingStudent, LatentVG):
    """Latent-VG that also learns from a grounder. Losses those of ``latent_vg``, and ``kd``, ``pixels``, ``sentence``."""

    Settings = LatentVGKdSettings
    settings: LatentVGKdSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {**LatentVG.ranges, **KD_RANGES}


@dataclass(frozen=True, kw_only=True)
class CmMaskSDKdSettings(CmMaskSDSettings, GroundingKdSettings):
    """Settings of ``cm_masksd_kd``."""

    def __post_init__(self) -> None:
        CmMaskSDSettings.__post_init__(self)
        self.check_kd()


class CmMaskSDStudent(GroundingStudent, CmMaskSD):
    """CM-MaskSD that also learns from a grounder. Losses those of ``cm_masksd``, and ``kd``, ``pixels``, ``sentence``."""

    Settings = CmMaskSDKdSettings
    settings: CmMaskSDKdSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {**CmMaskSD.ranges, **KD_RANGES}


@dataclass(frozen=True, kw_only=True)
class MagNetKdSettings(MagNetSettings, GroundingKdSettings):
    """Settings of ``magnet_kd``."""

    def __post_init__(self) -> None:
        MagNetSettings.__post_init__(self)
        self.check_kd()


class MagNetStudent(GroundingStudent, MagNet):
    """MagNet that also learns from a grounder. Losses those of ``magnet``, and ``kd``, ``pixels``, ``sentence``."""

    Settings = MagNetKdSettings
    settings: MagNetKdSettings
    ranges: ClassVar[Mapping[str, Mapping[str, Any]]] = {**MagNet.ranges, **KD_RANGES}
