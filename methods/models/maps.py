"""Which feature maps a network offers, and how they are read.

Shape legend: B = batch, C = channels, H, W = sides of a map, L = tokens.

A *tap* is text: a module path means what the module gives, ``PATH:input`` what it is given, and ``PATH:tokens`` what a
transformer's module gives, its tokens laid out as a square map. Our own networks declare their taps; those of timm
follow from timm's ``feature_info``; any other network may carry an attribute ``map_taps`` or have its taps named in the
settings of a criterion. A transformer has no maps unless somebody asks for its tokens as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.models.tapped import Features, Tapped, Taps, evaluating

Activation = Literal["after", "before"]
"""Whether a map is read behind or in front of the activation that ends its stage."""
STEM_REDUCTION = 2
"""timm's levels of this reduction, ahead of the deeper ones, are stems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapTaps:
    """Where the maps of a network are read: one tap for each stage, shallow to deep."""

    stages: tuple[str, ...]
    """Maps after activation."""
    before_activation: tuple[str, ...] = ()
    """The same maps before it; empty where the network has no activation there."""
    stem: str | None = None
    """The map in front of the first stage."""


class MapReader:
    """Runs a network and gives logits, pooled feature and the maps at ``taps``."""

    def __init__(self, tapped: Tapped, taps: tuple[str, ...]) -> None:
        """Check that every tap exists. Raises ValueError with near names, or for an unknown ending."""
        self.tapped, self.taps = tapped, taps
        split = [_split(tap) for tap in taps]
        self._taps = Taps(
            inputs=tuple(path for path, side in split if side == "input"),
            outputs=tuple(path for path, side in split if side != "input"),
        )
        self._taps.check(tapped.network)

    def __call__(self, images: Tensor) -> Features:
        """Features of images ``[B, 3, H, W]``, with one map ``[B, C_k, H_k, W_k]`` for each tap."""
        features = self.tapped.features(images, self._taps)
        read = dict(zip(self._taps.names, features.maps, strict=True))
        maps = tuple(self._as_map(tap, read[tap.removesuffix(":tokens")]) for tap in self.taps)
        return features._replace(maps=maps)

    @torch.no_grad()
    def shapes(self, image_shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
        """``(C, H, W)`` of each map for images ``[C, H, W]``, found with one blank image."""
        parameter = next(self.tapped.parameters())
        with evaluating(self.tapped):
            features = self(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
        return tuple((fm.shape[1], fm.shape[2], fm.shape[3]) for fm in features.maps)

    def _as_map(self, tap: str, value: Tensor) -> Tensor:
        network = self.tapped.network
        if tap.endswith(":tokens"):
            return _tokens_as_map(value, int(getattr(network, "num_prefix_tokens", 0)), tap)
        if value.dim() == 3:
            raise ValueError(
                f"{type(network).__name__} has no feature map at {tap!r}: it passes tokens {list(value.shape)}. "
                f"Name '{tap}:tokens' to lay them out as a square, or use a criterion on logits or pooled features"
            )
        if value.dim() != 4:
            raise ValueError(
                f"{tap!r} of {type(network).__name__} gives {list(value.shape)}, not a feature map [B, C, H, W]"
            )
        # Some transformers of timm keep their channels last in the shape itself.
        is_last = getattr(network, "output_fmt", None) == "NHWC"
        return value.permute(0, 3, 1, 2) if is_last else value


def map_taps(network: nn.Module) -> MapTaps:
    """Where the maps of ``network`` are: its own ``map_taps``, else the levels that timm tells of.

    Raises ValueError when nobody says.
    """
    own = getattr(network, "map_taps", None)
    if isinstance(own, MapTaps):
        return own
    levels = _timm_levels(network)
    if not levels:
        raise ValueError(
            f"{type(network).__name__} declares no feature maps: use a criterion on logits or pooled features, name "
            "taps in the settings (module paths), or set map_taps on the network"
        )
    stages = tuple(module for module, reduction in levels if reduction > STEM_REDUCTION)
    shallow = [module for module, reduction in levels if reduction <= STEM_REDUCTION]
    return MapTaps(stages=stages, stem=shallow[-1] if shallow else None)


def stage_taps(network: nn.Module, activation: Activation = "after") -> tuple[str, ...]:
    """The taps of all stages. Raises ValueError for a network without maps, or without any before activation."""
    taps = map_taps(network)
    if activation == "after":
        return taps.stages
    if not taps.before_activation:
        raise ValueError(
            f"{type(network).__name__} offers no feature maps from before an activation, which this criterion compares "
            "with: choose another teacher, name taps in the settings, or use another criterion"
        )
    return taps.before_activation


def _timm_levels(network: nn.Module) -> list[tuple[str, int]]:
    """Module path and reduction of timm's feature levels, shallow to deep; empty for networks that are not timm's."""
    info = getattr(network, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return []
    levels = [(str(entry.get("module", "")), int(entry.get("reduction", 0))) for entry in entries]
    return levels if all(module for module, _ in levels) else []


def _split(tap: str) -> tuple[str, str]:
    """Module path and which side of it: ``output``, ``input`` or ``tokens``."""
    path, colon, side = tap.partition(":")
    if colon and side not in ("input", "tokens"):
        raise ValueError(f"tap {tap!r} ends in {side!r}: expected PATH, PATH:input or PATH:tokens")
    return path, side or "output"


def _tokens_as_map(tokens: Tensor, num_prefix: int, tap: str) -> Tensor:
    """Tokens ``[B, num_prefix + L, C]`` without the prefix (class tokens), as ``[B, C, sqrt L, sqrt L]``."""
    if tokens.dim() != 3:
        raise ValueError(f"tap {tap!r} reads {list(tokens.shape)}, not tokens [B, L, C]: leave out ':tokens'")
    patches = tokens[:, num_prefix:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"tap {tap!r} reads {patches.shape[1]} tokens, which do not fill a square map")
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)
