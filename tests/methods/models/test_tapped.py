from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from methods.base import ModelSettings, Task
from methods.models import MODELS, Tapped, Taps, build_model
from methods.models.tapped import evaluating, find_module

TASK = Task(num_classes=5, in_channels=3, image_size=16)


def small() -> Tapped:
    torch.manual_seed(1)
    return build_model(MODELS["resnet8"], ModelSettings(name="resnet8"), TASK)


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def manual(tapped: Tapped, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    network = tapped.network
    pooled = network.stages(network.stem(batch)).mean(dim=(2, 3))
    return network.classifier(pooled), pooled


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("training", [True, False])
def test_pooled_is_the_input_of_the_classifier(training: bool) -> None:
    tapped = small().train(training)
    expected_logits, expected_pooled = manual(copy.deepcopy(tapped), images())
    logits, pooled = tapped(images())
    assert torch.equal(logits, expected_logits)
    assert torch.equal(pooled, expected_pooled)
    assert torch.equal(logits, tapped.network.classifier(pooled))
    assert pooled.shape == (3, tapped.num_features)


def test_a_batch_of_one_and_gradient_through_both_outputs() -> None:
    tapped = small().eval()
    logits, pooled = tapped(images(1))
    (logits.sum() + pooled.sum()).backward()
    assert all(parameter.grad is not None for parameter in tapped.parameters())


def test_the_network_stays_free_of_hooks_even_after_an_error() -> None:
    tapped = small()
    tapped(images())
    assert hooks(tapped) == 0
    with pytest.raises(RuntimeError):
        tapped(torch.rand(2, 1, 16, 16))
    assert hooks(tapped) == 0


def test_copies_are_independent() -> None:
    tapped = small().eval()
    tapped(images())
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        twin.network.classifier.weight.zero_()
        twin.network.stem[0].weight.zero_()
    assert not torch.equal(tapped(images())[1], twin(images())[1])
    assert torch.equal(tapped(images())[1], manual(tapped, images())[1])
    assert torch.equal(twin(images())[1], manual(twin, images())[1])


def test_several_readers_of_one_network() -> None:
    tapped = small().eval()
    other = Tapped(tapped.network, "stages.2.0.conv1")
    with pytest.raises(ValueError, match="not a pooled vector"):
        other(images())
    again = Tapped(tapped.network, "classifier")
    outer = Tapped(nn.Sequential(tapped.network), "0.classifier")
    for reader in (again, outer):
        assert torch.equal(reader(images())[1], tapped(images())[1])


def test_under_autocast() -> None:
    tapped = small().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, pooled = tapped(images())
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(pooled.float(), manual(tapped, images())[1], atol=0.05)


def test_under_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        tapped = small().eval()
        parallel = DistributedDataParallel(copy.deepcopy(tapped))
        logits, pooled = parallel(images())
        (logits.square().mean() + pooled.square().mean()).backward()
    finally:
        dist.destroy_process_group()
    expected_logits, expected_pooled = tapped(images())
    (expected_logits.square().mean() + expected_pooled.square().mean()).backward()
    assert torch.equal(pooled, expected_pooled)
    for ours, theirs in zip(parallel.module.parameters(), tapped.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad)


def test_state_dict_has_one_prefix() -> None:
    tapped = small()
    assert set(tapped.state_dict()) == {f"network.{name}" for name in tapped.network.state_dict()}


class OneByOne(nn.Module):
    """A classifier written as a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 5, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(batch.mean(dim=(2, 3), keepdim=True)).flatten(1)


def test_a_convolution_as_classifier() -> None:
    tapped = Tapped(OneByOne(), "head")
    _, pooled = tapped(images())
    assert tapped.num_features == 3
    assert torch.equal(pooled, images().mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("clasifier", r"'clasifier' is not a module of ResNetCifar; did you mean 'classifier'"),
        ("stages.9", r"'stages.9' is not a module.*did you mean 'stages"),
        ("", r"'' is not a module of ResNetCifar \(its children: stem, stages, classifier\)"),
        ("stem", "'stem' is a Sequential; the classifier must be one nn.Linear"),
    ],
)
def test_a_wrong_path_fails_at_the_start(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tapped(MODELS["resnet8"](num_classes=5, in_channels=3), path)


def test_a_path_that_is_an_attribute_but_no_module() -> None:
    with pytest.raises(ValueError, match="is not a module"):
        find_module(small(), "network.stem.0.weight")


def test_taps_before_and_after_an_activation() -> None:
    network = small().network.eval()
    taps = Taps(inputs=("stages.1.0.activation",), outputs=("stages.1",))
    taps.check(network)
    _, recorded = taps.run(network, images())
    before, after = recorded["stages.1.0.activation:input"], recorded["stages.1"]
    assert bool((before < 0).any())
    assert torch.equal(before.relu(), after)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle, self.pair = nn.ReLU(), nn.ReLU(), Pair()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.pair(self.shared(self.shared(batch)))[0]


class Pair(nn.Module):
    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return batch, batch


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (Taps(outputs=("shared",)), "'shared' ran twice"),
        (Taps(inputs=("idle",)), r"did not run its modules \['idle:input'\]"),
        (Taps(outputs=("pair",)), "'pair' passes a tuple, not a tensor"),
    ],
)
def test_taps_that_cannot_be_read(taps: Taps, message: str) -> None:
    network = Odd()
    with pytest.raises(RuntimeError, match=message):
        taps.run(network, images())
    assert hooks(network) == 0


@pytest.mark.parametrize("freeze", [lambda m: m.train(), lambda m: m.eval(), lambda m: m.stem.eval()])
def test_evaluating_restores_each_mode(freeze: Callable[[nn.Module], object]) -> None:
    network = small().network
    freeze(network)
    modes = [module.training for module in network.modules()]
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == modes
