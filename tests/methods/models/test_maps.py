"""Feature maps: where they are declared, that they are the right tensors, and what has none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from methods import BUILTIN
from methods.base import ModelSettings, Task
from methods.models import MODELS, MapReader, MapTaps, Tapped, build_model, map_taps, stage_taps

TASK = Task(num_classes=5, in_channels=3, image_size=32)
NO_PREACTIVATION = {"mobilenet_v2_half"}
SMALL_VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32}


def build(name: str, task: Task = TASK) -> Tapped:
    torch.manual_seed(3)
    return build_model(MODELS[name], ModelSettings(name=name), task).eval()


def images(size: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(2))


def small_vit() -> Tapped:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(4)
    return Tapped(VisionTransformer(num_classes=5, **SMALL_VIT), "head").eval()


def rough(network: nn.Module) -> nn.Module:
    """Norms as training leaves them, so that a map before an activation has negative values."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network


WITH_MAPS = sorted(
    set(MODELS) - {"tiny_mlp", "resnet32", "resnet56", "resnet110", "resnet32x4", "vgg13", "wrn_40_2"}
)


@pytest.mark.parametrize("name", sorted(set(WITH_MAPS) - NO_PREACTIVATION))
def test_maps_before_and_after_the_activation_belong_together(name: str) -> None:
    tapped = build(name)
    rough(tapped)
    taps = map_taps(tapped.network)
    after = MapReader(tapped, taps.stages)(images()).maps
    before = MapReader(tapped, taps.before_activation)(images()).maps
    assert len(after) == len(before) >= 2
    for mine, theirs in zip(before, after, strict=True):
        assert mine.shape == theirs.shape
        assert bool((mine < 0).any())
        if name.startswith("wrn"):
            continue  # the norm lies between them: tested below
        activated = mine.relu()
        if name == "shuffle_v2":  # shuffled behind the activation
            activated = activated.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        assert torch.equal(activated, theirs)


def test_wide_networks_give_what_the_next_norm_makes_of_a_stage() -> None:
    tapped = build("wrn_16_2")
    rough(tapped)
    network = tapped.network
    taps = map_taps(network)
    stages = MapReader(tapped, taps.stages)(images()).maps
    before = MapReader(tapped, taps.before_activation)(images()).maps
    norms = [network.stages[1][0].norm1, network.stages[2][0].norm1, network.norm]
    for norm, stage, normed in zip(norms, stages, before, strict=True):
        assert torch.equal(norm(stage), normed)


@pytest.mark.parametrize("name", WITH_MAPS)
def test_reading_maps_changes_no_other_output(name: str) -> None:
    tapped = build(name)
    expected = tapped(images())
    features = MapReader(tapped, stage_taps(tapped.network))(images())
    assert torch.equal(features.logits, expected[0])
    assert torch.equal(features.pooled, expected[1])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in tapped.modules())


@pytest.mark.parametrize(
    "name", [name for name in WITH_MAPS if name not in {"mobilenet_v2_half", "shuffle_v2"}]
)
def test_the_last_map_pools_to_the_pooled_feature(name: str) -> None:
    """Networks with a head of their own behind the last stage are left out."""
    tapped = build(name)
    kind = "before" if name.startswith("wrn") else "after"
    features = MapReader(tapped, stage_taps(tapped.network, kind))(images())
    torch.testing.assert_close(features.maps[-1].relu().mean(dim=(2, 3)), features.pooled)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_flows_into_every_stage(memory_format: torch.memory_format) -> None:
    tapped = build("resnet20").to(memory_format=memory_format)
    maps = MapReader(tapped, stage_taps(tapped.network, "before"))(images()).maps
    sum(fm.square().mean() for fm in maps).backward()
    assert tapped.network.stages[2][0].conv1.weight.grad is not None
    assert tapped.network.stem[0].weight.grad is not None


REFUSED = [
    ("tiny_mlp", "after", "TinyMLP declares no feature maps: use a criterion on logits or pooled"),
    ("mobilenet_v2_half", "before", "MobileNetV2Cifar offers no feature maps from before an activation"),
]


