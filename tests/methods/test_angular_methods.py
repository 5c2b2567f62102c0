"""Branch heads, settings, gradient flow and the two stages of Angular-KD."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from contract_cases import TASK, build, finished, make_batch, trained_steps
from torch import Tensor, nn

from methods import BUILTIN, METHODS, Source
from methods.angular.ensemble import ensemble_probs
from methods.angular.heads import ViewHeads, with_views
from methods.angular.settings import AngularViewsSettings
from methods.angular.student import AngularDistillationSettings
from methods.kd import KnowledgeDistillationSettings
from methods.losses import soften, softened_kl
from methods.supervised import SupervisedSettings

PARAMETERS_PER_BRANCH = {128: 29_668, 256: 92_004, 512: 314_980, 2048: 4_405_348}


def make_heads(num_branches: int = 3, *, dropout: float = 0.0, init: str = "orthogonal") -> ViewHeads:
    heads = ViewHeads(6, 4, (dropout,) * num_branches)
    torch.manual_seed(0)
    heads.initialise(init, "released")
    return heads


def single_branch(heads: ViewHeads, branch: int) -> tuple[nn.Linear, nn.BatchNorm1d, nn.Linear]:
    """The branch as three ordinary layers with the same weights."""
    num_features, num_classes = heads.weight.shape[-1], heads.classifier_bias.shape[-1]
    linear = nn.Linear(num_features, num_features)
    norm, classifier = nn.BatchNorm1d(num_features), nn.Linear(num_features, num_classes)
    with torch.no_grad():
        linear.weight.copy_(heads.weight[branch])
        linear.bias.copy_(heads.bias[branch])
        norm.weight.copy_(heads.norm.weight.view_as(heads.bias)[branch])
        norm.bias.copy_(heads.norm.bias.view_as(heads.bias)[branch])
        classifier.weight.copy_(heads.classifier_weight[branch])
        classifier.bias.copy_(heads.classifier_bias[branch])
    return linear, norm, classifier


@pytest.mark.parametrize("num_features", PARAMETERS_PER_BRANCH)
def test_parameter_counts(num_features: int) -> None:
    with torch.device("meta"):
        heads = ViewHeads(num_features, 100, (0.2,) * 5)
    assert sum(p.numel() for p in heads.parameters()) == 5 * PARAMETERS_PER_BRANCH[num_features]


@pytest.mark.parametrize("num_branches", [1, 2, 5])
def test_the_batched_product_equals_separate_branches(num_branches: int) -> None:
    heads = make_heads(num_branches)
    nn.init.normal_(heads.bias)
    nn.init.normal_(heads.classifier_bias)
    branches = [single_branch(heads, branch) for branch in range(num_branches)]
    for training in (True, True, False):
        pooled = torch.randn(8, 6)
        heads.train(training)
        features, logits = heads(pooled)
        for branch, (linear, norm, classifier) in enumerate(branches):
            expected = norm.train(training)(linear(pooled))
            torch.testing.assert_close(features[:, branch], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits[:, branch], classifier(expected), atol=1e-5, rtol=1e-5)
            running = heads.norm.running_var.view_as(heads.bias)[branch]
            torch.testing.assert_close(running, norm.running_var, atol=1e-6, rtol=1e-5)


def test_each_branch_drops_its_own_share_and_keeps_the_mean() -> None:
    rates = (0.0, 0.2, 0.5)
    heads = ViewHeads(50, 2, rates).train()
    torch.manual_seed(0)
    dropped = heads._dropped(torch.ones(2000, 50))
    assert dropped.eq(0).float().mean(dim=(1, 2)).tolist() == pytest.approx(rates, abs=0.01)
    assert dropped.mean(dim=(1, 2)).tolist() == pytest.approx([1.0] * 3, abs=0.02)
    assert not torch.equal(dropped[1, 0] == 0, dropped[1, 1] == 0)
    assert torch.equal(heads.eval()._dropped(torch.ones(4, 50)), torch.ones(3, 4, 50))


def test_a_training_batch_of_one_uses_and_keeps_the_running_statistics() -> None:
    heads = make_heads()
    heads(torch.randn(32, 6))
    before = {name: buffer.clone() for name, buffer in heads.named_buffers()}
    pooled = torch.randn(1, 6)
    in_training = heads(pooled)
    assert all(torch.equal(before[name], buffer) for name, buffer in heads.named_buffers())
    assert all(torch.equal(a, b) for a, b in zip(in_training, heads.eval()(pooled), strict=True))


def test_orthogonal_init_makes_every_branch_orthogonal() -> None:
    heads = make_heads()
    for weight in heads.weight:
        torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=0)
    assert not torch.allclose(heads.weight[0], heads.weight[1])


def test_stacked_qr_makes_the_branches_of_a_unit_orthonormal() -> None:
    heads = make_heads(init="stacked_qr")
    rows = heads.weight.transpose(0, 1)
    torch.testing.assert_close(rows @ rows.transpose(1, 2), torch.eye(3).expand(6, 3, 3), atol=1e-5, rtol=0)
    assert not torch.allclose(heads.weight[0] @ heads.weight[0].T, torch.eye(6), atol=0.1)
    with pytest.raises(ValueError, match="num_branches=7 with 6 features"):
        ViewHeads(6, 4, (0.2,) * 7).initialise("stacked_qr", "standard")


def test_first_batch_norm_is_one_draw_per_branch() -> None:
    torch.manual_seed(0)
    draws: list[Tensor] = []
    for _ in range(500):
        heads = ViewHeads(2, 2, (0.2,) * 5)
        heads.initialise("orthogonal", "released")
        norm = heads.norm.weight.view(5, 2)
        assert torch.equal(norm[:, 0], norm[:, 1])
        assert not torch.equal(heads.norm.bias.view(5, 2), norm)
        draws.append(norm[:, 0].detach())
    weights = torch.stack(draws)
    assert weights.mean(0).tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0.6], abs=0.08)
    assert weights.std(0).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=0.15)


def test_standard_batch_norm_is_left_alone() -> None:
    heads = ViewHeads(4, 2, (0.2,) * 3)
    heads.initialise("orthogonal", "standard")
    assert heads.norm.weight.eq(1).all()
    assert heads.norm.bias.eq(0).all()


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, (0.20, 0.25, 0.30, 0.35, 0.40)),
        ({"num_branches": 1}, (0.20,)),
        ({"num_branches": 3, "dropout_low": 0.0, "dropout_high": 0.5}, (0.0, 0.25, 0.5)),
        ({"preset": "released"}, (0.15, 0.20, 0.25, 0.30, 0.35)),
        ({"preset": "released", "num_branches": 1}, (0.15,)),
    ],
)
def test_dropout_rates(settings: dict[str, Any], rates: tuple[float, ...]) -> None:
    assert AngularViewsSettings(**settings).dropout_rates == pytest.approx(rates)


IMPOSSIBLE: list[tuple[type, dict[str, Any], str]] = [
    (AngularViewsSettings, {"num_branches": 0}, "num_branches must be at least 1, got 0"),
    (AngularViewsSettings, {"num_branches": -3}, "got -3"),
    (AngularViewsSettings, {"num_branches": 7, "preset": "released"}, "at most 6 .* got 7"),
    (AngularViewsSettings, {"margin": 1.5}, "margin must lie between 0 and 1 .* got 1.5"),
    (AngularViewsSettings, {"margin": 0.0}, "margin"),
    (AngularViewsSettings, {"margin": float("nan")}, "margin .* got nan"),
    (AngularViewsSettings, {"dropout_low": 0.5}, "dropout_low=0.5 and dropout_high=0.4"),
    (AngularViewsSettings, {"dropout_high": 1.0}, "dropout_high"),
    (AngularViewsSettings, {"dropout_low": -0.1}, "dropout_low"),
    (AngularViewsSettings, {"label_weight": 0.0}, "label_weight must be a finite number above 0, got 0.0"),
    (AngularViewsSettings, {"temperature": 0}, "temperature"),
    (AngularViewsSettings, {"contrast_temperature": -1}, "contrast_temperature"),
    (AngularViewsSettings, {"feature_intra_weight": -1.0}, "feature_intra_weight .* got -1.0"),
    (AngularViewsSettings, {"logit_inter_weight": float("inf")}, "logit_inter_weight .* got inf"),
    (AngularViewsSettings, {"init": "identity"}, "init must be one of orthogonal, stacked_qr, got 'identity'"),
    (AngularViewsSettings, {"bn_init": "calibrated"}, "bn_init"),
    (AngularViewsSettings, {"constraint": "soft"}, "constraint"),
    (AngularViewsSettings, {"intra_reduction": "sum"}, "intra_reduction"),
    (AngularViewsSettings, {"offset_space": "cosine"}, "offset_space"),
    (AngularViewsSettings, {"preset": "arxiv"}, "preset"),
    (AngularDistillationSettings, {"kd_weight": -1.0}, "kd_weight"),
    (AngularDistillationSettings, {"view_weight": float("nan")}, "view_weight"),
    (AngularDistillationSettings, {"kd_weight": 0, "ce_weight": 0}, "learn nothing"),
    (AngularDistillationSettings, {"heads": "none"}, "heads must be one of joint, frozen"),
    (KnowledgeDistillationSettings, {"temperature": 0.0}, "temperature"),
    (KnowledgeDistillationSettings, {"ce_weight": -0.1}, "ce_weight"),
    (KnowledgeDistillationSettings, {"kd_weight": 0, "ce_weight": 0}, "kd_weight and ce_weight are all 0"),
    (SupervisedSettings, {"label_smoothing": 1.0}, "label_smoothing"),
]


@pytest.mark.parametrize(("settings", "values", "message"), IMPOSSIBLE)
def test_impossible_settings_are_refused(settings: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**values)


OTHER_VALUES: dict[str, Any] = {
    "num_branches": 2,
    "feature_inter_weight": 0.7,
    "feature_intra_weight": 0.3,
    "logit_inter_weight": 0.4,
    "logit_intra_weight": 0.2,
    "label_weight": 1.5,
    "margin": 0.45,
    "contrast_temperature": 0.3,
    "temperature": 2.0,
    "dropout_low": 0.1,
    "dropout_high": 0.5,
    "init": "stacked_qr",
    "bn_init": "standard",
    "constraint": "hinge",
    "extra_branch_division": False,
    "intra_reduction": "per_sample",
    "offset_space": "unit",
    "preset": "released",
}
NO_INTER = {"feature_inter_weight": 0.0, "logit_inter_weight": 0.0}
NO_INTRA = {"feature_intra_weight": 0.0, "logit_intra_weight": 0.0}
INTER_SETTINGS = {"margin", "contrast_temperature", "constraint", "extra_branch_division"}
INTRA_SETTINGS = {"intra_reduction", "offset_space"}
SINGLE = {"feature_intra_weight", "logit_intra_weight", "extra_branch_division", "dropout_high"} | INTRA_SETTINGS
HINGE = {"contrast_temperature", "extra_branch_division"}
INACTIVE: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"feature_inter_weight": 0.0}, set()),
    ({"logit_intra_weight": 0.0}, set()),
    (NO_INTER, INTER_SETTINGS),
    (NO_INTRA, INTRA_SETTINGS),
    (NO_INTER | NO_INTRA, INTER_SETTINGS | INTRA_SETTINGS),
    ({"num_branches": 1}, SINGLE),
    ({"num_branches": 1} | NO_INTER, SINGLE | INTER_SETTINGS),
    ({"constraint": "hinge"}, HINGE),
    ({"preset": "released"}, {"dropout_low", "dropout_high", "init"}),
    ({"preset": "released", "num_branches": 1}, {"dropout_low", "init"} | SINGLE),
]


def total_and_gradient(**settings: Any) -> list[Tensor]:
    method = build("views", **settings)
    total = method(make_batch()).total
    total.backward()
    return [total.detach(), *(p.grad for p in method.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("point", "names"), INACTIVE)
def test_inactive_settings_and_only_those_change_nothing(point: dict[str, Any], names: set[str]) -> None:
    settings = AngularViewsSettings(**({"num_branches": 3} | point))
    assert METHODS["angular_views"].inactive(settings) == names
    before = total_and_gradient(**point)
    for name in names:
        after = total_and_gradient(**(point | {name: OTHER_VALUES[name]}))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_every_setting_acts_at_the_default_point(name: str) -> None:
    before, after = total_and_gradient(), total_and_gradient(**{name: OTHER_VALUES[name]})
    assert len(before) != len(after) or not torch.equal(before[0], after[0])


@pytest.mark.parametrize(
    ("point", "names"),
    [
        ({}, set()),
        ({"kd_weight": 0.0}, {"view_weight", "detach_target"}),
        ({"view_weight": 0.0}, {"detach_target"}),
        ({"heads": "frozen"}, {"detach_target"}),
    ],
)
def test_inactive_settings_of_the_student(point: dict[str, Any], names: set[str]) -> None:
    assert METHODS["angular_kd"].inactive(AngularDistillationSettings(**point)) == names

    def run(**changes: Any) -> list[Tensor]:
        method = build("student", **(point | changes))
        total = method(make_batch()).total
        total.backward()
        return [total.detach(), *(torch.zeros(()) if p.grad is None else p.grad for p in method.parameters())]

    before = run()
    for name, value in (("view_weight", 0.3), ("detach_target", False)):
        same = all(torch.equal(a, b) for a, b in zip(before, run(**{name: value}), strict=True))
        assert same == (name in names), name


def test_inactive_settings_of_plain_distillation() -> None:
    assert METHODS["kd"].inactive(KnowledgeDistillationSettings()) == set()
    assert METHODS["kd"].inactive(KnowledgeDistillationSettings(kd_weight=0.0)) == {"temperature"}


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
        method.heads.weight.copy_(torch.eye(8))
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
    plain.teacher = method.teacher
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
    torch.testing.assert_close(method._target(batch.images), soften(members, 4.0).mean(1))


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
