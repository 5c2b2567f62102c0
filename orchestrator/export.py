"""A trained network as one ONNX file that any runtime can execute, checked against the network it came from.

The file takes pixels as they lie in an image, uint8 ``[B, C, H, W]`` with values 0..255 and any B, normalises them
itself, and gives float32 logits ``[B, num_classes]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods import BUILTIN, Catalog
from orchestrator.bundle import BundleSettings, bundle_settings
from orchestrator.errors import ConfigurationError, StillhouseError
from orchestrator.stage import load_source
from orchestrator.store import Store

__all__ = ["PixelNetwork", "export_artifact", "export_onnx"]

PARITY_BATCH = 8
RELATIVE_TOLERANCE = 1e-4
"""Largest difference of a logit between the file and the network, of the largest logit."""


class PixelNetwork(nn.Module):
    """A network with its normalisation: uint8 pixels ``[B, C, H, W]`` to logits ``[B, num_classes]``."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, settings: BundleSettings) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(settings.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(settings.std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network((pixels.float() / 255 - self.mean) / self.std)
        return logits


def export_artifact(store: Store, key: str, path: Path, catalog: Catalog = BUILTIN) -> float:
    """Export the network of the artifact ``key``; see ``export_onnx``."""
    settings = bundle_settings(key, store.manifest(key))
    tapped = load_source(store, key, catalog).teacher().network
    network: nn.Module = tapped.network  # type: ignore[assignment]
    return export_onnx(network, settings, path)


def export_onnx(network: nn.Module, settings: BundleSettings, path: Path) -> float:
    """Write ``path`` and run it on random pixels; returns the largest relative difference of a logit.

    Raises:
        ConfigurationError: The optional packages are missing.
        StillhouseError: The file computes something else than the network; it is removed again.
    """
    runtime = _runtime()
    task = settings.task
    module = PixelNetwork(network, settings).eval().requires_grad_(False).to("cpu")
    shape = (PARITY_BATCH, task.in_channels, task.image_size, task.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        module, (torch.from_numpy(pixels[:2]),), path, input_names=["pixels"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"pixels": pixels})
    expected = module(torch.from_numpy(pixels)).numpy()
    difference = float(np.abs(actual - expected).max() / np.abs(expected).max())
    if not difference <= RELATIVE_TOLERANCE:
        path.unlink()
        raise StillhouseError(
            f"export: the ONNX form of {settings.model} ({settings.key[:8]}) differs from the network by "
            f"{difference:.2g} of its largest logit (allowed {RELATIVE_TOLERANCE:g}); nothing was kept"
        )
    return difference


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401 - torch writes with it
        import onnxruntime
        import onnxscript  # noqa: F401 - torch writes with it
    except ImportError as error:
        raise ConfigurationError(
            f"export: {error.name} is not installed; pip install 'stillhouse[export]'"
        ) from error
    return onnxruntime