@pytest.mark.parametrize(("name", "activation", "message"), REFUSED)
def test_a_network_without_such_maps_says_so(name: str, activation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_taps(build(name).network, activation)


BAD_TAPS = [
    ("stagse.1", "'stagse.1' is not a module of ResNetCifar; did you mean 'stages.1'"),
    ("stages.1:out", "tap 'stages.1:out' ends in 'out': expected PATH, PATH:input or PATH:tokens"),
]


@pytest.mark.parametrize(("tap", "message"), BAD_TAPS)
def test_a_wrong_tap_fails_at_the_start(tap: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MapReader(build("resnet8"), (tap,))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("classifier", r"'classifier' of ResNetCifar gives \[2, 5\], not a feature map"),
        ("stages.1:tokens", r"reads \[2, 32, 16, 16\], not tokens"),
    ],
)
def test_a_tap_of_another_shape_is_refused(tap: str, message: str) -> None:
    reader = MapReader(build("resnet8"), (tap,))
    with pytest.raises(ValueError, match=message):
        reader(images())


def test_a_transformer_has_maps_only_when_its_tokens_are_laid_out() -> None:
    tapped = small_vit()
    with pytest.raises(
        ValueError, match=r"VisionTransformer has no feature map at 'blocks.0'.*'blocks.0:tokens'"
    ):
        MapReader(tapped, stage_taps(tapped.network)).shapes((3, 32, 32))
    features = MapReader(tapped, ("blocks.0:tokens", "blocks.2:tokens"))(images())
    assert [fm.shape for fm in features.maps] == [(2, 24, 4, 4)] * 2
    tokens = tapped.network.forward_intermediates(images(), norm=False, intermediates_only=True)
    torch.testing.assert_close(features.maps[0], tokens[0])
    torch.testing.assert_close(features.maps[1], tokens[2])


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "swin_s3_tiny_224"])
def test_levels_of_timm_networks(name: str) -> None:
    """Against timm's own extraction of features, which rebuilds the network."""
    import timm

    side = 224 if name.startswith("swin") else 64
    torch.manual_seed(0)
    with torch.device("meta"):
        task = Task(num_classes=5, image_size=side)
        tapped = BUILTIN.build_model(ModelSettings(name=f"timm/{name}"), task)
        reference = timm.create_model(name, features_only=True)
        reader = MapReader(tapped, stage_taps(tapped.network))
        shapes = reader.shapes((3, side, side))
    info = reference.feature_info
    assert [shape[0] for shape in shapes] == info.channels()[-len(shapes) :]
    assert [side // shape[1] for shape in shapes] == info.reduction()[-len(shapes) :]
    assert len(shapes) == 4


def test_what_an_in_place_activation_is_given_is_kept() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 30 * 30, 5)
    )
    tapped = Tapped(network, "3")
    before, after = MapReader(tapped, ("1:input", "1"))(images()).maps
    assert bool((before < 0).any())
    assert torch.equal(before.relu(), after)


def test_a_tensor_that_is_changed_in_place_later_is_refused() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 30 * 30, 5)
    )
    with pytest.raises(RuntimeError, match=r"Sequential changes in place what its modules \['0'\] pass"):
        MapReader(Tapped(network, "3"), ("0",))(images())


def test_a_network_may_declare_its_own_maps() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 5))
    network.map_taps = MapTaps(stages=("1",), before_activation=("0",))  # type: ignore[assignment]
    assert stage_taps(network, "before") == ("0",)
    assert MapReader(Tapped(network, "3"), stage_taps(network)).shapes((3, 32, 32)) == ((4, 30, 30),)


class Mapped(nn.Module):
    """Sums maps, logits and pooled features, for DDP and compilation."""

    def __init__(self, tapped: Tapped) -> None:
        super().__init__()
        self.tapped = tapped

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        taps = stage_taps(self.tapped.network, "before")
        logits, pooled, maps = MapReader(self.tapped, taps)(batch)
        return logits.sum() + pooled.sum() + sum(F.softplus(fm).mean() for fm in maps)


def test_maps_under_ddp(tmp_path: Path) -> None:
    plain = Mapped(build("resnet8"))
    twin = copy.deepcopy(plain)
    plain(images()).backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        DistributedDataParallel(twin)(images()).backward()
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad)


def test_maps_in_a_compiled_step() -> None:
    """Traced by dynamo, run eagerly: no compiler is needed, and graph breaks are allowed."""
    task = Task(num_classes=5, in_channels=3, image_size=8)
    plain = Mapped(build("mini_cnn", task))
    compiled = torch.compile(plain, backend="eager")
    torch.testing.assert_close(compiled(images(side=8)), plain(images(side=8)))
