from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from methods.base import ModelSettings, Task
from methods.catalog import UnknownNameError
from methods.models import build_model, timm_factory

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("mobilenetv3_small_050", 1024),
        ("vit_tiny_patch16_224", 192),
        ("convnext_atto", 320),
        ("resnet10t", 512),
    ],
)
def test_timm_models_are_tapped_where_their_classifier_is(name: str, width: int) -> None:
    task = Task(num_classes=7, in_channels=1, image_size=32)
    tapped = build_model(timm_factory(f"timm/{name}"), ModelSettings(name=f"timm/{name}"), task).eval()
    images = torch.rand(2, 1, 32, 32)
    logits, pooled = tapped(images)
    assert logits.shape == (2, 7)
    assert pooled.shape == (2, width) == (2, tapped.num_features)
    assert torch.equal(logits, tapped.network(images))


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"timm has no model 'resnet_18'; did you mean .*'resnet18'"):
        timm_factory("timm/resnet_18")


def test_a_local_checkpoint(tmp_path: Path) -> None:
    task = Task(num_classes=3)
    factory = timm_factory("timm/resnet10t")
    original = build_model(factory, ModelSettings(name="timm/resnet10t"), task)
    save_file(original.state_dict(), tmp_path / "kept.safetensors")
    settings = ModelSettings(name="timm/resnet10t", checkpoint=str(tmp_path / "kept.safetensors"))
    restored = build_model(factory, settings, task)
    assert all(torch.equal(value, restored.state_dict()[n]) for n, value in original.state_dict().items())


def test_a_model_without_published_weights() -> None:
    architectures = [
        n for n in timm.list_models("test_*") if not timm.models.get_pretrained_cfg(n).has_weights
    ]
    name = architectures[0] if architectures else "vit_base_patch16_xp_224"
    settings = ModelSettings(name=f"timm/{name}", pretrained=True)
    with pytest.raises(ValueError, match=r"publishes no weights .*set pretrained to false"):
        build_model(timm_factory(settings.name), settings, Task(num_classes=3, image_size=224))


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_arguments: object, **_settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    settings = ModelSettings(name="timm/resnet18", pretrained=True)
    with pytest.raises(
        OSError, match=r"weights of 'resnet18': no route to host.*model.checkpoint a local file"
    ):
        build_model(timm_factory("timm/resnet18"), settings, Task(num_classes=3))
