"""Published weights of encoders, by local folder or hub name, laid over a network of the same sizes.

Only safetensors are read. A checkpoint of other sizes is refused with everything that differs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from methods.models.weights import apply_weights


def transformers_part(module: str, *names: str) -> Any:
    """Classes of transformers, which is imported only where a network needs it.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{names[0]} needs the package transformers (pip install 'stillhouse[grounding]'): {error}"
        ) from error
    parts = tuple(getattr(found, name) for name in names)
    return parts if len(parts) > 1 else parts[0]


def load_pretrained(model_class: Any, name: str, **options: Any) -> nn.Module:
    """A model of transformers with its weights, built with ``options``.

    Raises:
        OSError: It cannot be read: no such folder, no network, or no safetensors in it.
    """
    try:
        model: nn.Module = model_class.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the weights of {name!r} could not be loaded as {model_class.__name__}: {error}. Name a folder with "
            "config.json and model.safetensors, or fill transformers' cache on a machine that has a network"
        ) from error
    return model


def copy_weights(source: nn.Module, target: nn.Module, origin: str) -> None:
    """Copy all weights; ValueError names what is missing, unexpected, or of another shape."""
    apply_weights(target, source.state_dict(), origin)


def copy_part(weights: Mapping[str, Tensor], prefix: str, target: nn.Module, origin: str) -> None:
    """Copy what stands under ``prefix`` into ``target``, with the same refusals."""
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    apply_weights(target, part, f"{origin} ({prefix}*)")
