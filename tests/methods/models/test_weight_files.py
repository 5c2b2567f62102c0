from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from methods.base import ModelSettings, Task
from methods.models import MODELS, Tapped, build_model

TASK = Task(num_classes=4, in_channels=1, image_size=8)
Weights = dict[str, Tensor]


def mlp(checkpoint: Path | None = None, num_classes: int = 4) -> Tapped:
    task = Task(num_classes=num_classes, in_channels=1, image_size=8)
    settings = ModelSettings(name="tiny_mlp", checkpoint=None if checkpoint is None else str(checkpoint))
    return build_model(MODELS["tiny_mlp"], settings, task)


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".safetensors", dict),
        (".safetensors", prefixed("network.")),
        (".safetensors", prefixed("module.network.")),
        (".pt", dict),
        (".pth", prefixed("module.")),
        (".pth", lambda weights: {"state_dict": weights, "epoch": 3}),
        (".pt", lambda weights: {"model": weights}),
    ],
)
def test_weights_are_restored(tmp_path: Path, suffix: str, wrap: Callable[[Weights], object]) -> None:
    original = mlp()
    content = wrap(original.network.state_dict())
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(content, file)
    restored = mlp(file)
    for name, value in original.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def test_counters_of_batch_norm_may_be_absent(tmp_path: Path) -> None:
    original = MODELS["mini_cnn"](num_classes=4, in_channels=1)
    weights = {n: v for n, v in original.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(weights, tmp_path / "old.safetensors")
    settings = ModelSettings(name="mini_cnn", checkpoint=str(tmp_path / "old.safetensors"))
    restored = build_model(MODELS["mini_cnn"], settings, TASK).network
    assert torch.equal(restored.classifier.weight, original.classifier.weight)


def test_one_error_lists_every_misfit(tmp_path: Path) -> None:
    weights = mlp(num_classes=9).network.state_dict()
    weights["hiden.weight"] = weights.pop("hidden.weight")
    file = tmp_path / "other.safetensors"
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"does not fit TinyMLP") as caught:
        mlp(file)
    text = str(caught.value)
    assert str(file) in text
    assert "1 missing: hidden.weight" in text
    assert "1 not in the network: hiden.weight; did you mean 'hidden.weight'?" in text
    assert "2 of another shape: classifier.weight [9, 24] for [4, 24], classifier.bias [9] for [4]" in text


class Payload:
    """Its unpickling would run code of ours."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("unpickled-by-mistake"),))  # type: ignore[return-value]


def test_a_file_that_needs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "whole_model.pt"
    torch.save({"model": Payload()}, file)
    with pytest.raises(ValueError, match=r"only be read by running code.*safetensors\.torch\.save_file"):
        mlp(file)
    assert not Path("unpickled-by-mistake").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BAD_FILES = [
    ("absent.safetensors", lambda file: None, "absent.safetensors is not a file: check the path"),
    (
        "weights.onnx",
        lambda file: file.write_bytes(b"x"),
        "ends in '.onnx'; expected .safetensors, .pt or .pth",
    ),
    (
        "half.safetensors",
        lambda f: (save_file(mlp().network.state_dict(), f), cut(f)),
        "not a complete safetensors",
    ),
    ("half.pt", lambda f: (torch.save(mlp().network.state_dict(), f), cut(f)), "half.pt is damaged"),
    ("empty.pt", lambda f: f.write_bytes(b""), "empty.pt.*damaged"),
    ("list.pt", lambda f: torch.save([1, 2], f), "holds a list, expected a state dict"),
    ("more.pt", lambda f: torch.save({"epoch": 3, "loss": 0.5}, f), r"more than tensors \(epoch, loss\)"),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD_FILES, ids=[row[0] for row in BAD_FILES])
def test_bad_files(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        mlp(tmp_path / name)
