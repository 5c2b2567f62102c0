"""The tables of methods, models and data sets that an experiment may name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from methods.base import Method, ModelFactory, ModelSettings, Task
from methods.models import Activation, MapReader, build_model, stage_taps, timm_factory
from methods.models.tapped import Tapped
from methods.names import UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from methods.data.base import DataSource

__all__ = ["Catalog", "UnknownNameError"]

T = TypeVar("T")


@dataclass(frozen=True)
class Catalog:
    """Name -> method class, model factory, data source class. Extended by value, never by side effect."""

    methods: Mapping[str, type[Method]]
    models: Mapping[str, ModelFactory]
    datasets: Mapping[str, type[DataSource]]

    def extended(
        self,
        methods: Mapping[str, type[Method]] | None = None,
        models: Mapping[str, ModelFactory] | None = None,
        datasets: Mapping[str, type[DataSource]] | None = None,
    ) -> Catalog:
        """A catalog with the user's own entries added; an entry of the same name replaces ours."""
        return replace(
            self,
            methods={**self.methods, **(methods or {})},
            models={**self.models, **(models or {})},
            datasets={**self.datasets, **(datasets or {})},
        )

    def method(self, name: str) -> type[Method]:
        return _lookup(self.methods, name, "method")

    def model(self, name: str) -> ModelFactory:
        """The factory of a network; ``timm/NAME`` names any timm model."""
        if name.startswith("timm/"):
            return timm_factory(name)
        return _lookup(self.models, name, "model")

    def dataset(self, name: str) -> type[DataSource]:
        return _lookup(self.datasets, name, "data set")

    def build_model(self, settings: ModelSettings, task: Task) -> Tapped:
        """Build the network for ``task``; calling it on images gives ``(logits [B, C], pooled [B, D])``."""
        return build_model(self.model(settings.name), settings, task)

    def num_features(self, settings: ModelSettings) -> int | None:
        """Pooled width of a network, found without weights; None where it does not fit a usual task."""
        return _num_features(self.model(settings.name), settings.name)

    def map_shapes(
        self, settings: ModelSettings, *, activation: Activation = "after", taps: tuple[str, ...] = ()
    ) -> tuple[tuple[int, int, int], ...] | None:
        """``(C, H, W)`` of a network's feature maps for images of 32x32, found without weights.

        None where the network does not fit such images. Raises ValueError, with the reason, when it has no maps.
        """
        return _map_shapes(self.model(settings.name), settings.name, activation, taps)


@functools.cache
def _map_shapes(
    factory: ModelFactory, name: str, activation: Activation, taps: tuple[str, ...]
) -> tuple[tuple[int, int, int], ...] | None:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            tapped = build_model(factory, ModelSettings(name=name), Task(num_classes=10))
        except ValueError:  # another image size or number of channels: the data set will tell
            return None
        return MapReader(tapped, taps or stage_taps(tapped.network, activation)).shapes((3, 32, 32))


@functools.cache
def _num_features(factory: ModelFactory, name: str) -> int | None:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return build_model(factory, ModelSettings(name=name), Task(num_classes=10)).num_features
    except ValueError:  # another image size or number of channels: the data set will tell
        return None


def _lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    if name in table:
        return table[name]
    known = ", ".join(sorted(table))
    raise UnknownNameError(f"{name!r} is not a {kind}{did_you_mean(name, table)} (known: {known})")
