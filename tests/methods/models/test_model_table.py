"""The networks against the counted table of the specification (100 classes, 32x32)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.base import ModelSettings, Task
from methods.models import MODELS, MapReader, build_model, map_taps
from methods.models.count import Count, count
from methods.models.resnet_cifar import ResNetCifar
from methods.models.wide_resnet import WideResNet

CIFAR100 = Task(num_classes=100, in_channels=3, image_size=32)
PLAIN_MAPS = [(16, 32), (16, 32), (32, 16), (64, 8)]
WIDE_MAPS = [(32, 32), (64, 32), (128, 16), (256, 8)]
WRN_MAPS = [(16, 32), (32, 32), (64, 16), (128, 8)]
VGG_MAPS = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]
MOBILE_MAPS = [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)]
SHUFFLE_1_MAPS = [(24, 32), (240, 16), (480, 8), (960, 4)]
SHUFFLE_2_MAPS = [(24, 32), (116, 16), (232, 8), (464, 4)]
RESNET50_MAPS = [(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)]
TABLE = [
    # name, parameters, million multiply-adds, pooled width, (channels, side) of the stem and the stages
    ("resnet8", 83_892, 12.5, 64, PLAIN_MAPS),
    ("resnet20", 278_324, 40.8, 64, PLAIN_MAPS),
    ("resnet32", 472_756, 69.1, 64, PLAIN_MAPS),
    ("resnet56", 861_620, 125.8, 64, PLAIN_MAPS),
    ("resnet110", 1_736_564, 253.2, 64, PLAIN_MAPS),
    ("resnet8x4", 1_233_540, 177.1, 256, WIDE_MAPS),
    ("resnet32x4", 7_433_860, 1083.0, 256, WIDE_MAPS),
    ("wrn_16_2", 703_284, 101.1, 128, WRN_MAPS),
    ("wrn_40_1", 569_780, 83.3, 64, PLAIN_MAPS),
    ("wrn_40_2", 2_255_156, 327.6, 128, WRN_MAPS),
    ("vgg8", 3_965_028, 96.2, 512, VGG_MAPS),
    ("vgg13", 9_462_180, 284.9, 512, VGG_MAPS),
    ("mobilenet_v2_half", 812_836, 6.5, 1280, MOBILE_MAPS),
    ("shuffle_v1", 949_258, 38.7, 960, SHUFFLE_1_MAPS),
    ("shuffle_v2", 1_355_528, 44.5, 1024, SHUFFLE_2_MAPS),
    ("resnet50", 23_705_252, 1298.0, 2048, RESNET50_MAPS),
]


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_multiply_adds(network: nn.Module, images: torch.Tensor) -> int:
    """An own count, by hooks, for what the product counts by watching operators."""
    total = 0

    def count_one(module: nn.Module, _arguments: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            side = module.kernel_size[0] * module.kernel_size[1]
            total += output[0].numel() * module.in_channels // module.groups * side
        elif isinstance(module, nn.Linear):
            total += module.in_features * module.out_features

    handles = [module.register_forward_hook(count_one) for module in network.modules()]
    network(images)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(("name", "parameters", "mega_macs", "width", "maps"), TABLE)
def test_network_matches_the_table(
    name: str, parameters: int, mega_macs: float, width: int, maps: list[tuple[int, int]]
) -> None:
    with torch.device("meta"):
        tapped = build_model(MODELS[name], ModelSettings(name=name), CIFAR100)
        macs = count_multiply_adds(tapped.network.eval(), torch.zeros(1, 3, 32, 32))
    counted = count(tapped.network, CIFAR100)
    assert counted == Count(parameters=parameters, macs=macs)
    assert count_parameters(tapped.network) == parameters
    assert macs / 1e6 == pytest.approx(mega_macs, rel=0.005)
    assert tapped.num_features == width
    taps = map_taps(tapped.network)
    assert taps.stem is not None
    shapes = MapReader(tapped, (taps.stem, *taps.stages)).shapes((3, 32, 32))
    assert shapes == tuple((channels, side, side) for channels, side in maps)


def test_the_table_holds_no_other_name() -> None:
    assert set(MODELS) == {row[0] for row in TABLE} | {"tiny_cnn", "mini_cnn", "tiny_mlp"}


@pytest.mark.parametrize(
    ("name", "parameters"), [("tiny_cnn", 56_554), ("mini_cnn", 1_698), ("tiny_mlp", 1_810)]
)
def test_digit_networks_keep_their_size(name: str, parameters: int) -> None:
    assert count_parameters(MODELS[name](num_classes=10, in_channels=1)) == parameters


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(("in_channels", "side"), [(1, 8), (3, 20)])
def test_any_channels_and_size(name: str, in_channels: int, side: int) -> None:
    task = Task(num_classes=7, in_channels=in_channels, image_size=side)
    tapped = build_model(MODELS[name], ModelSettings(name=name), task)
    logits, pooled = tapped(torch.rand(2, in_channels, side, side))
    assert logits.shape == (2, 7)
    assert pooled.shape == (2, tapped.num_features)
    assert bool(logits.isfinite().all())


def test_weights_follow_from_the_callers_seed() -> None:
    def first_weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in MODELS["resnet8"](num_classes=10, in_channels=3).parameters()])

    assert torch.equal(first_weights(3), first_weights(3))
    assert not torch.equal(first_weights(3), first_weights(4))


def test_convolutions_start_from_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    convolution = MODELS["resnet8x4"](num_classes=10, in_channels=3).get_submodule("stages.2.0.conv2")
    expected = (2 / (256 * 9)) ** 0.5
    assert float(convolution.weight.detach().std()) == pytest.approx(expected, rel=0.01)


def test_building_checks_the_network_without_changing_it() -> None:
    torch.manual_seed(5)
    plain = MODELS["resnet8"](num_classes=10, in_channels=3)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    tapped = build_model(
        MODELS["resnet8"], ModelSettings(name="resnet8"), Task(num_classes=10, in_channels=3, image_size=32)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in tapped.modules())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, tapped.network.state_dict()[name]), name


def test_impossible_depth_of_a_wide_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depth must be 10, 16, 22.*got 20"):
        WideResNet(20, 2, num_classes=10, in_channels=3)


@pytest.mark.parametrize("depth", [0, 2, 9, 21])
def test_impossible_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 8, 14, 20.*got {depth}"):
        ResNetCifar(depth, (16, 16, 32, 64), num_classes=10, in_channels=3)


class Stranger(nn.Module):
    """A user's network that does not say where its classifier is."""

    def __init__(self, num_classes: int, in_channels: int, outputs: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels * 64, 12)
        self.head = nn.Linear(12, outputs or num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(images.flatten(1)))


