"""First weights from a local file: safetensors, or a torch file that needs no code to be read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from methods.names import did_you_mean

MAX_LISTED = 8
"""How many names of one kind of mistake an error spells out."""


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor of a ``.safetensors``, ``.pt`` or ``.pth`` file, on the CPU.

    A torch file may hold the state dict itself or keep it under ``state_dict`` or ``model``. The prefixes ``module.``
    (left by DDP) and ``network.`` (left by our own artifacts) are dropped when every name has them. Raises
    ValueError for a file that is absent, damaged, of another kind, or readable only by running code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"checkpoint {path} is not a file: check the path on the machine that runs the stage"
        )
    if path.suffix == ".safetensors":
        weights: object = _load_safetensors(path)
    elif path.suffix in {".pt", ".pth"}:
        weights = _load_torch(path)
    else:
        raise ValueError(f"checkpoint {path} ends in {path.suffix!r}; expected .safetensors, .pt or .pth")
    return _without_prefixes(_state_dict(weights, path))


def apply_weights(network: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy ``weights`` into ``network``; every parameter and buffer must be there with its shape.

    One ValueError lists everything that is missing, unexpected (with the near name) or of another shape. Only
    ``num_batches_tracked`` may be absent: files of old torch versions lack it, and inference never reads it.
    """
    own = network.state_dict()
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    reshaped = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    problems = [
        *_listed("missing", missing),
        *_listed("not in the network", [f"{n}{did_you_mean(n, missing)}" for n in unexpected]),
        *_listed("of another shape", [f"{n} {_shape(weights[n])} for {_shape(own[n])}" for n in reshaped]),
    ]
    if problems:
        raise ValueError(
            f"{origin} does not fit {type(network).__name__}: {'; '.join(problems)}. Name the model and the number "
            "of classes that the file was saved with, or another file"
        )
    network.load_state_dict(dict(weights), strict=False)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {path} is not a complete safetensors file ({error}): copy it again"
        ) from error
    return weights


def _load_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} can only be read by running code that is stored in it, or is damaged, so it was not "
            "opened. Where you trust it, save just the weights: safetensors.torch.save_file(model.state_dict(), "
            f"'{path.stem}.safetensors'), and name that file"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error}): copy it again") from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"checkpoint {path} holds a {type(content).__name__}, expected a state dict (name -> tensor)"
        )
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        names = ", ".join(strangers[:MAX_LISTED])
        raise ValueError(
            f"checkpoint {path} holds more than tensors ({names}): save model.state_dict() alone"
        )
    return dict(content)


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("module.", "network."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _listed(kind: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return [f"{len(names)} {kind}: {', '.join(names[:MAX_LISTED])}{more}"]


def _shape(value: Tensor) -> str:
    return str(list(value.shape))
