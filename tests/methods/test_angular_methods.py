"""Gradient flow, metrics and targets of the two stages of Angular-KD, and of plain distillation beside them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract_cases import TASK, build, finished, make_batch, trained_steps
from torch import Tensor, nn

from methods import BUILTIN, METHODS, Source
from methods.angular.ensemble import ensemble_probs
from methods.angular.heads import with_views
from methods.angular.student import AngularDistillationSettings
from methods.losses import soften, softened_kl
from methods.supervised import SupervisedSettings

BRANCH_LOSSES = {
    *("feature_contrast", "feature_diversity", "feature_intra"),
    *("logit_contrast", "logit_diversity", "logit_intra", "label"),
}


def reached(method: nn.Module, loss: Tensor) -> dict[str, bool]:
    """Whether each part of an ``angular_kd`` receives a gradient that is not zero."""
    parts = {"student": method.model, "heads": method.heads}
    reach = {}
    for name, part in parts.items():
        parameters = list(part.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        reach[name] = any(g is not None and bool(g.ne(0).any()) for g in gradients)
    return reach


@pytest.mark.parametrize("detach_target", [True, False])
def test_gradient_flow(detach_target: bool) -> None:
    method = build("student", detach_target=detach_target)
    losses = method(make_batch()).losses
    assert set(losses) == BRANCH_LOSSES | {"ce", "kd"}
    for name in BRANCH_LOSSES - {"feature_diversity", "logit_diversity"}:
        assert reached(method, losses[name].value) == {"student": False, "heads": True}, name
    assert reached(method, losses["ce"].value) == {"student": True, "heads": False}
    assert reached(method, losses["kd"].value) == {"student": True, "heads": not detach_target}


def test_one_teacher_pass_serves_a_step() -> None:
    for name in ("kd", "kd-of-views", "views", "student", "student-frozen"):
        method = build(name)
        calls: list[int] = []
        method.teacher.network.register_forward_hook(lambda *_, c=calls: c.append(1))
        method(make_batch())
        assert len(calls) == 1, name


def test_stage_one_learns_and_the_heads_buffers_move() -> None:
    method = build("views")
    before = method.heads.norm.running_mean.clone()
    totals = trained_steps(method, 100, learning_rate=0.1)
    assert torch.stack(totals[-10:]).mean() < torch.stack(totals[:10]).mean()
    assert not torch.equal(before, method.heads.norm.running_mean)


def test_metrics_of_identical_views_are_those_of_no_diversity() -> None:
    method = build("views").eval()
    with torch.no_grad():
        method.heads.weight.copy_(torch.eye(method.teacher.num_features))
        method.heads.norm.weight.fill_(1.0)
        method.heads.norm.bias.fill_(0.0)
        classifier = method.teacher.network.network.classifier
        method.heads.classifier_weight.copy_(classifier.weight.expand_as(method.heads.classifier_weight))
        method.heads.classifier_bias.copy_(classifier.bias.expand_as(method.heads.classifier_bias))
    metrics = method.summarise(method.statistics(make_batch(64)))
    assert metrics["feature_gate_open_fraction"] == metrics["logit_gate_open_fraction"] == 1.0
    assert metrics["feature_own_cosine"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["logit_pair_cosine"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["diversity"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["mixture_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["disagreement"] == 0.0
    assert metrics["top1"] == metrics["teacher_top1"] == metrics["head_top1"] == metrics["head_2_top1"]


def test_metrics_are_those_of_the_ensemble() -> None:
    method = build("views").eval()
    batch = make_batch(64)
    signals = with_views(method.teacher(batch.images), method.heads)
    mixture = ensemble_probs(signals.logits, signals.view_logits, 1.0)
    metrics = method.summarise(method.statistics(batch))
    hits = (mixture.argmax(-1) == batch.labels).float().mean()
    assert metrics["top1"] == pytest.approx(100 * float(hits), rel=1e-5)
    nll = -mixture.gather(1, batch.labels[:, None]).log().mean()
    assert metrics["loss"] == pytest.approx(float(nll.detach()), rel=1e-5)
    head_hits = (signals.view_logits.argmax(-1) == batch.labels[:, None]).float().mean(0)
    for branch, value in enumerate(head_hits.tolist()):
        assert metrics[f"head_{branch}_top1"] == pytest.approx(100 * value, rel=1e-5)
    assert metrics["head_top1"] == pytest.approx(100 * float(head_hits.mean()), rel=1e-5)
    members = torch.cat([signals.logits[:, None], signals.view_logits], 1).argmax(-1)
    pairs = [(members[:, i] != members[:, j]).float().mean() for i in range(4) for j in range(i)]
    assert metrics["disagreement"] == pytest.approx(100 * float(torch.stack(pairs).mean()), rel=1e-5)


def test_a_single_view_reports_no_spread() -> None:
    metrics = build("views-single").eval()
    summary = metrics.summarise(metrics.statistics(make_batch()))
    assert summary["feature_pair_cosine"] == summary["logit_offset_cosine"] == 1.0


def test_view_weight_zero_is_plain_distillation() -> None:
    method = build("student-frozen", view_weight=0.0, kd_weight=0.9)
    plain = build("kd")
    plain.model.load_state_dict(method.model.state_dict())
    plain.teachers = (dataclasses.replace(method.teacher, heads=None),)
    ours, theirs = method(make_batch()), plain(make_batch())
    torch.testing.assert_close(ours.losses["kd"].value, theirs.losses["kd"].value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.total, theirs.total, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "mass"), [("student", 1.0), ("student-released", 1.990)])
def test_effective_kd_weight_is_reported(name: str, mass: float) -> None:
    step = build(name, kd_weight=2.0)(make_batch())
    assert float(step.metrics["effective_kd_weight"]) == pytest.approx(2 * mass, abs=2e-3)
    assert {"feature_gate_open_fraction", "logit_gate_open_fraction"} <= set(step.metrics)


def test_frozen_heads_give_their_evaluation_target_and_no_branch_losses() -> None:
    method = build("student-frozen").train()
    batch = make_batch()
    step = method(batch)
    assert set(step.losses) == {"ce", "kd"}
    assert method.heads is None
    signals = with_views(method.teacher(batch.images), method.teacher.heads)
    target = ensemble_probs(signals.logits, signals.view_logits, 4.0)
    expected = softened_kl(method.model(batch.images)[0], target, 4.0)
    torch.testing.assert_close(step.losses["kd"].value, expected)


def test_joint_heads_are_copies_that_train() -> None:
    method = build("student")
    before = {key: value.clone() for key, value in method.teacher.heads.state_dict().items()}
    trained_steps(method, 3)
    for key, value in method.teacher.heads.state_dict().items():
        assert torch.equal(before[key], value)
    assert not torch.equal(before["weight"], method.heads.weight)
    assert any(key.startswith("heads.") for key in method.state_dict())
    assert not any(key.startswith("heads.") for key in method.artifact().state_dict())


def test_students_share_the_settings_of_their_views() -> None:
    views = build("views", temperature=2.0, label_weight=1.7)
    source = finished(views, "views")
    teacher = source.teacher()
    method = METHODS["angular_kd"](
        AngularDistillationSettings(heads="joint"),
        task=TASK,
        model=BUILTIN.build_model(finished(build("supervised"), "supervised").model, TASK),
        inputs={"teacher": teacher},
    )
    batch = make_batch()
    torch.manual_seed(0)
    step = method(batch)
    assert step.losses["label"].weight == 1.7
    torch.manual_seed(0)
    signals = with_views(teacher(batch.images), method.heads)
    target = ensemble_probs(signals.logits, signals.view_logits, 2.0)
    expected = softened_kl(method.model(batch.images)[0], target, 2.0)
    torch.testing.assert_close(step.losses["kd"].value, expected)


def test_plain_distillation_of_views_targets_their_mean() -> None:
    method = build("kd-of-views")
    batch = make_batch()
    signals = with_views(method.teacher(batch.images), method.teacher.heads)
    members = torch.cat([signals.logits[:, None], signals.view_logits], 1)
    target = method.teaching(batch.images).target(4.0)
    torch.testing.assert_close(target, soften(members, 4.0).mean(1))


def test_released_views_refuse_another_view_weight() -> None:
    with pytest.raises(ValueError, match=r"fix view_weight at 0\.8, got 0\.5"):
        build("student-released", view_weight=0.5)


def test_a_teacher_without_views_is_refused() -> None:
    teacher = finished(build("supervised"), "supervised").teacher()
    model = BUILTIN.build_model(finished(build("supervised"), "supervised").model, TASK)
    with pytest.raises(ValueError, match="has no branches: refer to an angular_views stage"):
        METHODS["angular_kd"](
            AngularDistillationSettings(), task=TASK, model=model, inputs={"teacher": teacher}
        )


def test_a_network_method_without_model_is_refused() -> None:
    with pytest.raises(ValueError, match="name a model in its stage"):
        METHODS["supervised"](SupervisedSettings(), task=TASK, model=None, inputs={})


def test_artifacts_that_do_not_fit_are_refused() -> None:
    source: Source = finished(build("supervised"), "supervised")
    short = dict(source.weights)
    short.pop(next(iter(short)))
    with pytest.raises(RuntimeError, match="Missing key"):
        dataclasses.replace(source, weights=short).teacher()
    with pytest.raises(ValueError, match="names no model"):
        dataclasses.replace(source, model=None).teacher()
