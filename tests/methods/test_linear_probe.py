"""The probe learns a linear layer and nothing else, on any number of classes, and its artifact gives the same logits."""

from __future__ import annotations

import torch
from contract_cases import TASK, build, finished, make_batch

from methods import Task
from methods.linear_probe import LinearProbe, LinearProbeSettings
from methods.losses import cross_entropy


def test_it_is_logistic_regression_on_frozen_features() -> None:
    probe = build("probe")
    batch = make_batch()
    features = probe.teacher(batch.images).pooled.double()
    weight, bias = probe.classifier.weight.double(), probe.classifier.bias.double()
    expected = cross_entropy(features @ weight.T + bias, batch.labels)
    torch.testing.assert_close(probe(batch).total.double(), expected, rtol=1e-6, atol=1e-6)
    assert {name for name, _ in probe.named_parameters()} == {"classifier.weight", "classifier.bias"}
    probe(batch).total.backward()
    assert all(parameter.grad is None for parameter in probe.teacher.network.parameters())


def test_the_classes_of_the_probe_are_its_own() -> None:
    teacher = finished(build("supervised"), "supervised").teacher()
    task = Task(num_classes=11, in_channels=1, image_size=8)
    probe = LinearProbe(LinearProbeSettings(), task=task, model=None, inputs={"teacher": teacher})
    assert probe.classifier.out_features == 11 != TASK.num_classes
    assert not LinearProbe.same_classes


def test_its_artifact_gives_the_same_logits() -> None:
    probe = build("probe", seed=3).eval()
    images = make_batch().images
    signals = finished(probe, "probe").teacher()(images)
    torch.testing.assert_close(signals.logits, probe.model(images)[0])
