"""An exported network computes what the network computes, for any number of images, and nothing else is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from methods import BUILTIN, ModelSettings, Task
from orchestrator import export
from orchestrator.bundle import BundleSettings
from orchestrator.errors import StillhouseError
from orchestrator.export import PixelNetwork, export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
TASK = Task(num_classes=5, in_channels=3, image_size=16)


def case(model: str) -> tuple[torch.nn.Module, BundleSettings]:
    torch.manual_seed(0)
    network = BUILTIN.build_model(ModelSettings(name=model), TASK).network
    settings = BundleSettings(
        model=model, task=TASK, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), class_names=tuple("abcde"), key="k" * 32
    )  # fmt: skip
    return network, settings


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet8", "timm/mobilenetv3_small_050"])
def test_the_file_computes_what_the_network_does(model: str, tmp_path: Path) -> None:
    network, settings = case(model)
    assert export_onnx(network, settings, tmp_path / "new" / "model.onnx") <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "new" / "model.onnx")
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    (logits,) = session.run(None, {"pixels": pixels})
    normalised = (pixels / 255.0 - np.array(settings.mean).reshape(3, 1, 1)) / np.array(settings.std).reshape(
        3, 1, 1
    )
    expected = network.eval()(torch.tensor(normalised, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model.onnx"]


class Drifting(PixelNetwork):
    """Computes something else whenever it is not being exported."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = super().forward(pixels)
        return logits if torch.compiler.is_exporting() else logits + 1


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PixelNetwork", Drifting)
    with pytest.raises(StillhouseError, match=r"resnet8 .* differs from the network by"):
        export_onnx(*case("resnet8"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
