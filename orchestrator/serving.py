"""Rebuilds the network of a model bundle and makes predictions with it.

``mlflow.pyfunc.load_model`` calls ``_load_pyfunc`` here. The model takes pixels as they lie in an image file, uint8
``[B, C, H, W]`` with values 0..255, scales and normalises them itself, and gives float32 logits ``[B, num_classes]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from methods.base import ModelSettings
from methods.catalog import Catalog, UnknownNameError
from methods.models.weights import apply_weights, load_weights
from orchestrator.bundle import BundleSettings, read_bundle
from orchestrator.errors import ConfigurationError

__all__ = ["ImageModel", "load_bundle"]

BATCH_SIZE = 256


class ImageModel:
    """The network with its pre-processing, on the CPU, in evaluation mode."""

    def __init__(self, network: nn.Module, settings: BundleSettings) -> None:
        self.settings = settings
        self._network = network.eval().requires_grad_(False)
        self._mean = torch.tensor(settings.mean).view(1, -1, 1, 1)
        self._std = torch.tensor(settings.std).view(1, -1, 1, 1)

    def predict(self, pixels: np.ndarray, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Logits ``[B, num_classes]`` float32 of uint8 pixels ``[B, C, H, W]``. ``params`` is unused."""
        task = self.settings.task
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != task.in_channels:
            raise ValueError(
                f"expected uint8 pixels [B, {task.in_channels}, {task.image_size}, {task.image_size}] with values "
                f"0..255, got {pixels.dtype} {list(pixels.shape)}"
            )
        starts = range(0, len(pixels), BATCH_SIZE)
        logits = [self._logits(pixels[start : start + BATCH_SIZE]) for start in starts]
        return np.concatenate(logits) if logits else np.zeros((0, task.num_classes), np.float32)

    @torch.no_grad()
    def _logits(self, pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255.0
        logits, _ = self._network((images - self._mean) / self._std)
        result: np.ndarray = logits.float().numpy()
        return result


def load_bundle(folder: Path, catalog: Catalog) -> ImageModel:
    """Rebuild the network of a bundle with the models that ``catalog`` knows.

    Raises:
        ConfigurationError: the catalog does not know the model (one that a user defined), or the weights do not fit.
    """
    settings = read_bundle(folder)
    try:
        tapped = catalog.build_model(ModelSettings(name=settings.model), settings.task)
        apply_weights(tapped.network, load_weights(folder / "weights.safetensors"), f"model bundle {folder}")
    except UnknownNameError as problem:
        raise ConfigurationError(
            f"model bundle {folder} was trained with the model {settings.model!r}, which is not built in: "
            "load it with orchestrator.serving.load_bundle(folder, catalog), where catalog is "
            f"BUILTIN.extended(models={{{settings.model!r}: FACTORY}}). Built in: {', '.join(sorted(catalog.models))}, timm/NAME"
        ) from problem
    except ValueError as problem:
        raise ConfigurationError(str(problem)) from problem
    return ImageModel(tapped, settings)


def _load_pyfunc(path: str) -> ImageModel:
    """Entry point that MLflow calls with the folder of the bundle."""
    from methods import BUILTIN

    return load_bundle(Path(path), BUILTIN)
