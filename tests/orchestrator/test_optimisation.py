"""Training settings, learning rates, the guarded update and the weight average."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from methods.base import UpdateRule
from orchestrator.checkpoint import from_bytes, to_bytes
from orchestrator.errors import ConfigurationError
from orchestrator.optimisation import (
    TrainSettings,
    Updater,
    WeightAverage,
    learning_rate_factor,
    make_optimizer,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("batch_size", 0),
        ("optimizer", "adam"),
        ("optimizer", "timm/"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("schedule", "steps"),
        ("milestones", (0.5, 0.5)),
        ("milestones", (0.0, 0.5)),
        ("milestones", (0.5, 1.0)),
        ("decay", 0.0),
        ("power", 0.0),
        ("warmup", 1.0),
        ("precision", "fp8"),
        ("accumulate", 0),
        ("accumulate", 65),
        ("clip_norm", -1.0),
        ("ema_decay", 1.0),
        ("evaluate_every", 0),
        ("keep", "first"),
        ("objective_mode", "highest"),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        TrainSettings(**{name: value})
    assert repr(value) in str(caught.value)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov must be false where momentum is 0, got True"):
        TrainSettings(nesterov=True, momentum=0.0)


@pytest.mark.parametrize(
    ("settings", "inactive"),
    [
        ({}, {"power", "objective", "objective_mode"}),
        ({"schedule": "poly"}, {"milestones", "decay", "objective", "objective_mode"}),
        ({"schedule": "cosine"}, {"milestones", "decay", "power", "objective", "objective_mode"}),
        ({"decay": 1.0}, {"milestones", "decay", "power", "objective", "objective_mode"}),
        ({"optimizer": "adamw"}, {"momentum", "nesterov", "power", "objective", "objective_mode"}),
        ({"optimizer": "timm/lamb"}, {"nesterov", "power", "objective", "objective_mode"}),
        ({"keep": "best"}, {"power"}),
        ({"batch_size": 64, "min_micro_batch": 33}, {"power", "objective", "objective_mode"}),
        ({"epochs": 0}, {field.name for field in fields(TrainSettings)} - {"epochs"}),
    ],
)
def test_settings_without_effect_are_named(settings: dict[str, Any], inactive: set[str]) -> None:
    own = set() if settings.get("epochs") == 0 else {"min_micro_batch", "compile"}
    assert TrainSettings.inactive(TrainSettings(**settings)) == inactive | own


@pytest.mark.parametrize(("min_micro_batch", "accumulate", "is_active"), [(32, 1, True), (33, 1, False), (16, 2, True), (32, 2, False), (0, 1, False)])  # fmt: skip
def test_the_smallest_micro_batch_counts_where_it_allows_something(
    min_micro_batch: int, accumulate: int, is_active: bool
) -> None:
    settings = TrainSettings(batch_size=64, accumulate=accumulate, min_micro_batch=min_micro_batch)
    assert ("min_micro_batch" not in TrainSettings.inactive(settings)) == is_active


@pytest.mark.parametrize(
    ("epochs", "last_epochs_before_a_step"),
    [
        (240, (150, 180, 210)),
        (60, (38, 45, 53)),
        (30, (19, 23, 27)),
        (10, (7, 8, 9)),
        (3, (2, 3, 3)),
        (1, (1, 1, 1)),
    ],
)
def test_step_schedule_keeps_its_shape(epochs: int, last_epochs_before_a_step: tuple[int, ...]) -> None:
    steps_per_epoch = 3
    for epoch in range(1, epochs + 1):
        expected = 0.1 ** sum(epoch > last for last in last_epochs_before_a_step)
        for step in range((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch):
            factor = learning_rate_factor(TrainSettings(epochs=epochs), step, steps_per_epoch)
            assert factor == pytest.approx(expected, rel=1e-12), (epoch, step)


def test_step_schedule_is_exact_where_a_fraction_is_not() -> None:
    settings = TrainSettings(
        epochs=100, milestones=(0.55, 0.57)
    )  # 0.57 * 100 is 56.99999999999999, 0.55: 55.00..01
    factors = [learning_rate_factor(settings, epoch, 1) for epoch in range(100)]
    assert factors == pytest.approx([1.0] * 55 + [0.1] * 2 + [0.01] * 43)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]),
        ({"schedule": "poly", "power": 2.0}, [(1 - step / 8) ** 2 for step in range(8)]),
        ({"schedule": "constant", "warmup": 0.5}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "poly", "power": 1.0, "warmup": 0.5}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ({"milestones": (0.5,), "warmup": 0.25}, [0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_schedules_per_optimizer_step(settings: dict[str, Any], expected: list[float]) -> None:
    settings = TrainSettings(epochs=4, **settings)
    assert [learning_rate_factor(settings, step, 2) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, torch.optim.SGD),
        ({"optimizer": "adamw"}, torch.optim.AdamW),
        ({"optimizer": "timm/lamb"}, object),
    ],
)
def test_optimizers_decay_every_parameter(settings: dict[str, Any], kind: type) -> None:
    parameters = list(nn.BatchNorm1d(4).parameters())
    optimizer = make_optimizer(TrainSettings(**settings), parameters)
    assert isinstance(optimizer, kind)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(2, 5e-4)]


def test_unknown_timm_optimizer_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="timm/nosuch"):
        make_optimizer(TrainSettings(optimizer="timm/nosuch"), [nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_the_formula(nesterov: bool) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    settings = TrainSettings(learning_rate=0.1, weight_decay=0.01, nesterov=nesterov)
    updater = Updater(settings, [parameter], device=CPU)
    weights, velocity = parameter.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for _ in range(4):
        loss = (parameter**2).sum()
        updater.backward(loss)
        updater.step(loss.detach(), 0.1)
        gradient = 2 * weights + 0.01 * weights
        velocity = 0.9 * velocity + gradient
        weights = weights - 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
    torch.testing.assert_close(parameter.detach(), weights)
    assert parameter.grad is None


@pytest.mark.parametrize(("clip_norm", "length"), [(0.0, 5.0), (10.0, 5.0), (0.5, 0.5)])
def test_long_gradients_are_shortened(clip_norm: float, length: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    settings = TrainSettings(clip_norm=clip_norm, momentum=0.0, weight_decay=0.0)
    updater = Updater(settings, [parameter], device=CPU)
    updater.backward(parameter @ torch.tensor([3.0, 4.0]))
    updater.step(torch.tensor(0.0), 1.0)
    torch.testing.assert_close(parameter.detach(), -torch.tensor([0.6, 0.8]) * length)


def updater_of(optimizer: str, parameter: nn.Parameter, is_deferred: bool) -> Updater:
    """With the deferred verdict of a GPU if asked for, told to the fused kernels of the CPU."""
    updater = Updater(TrainSettings(optimizer=optimizer), [parameter], device=CPU)
    assert not updater.is_deferred
    if is_deferred:
        updater.is_deferred, updater._streak, updater._worst = True, torch.tensor(0), torch.tensor(0)
    return updater


@pytest.mark.parametrize(
    ("optimizer", "is_deferred"),
    [("sgd", False), ("sgd", True), ("adamw", False), ("adamw", True), ("timm/lamb", False)],
)
@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_broken_steps_leave_nothing_behind(
    optimizer: str, is_deferred: bool, gradient: float, loss: float
) -> None:
    def sound_step(updater: Updater, parameter: nn.Parameter) -> None:
        updater.backward(parameter.sum())
        updater.step(torch.tensor(1.0), 0.1)

    broken, untouched = nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(1000))
    torch.full((1000,), 7.0)  # freed at once: what an uninitialised buffer would then hold
    updater = updater_of(optimizer, broken, is_deferred)
    updater.backward(broken.sum() * gradient)
    updater.step(torch.tensor(loss), 0.1)
    assert torch.equal(broken.detach(), torch.ones(1000))
    assert updater.has_diverged()
    sound_step(updater, broken)
    sound_step(updater_of(optimizer, untouched, is_deferred), untouched)
    assert torch.equal(broken, untouched)
    assert not torch.equal(broken.detach(), torch.ones(1000))
    assert updater.has_diverged(), "one broken step is remembered until somebody looks"


def test_fp16_tolerates_skipped_steps_but_not_twenty_in_a_row() -> None:
    parameter = nn.Parameter(torch.ones(1))
    updater = Updater(TrainSettings(precision="fp16"), [parameter], device=CPU)
    for number in range(1, 21):
        assert not updater.has_diverged(), number
        updater.backward(parameter.sum() * math.inf)
        updater.step(torch.tensor(math.inf), 0.1)
    assert updater.has_diverged()
    assert torch.equal(parameter.detach(), torch.ones(1))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "timm/lamb", "timm/nadamw", "timm/lookahead_sgd"])
def test_optimizer_state_comes_back(optimizer: str) -> None:
    def advance(updater: Updater, parameter: nn.Parameter) -> None:
        for _ in range(3):
            loss = (parameter**2).sum()
            updater.backward(loss)
            updater.step(loss.detach(), 0.1)

    first = nn.Parameter(torch.tensor([1.0, 2.0]))
    updater = Updater(TrainSettings(optimizer=optimizer), [first], device=CPU)
    advance(updater, first)
    second = nn.Parameter(first.detach().clone())
    other = Updater(TrainSettings(optimizer=optimizer), [second], device=CPU)
    other.load_state(from_bytes(to_bytes(updater.state())))
    advance(updater, first)
    advance(other, second)
    assert torch.equal(first, second)


class Counter(nn.Module):
    """Weights, a float buffer that is assigned anew, and a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("level", torch.zeros(1))
        self.register_buffer("count", torch.tensor(0))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "timm/lamb"])
