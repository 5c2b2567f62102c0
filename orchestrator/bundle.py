"""A trained network as a folder that can be handed on: ``model.json`` and ``weights.safetensors``, no pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from methods.base import Task
from orchestrator.errors import ConfigurationError

__all__ = ["BundleSettings", "bundle_settings", "read_bundle", "requirements", "write_bundle"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleSettings:
    """What ``model.json`` holds: all that is needed, with the weights, to classify an image."""

    model: str
    """Name of the network, as in the model table."""
    task: Task
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    key: str
    """Content key of the artifact that the weights come from."""


def bundle_settings(key: str, manifest: Mapping[str, Any]) -> BundleSettings:
    """The settings of the network that the artifact ``key`` holds. Raises ConfigurationError when it holds none."""
    if not manifest["model"]:
        raise ConfigurationError(
            f"artifact {key[:8]} of stage {manifest['name']!r} holds no network of its own: name a student's or a teacher's"
        )
    return BundleSettings(
        model=manifest["model"]["name"],
        task=Task(**manifest["task"]),
        mean=tuple(manifest["normalisation"]["mean"]),
        std=tuple(manifest["normalisation"]["std"]),
        class_names=tuple(manifest["class_names"]),
        key=key,
    )


def write_bundle(folder: Path, settings: BundleSettings, weights: Mapping[str, Tensor]) -> Path:
    """Write a bundle. ``weights`` are those of the plain network, with or without the prefix ``network.``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
    return folder


def read_bundle(folder: Path) -> BundleSettings:
    """Read ``model.json``. Raises ConfigurationError naming the file when it is absent or incomplete."""
    path = folder / "model.json"
    try:
        content = json.loads(path.read_text())
        return BundleSettings(
            model=content["model"],
            task=Task(**content["task"]),
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            class_names=tuple(content["class_names"]),
            key=content["key"],
        )
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigurationError(
            f"model bundle {path} cannot be read: {type(problem).__name__}: {problem}"
        ) from problem


def requirements() -> list[str]:
    """What loading needs, with the versions in use (without local suffixes such as +cu126)."""
    found = []
    for package in ("stillhouse", "torch", "safetensors", "numpy"):
        try:
            found.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:
            logger.debug("%s is not an installed package: not listed as a requirement", package)
    return found
