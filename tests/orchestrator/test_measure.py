"""Size and speed of a network: exact counts, and a time that leaves the network as it was."""

from __future__ import annotations

import torch

from methods import BUILTIN, ModelSettings, Task
from orchestrator.measure import latency_ms, size_and_speed

TASK = Task(num_classes=10, in_channels=3, image_size=32)
CPU = torch.device("cpu")


def network(name: str) -> torch.nn.Module:
    return BUILTIN.build_model(ModelSettings(name=name), TASK).network


def test_counts_are_those_of_one_image() -> None:
    found = size_and_speed(network("resnet8"), TASK, CPU)
    assert found["num_parameters"] == 78_042
    assert 12.4e6 < found["macs"] < 12.6e6
    assert found["latency_ms"] > 0


def test_measuring_leaves_mode_and_statistics_as_they_are() -> None:
    measured = network("resnet8").train()
    before = {name: value.clone() for name, value in measured.state_dict().items()}
    assert latency_ms(measured, TASK, CPU) > 0
    assert measured.training
    assert all(torch.equal(value, before[name]) for name, value in measured.state_dict().items())