def test_weights_of_convolutions_keep_their_own_momentum(optimizer: str) -> None:
    """They lie channels-last in memory, and what a checkpoint gives back does not."""
    generator = torch.Generator().manual_seed(0)
    first, targets = torch.rand(2, 4, 5, 3, 3, generator=generator)
    settings = TrainSettings(optimizer=optimizer, learning_rate=0.1)

    def continued(updater: Updater | None, weights: torch.Tensor) -> tuple[Updater, nn.Parameter]:
        parameter = nn.Parameter(weights.clone().to(memory_format=torch.channels_last))
        made = Updater(settings, [parameter], device=CPU)
        if updater is not None:
            made.load_state(from_bytes(to_bytes(updater.state())))
        loss = ((parameter - targets) ** 2).sum()
        made.backward(loss)
        made.step(loss.detach(), 0.1)
        return made, parameter

    updater, parameter = continued(None, first)
    _, resumed = continued(updater, parameter.detach())
    loss = ((parameter - targets) ** 2).sum()
    updater.backward(loss)
    updater.step(loss.detach(), 0.1)
    assert torch.equal(resumed, parameter)


def test_weight_average_follows_the_formula_and_gives_the_weights_back() -> None:
    module = Counter()
    average = WeightAverage(module, 0.75)
    expected = 0.0
    for number in range(1, 4):
        with torch.no_grad():
            module.weight.fill_(number)
        module.level = torch.full((1,), float(number))
        module.count += 1
        average.update()
        expected = 0.75 * expected + 0.25 * number
    with average.applied():
        assert module.weight.tolist() == pytest.approx([expected, expected])
        assert module.level.item() == pytest.approx(expected)
        assert module.count.item() == 3
    assert module.weight.tolist() == [3.0, 3.0]
    assert module.level.item() == 3.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "timm/lamb"])
def test_parameters_follow_their_rules(optimizer: str) -> None:
    """A slower parameter moves by its factor, and one that is not decayed stays where no gradient pulls it."""
    settings = TrainSettings(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5, momentum=0.0)
    plain, slow, kept = (nn.Parameter(torch.ones(3, 3)) for _ in range(3))
    rules = [UpdateRule(), UpdateRule(0.25), UpdateRule(1.0, False)]
    updater = Updater(settings, [plain, slow, kept], rules=rules, device=CPU)
    assert len(updater.optimizer.param_groups) == 3
    for parameter in (plain, slow, kept):
        parameter.grad = torch.zeros(3, 3)
    updater.step(torch.zeros(()), 0.1)
    fallen = [float((1 - parameter.detach()).max()) for parameter in (plain, slow, kept)]
    assert fallen[0] > 0
    assert fallen[2] == 0
    if optimizer != "timm/lamb":
        assert fallen[1] == pytest.approx(0.25 * fallen[0], rel=1e-5)


def test_equal_rules_make_one_group() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = make_optimizer(TrainSettings(), parameters, [UpdateRule()] * 3).param_groups
    assert [len(group["params"]) for group in groups] == [3]
    assert groups[0]["weight_decay"] == TrainSettings().weight_decay