def test_the_classifier_of_a_stranger_is_its_last_fitting_linear_layer() -> None:
    task = Task(num_classes=12, in_channels=1, image_size=8)
    tapped = build_model(Stranger, ModelSettings(name="stranger"), task)
    assert tapped.classifier_path == "head"
    assert tapped.num_features == 12


BAD_NETWORKS = [
    (
        lambda **kw: Stranger(kw["num_classes"], 1, outputs=5),
        "no nn.Linear with 7 outputs.*embed, head.*classifier_path",
    ),
    (lambda **kw: Stranger(kw["num_classes"], 3), r"model 'mine' fails on one image of \[1, 8, 8\]"),
    (
        lambda **kw: _with_path(Stranger(7, 1), "haed"),
        "'haed' is not a module of Stranger; did you mean 'head'",
    ),
    (
        lambda **kw: _with_path(Stranger(7, 1, outputs=5), "head"),
        r"gives \[1, 5\] for one image, expected \[1, 7\]",
    ),
]


def _with_path(network: nn.Module, path: str) -> nn.Module:
    network.classifier_path = path  # type: ignore[assignment]
    return network


@pytest.mark.parametrize(("factory", "message"), BAD_NETWORKS)
def test_a_network_that_does_not_fit_fails_when_built(factory: object, message: str) -> None:
    task = Task(num_classes=7, in_channels=1, image_size=8)
    with pytest.raises(ValueError, match=message):
        build_model(factory, ModelSettings(name="mine"), task)  # type: ignore[arg-type]
