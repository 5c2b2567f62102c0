"""Where a teacher signal comes from: the weights of its members, the matrix of criteria and sources, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_cases import CASES, MODEL, NUM_SAMPLES, TASK, build, finished, make_batch
from torch import Tensor

from methods import BUILTIN, METHODS, Batch, Loss, Method, ModelSettings, Signals
from methods.base import InputStage
from methods.distil.noise import blurred
from methods.distil.refusals import kind_of
from methods.distil.student import DistilledStudent, FeatureStudent
from methods.distil.teaching import Outputs, Teaching, Weighting
from methods.distil.tekap import TekapSettings
from methods.losses import soften, softened_kl

SOURCES: dict[str, dict[str, str]] = {
    "plain": {"teacher": "supervised"},
    "views": {"teacher": "views"},
    "copies": {"teacher": "tekap"},
    "several": {"teacher.0": "supervised", "teacher.1": "kd"},
}
"""Kind of source -> cases that fill the role ``teacher``."""
OWN_LOSSES = {"feature_contrast", "logit_contrast", "label"}
CRITERIA = [name for name, method in METHODS.items() if issubclass(method, DistilledStudent)]


def stage(case: str, model: ModelSettings = MODEL) -> InputStage:
    """What the planner would know of a case."""
    method = METHODS[CASES[case].method]
    return InputStage(
        name=case,
        method=method,
        settings=method.Settings(**CASES[case].settings),
        model=model if method.needs_model else None,
        inputs={role: stage(other) for role, other in CASES[case].inputs.items()},
        catalog=BUILTIN,
    )


def refusals(method: type[Method], inputs: dict[str, str], **settings: Any) -> list[str]:
    lacking = [case for case in inputs.values() if not method.inputs["teacher"] <= stage(case).method.emits]
    if lacking:
        return [f"{', '.join(lacking)} emits not what is needed"]
    if len(inputs) > 1 and "teacher" not in method.allows_many:
        return ["takes one stage"]
    known = {role: stage(case) for role, case in inputs.items()}
    return list(method.refusals(method.Settings(**settings), known))


def student_of(method: type[Method], inputs: dict[str, str], **settings: Any) -> DistilledStudent:
    teachers = {role: finished(build(case, seed=7), case).teacher() for role, case in inputs.items()}
    torch.manual_seed(0)
    built = method(
        method.Settings(**settings), task=TASK, model=BUILTIN.build_model(MODEL, TASK), inputs=teachers
    )
    built.prepare(torch.arange(NUM_SAMPLES) % TASK.num_classes, num_epochs=3)
    assert isinstance(built, DistilledStudent)
    return built


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_learns_from_every_source_or_is_refused(name: str, source: str) -> None:
    method = METHODS[name]
    if reasons := refusals(method, SOURCES[source]):
        assert all(len(reason) > 10 for reason in reasons)
        assert source != "plain" or "views" in method.inputs["teacher"]
        return
    student = student_of(method, SOURCES[source])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    before = [value.clone() for value in student.model.parameters()]
    for seed in range(2):
        step = student(make_batch(seed=seed))
        assert all(loss.value.isfinite() for loss in step.losses.values())
        optimizer.zero_grad()
        step.total.backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, student.model.parameters(), strict=True))
    assert (source == "views" and student.settings.heads == "joint") == (set(step.losses) >= OWN_LOSSES)
    mass = 3.4 if source == "copies" else 1.0
    expected = student.kd_weight(make_batch()) * mass
    assert float(step.metrics["effective_kd_weight"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_what_reaches_the_criterion_is_a_distribution_of_the_members(source: str) -> None:
    student = student_of(METHODS["kd"], SOURCES[source])
    batch = make_batch()
    teaching = student.teaching(batch.images)
    target = teaching.target(4.0)
    torch.testing.assert_close(target.sum(-1), torch.ones(12))
    members = [teaching.signals.logits]
    if teaching.signals.view_logits is not None:
        members += list(teaching.signals.view_logits.unbind(1))
    weights = [1.0, *[student.weighting.view_weight] * (len(members) - 1)]
    expected = sum(w * soften(m, 4.0) for w, m in zip(weights, members, strict=True)) / sum(weights)
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(teaching.mixture(4.0), target * teaching.mass)
    assert len(members) == {"plain": 1, "views": 4, "copies": 4, "several": 2}[source]
    assert not target.requires_grad


def members_of(num_views: int = 3, width: int = 6) -> Signals:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Signals(random(4, 5), random(4, width), random(4, num_views, 5), random(4, num_views, width))


def test_a_transform_is_applied_to_each_member_before_they_are_mixed() -> None:
    signals = members_of()

    def transform(logits: Tensor, temperature: float) -> Tensor:
        return soften(logits.square(), temperature)

    found = Teaching(signals=signals).target(2.0, transform)
    assert signals.view_logits is not None
    members = torch.cat([signals.logits[:, None], signals.view_logits], 1)
    torch.testing.assert_close(found, (members.square() / 2).softmax(-1).mean(1))


def test_views_equal_to_the_teacher_and_views_of_weight_zero_change_nothing() -> None:
    signals = members_of()
    plain = soften(signals.logits, 4.0)
    same = signals._replace(view_logits=signals.logits[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(Teaching(signals=same).target(4.0), plain)
    without = Teaching(signals=signals, weighting=Weighting(view_weight=0.0))
    assert torch.equal(without.target(4.0), plain)
    assert torch.equal(without.pooled, signals.pooled)


def test_pooled_features_are_one_mean_or_one_term_for_each_member() -> None:
    signals = members_of()
    assert signals.view_pooled is not None
    mean = Teaching(signals=signals, weighting=Weighting(view_weight=0.5))
    expected = (signals.pooled + 0.5 * signals.view_pooled.sum(1)) / 2.5
    torch.testing.assert_close(mean.pooled, expected)
    assert [weight for weight, _ in mean.pooled_terms] == [1.0]
    torch.testing.assert_close(mean.pooled_terms[0][1], expected)
    each = Teaching(signals=signals, weighting=Weighting(pooled="each", pooled_weight=0.7))
    assert [weight for weight, _ in each.pooled_terms] == [1.0, 0.7, 0.7, 0.7]
    assert torch.equal(each.pooled_terms[2][1], signals.view_pooled[:, 1])


def test_features_of_different_widths_have_no_mean() -> None:
    teaching = Teaching(signals=members_of()._replace(view_pooled=None))
    with pytest.raises(ValueError, match="differ in width"):
        _ = teaching.pooled


def test_tekap_pulls_as_its_paper_says() -> None:
    """T^2 [KL_0 + 0.8 sum_k KL_k] has the gradient of the mixed target times its mass; 0.9 becomes 3.06."""
    student = student_of(METHODS["kd"], SOURCES["copies"])
    teaching = student.teaching(make_batch().images)
    assert student.kd_weight(make_batch()) * teaching.mass == pytest.approx(3.06)
    assert teaching.signals.view_logits is not None
    leaf = torch.randn(12, 5, requires_grad=True)
    (teaching.mass * softened_kl(leaf, teaching.target(4.0), 4.0)).backward()
    found, leaf.grad = leaf.grad, None
    members = [(1.0, teaching.signals.logits)]
    members += [(0.8, logits) for logits in teaching.signals.view_logits.unbind(1)]
    torch.stack([w * softened_kl(leaf, soften(m, 4.0), 4.0) for w, m in members]).sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-6)


def test_noisy_copies_have_the_mean_and_the_spread_that_were_asked_for() -> None:
    torch.manual_seed(0)
    copies = blurred(torch.full((500, 20), 2.0), 3, 0.1, 2.0)
    assert copies.shape == (500, 3, 20)
    assert float(copies.mean()) == pytest.approx(0.9 * 2.0, abs=0.01)
    assert float(copies.std()) == pytest.approx(0.1 * 2.0, abs=0.01)
    assert not torch.equal(copies[:, 0], copies[:, 1])


def test_noise_is_fresh_in_each_step_and_follows_the_seed() -> None:
    student = student_of(METHODS["kd"], SOURCES["copies"])
    images = make_batch().images

    def draw() -> Tensor:
        found = student.teaching(images).signals.view_logits
        assert found is not None
        return found

    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


class PooledDistance(FeatureStudent):
    """A criterion on pooled features, for the tests. Losses ``ce``, ``kd``, ``distance``."""

    Settings = METHODS["kd"].Settings

    def feature_losses(self, student: Outputs, teaching: Teaching, batch: Batch) -> dict[str, Loss]:
        terms = [weight * pooled.square().mean() for weight, pooled in teaching.pooled_terms]
        return {"distance": Loss(student.pooled.square().mean() - torch.stack(terms).sum(), 0.5)}


def test_a_feature_criterion_has_plain_distillation_beside_it() -> None:
    student = student_of(PooledDistance, SOURCES["views"], kd_weight=0.0, ce_weight=1.0, heads="joint")
    step = student(make_batch())
    assert {"ce", "kd", "distance"} <= set(step.losses)
    assert step.losses["kd"].weight == 0
    combined = student_of(PooledDistance, SOURCES["copies"], kd_weight=1.0)(make_batch())
    assert combined.losses["kd"].weight == pytest.approx(3.4)


@pytest.mark.parametrize(
    ("method", "inputs", "reason"),
    [
        (
            "kd",
            {"teacher.0": "supervised", "teacher.1": "views"},
            "views emits views: refer to supervised instead",
        ),
        ("dkd", {"teacher.0": "kd", "teacher.1": "tekap"}, "tekap emits copies"),
        ("tekap", {"teacher": "views"}, "tekap makes copies of one plain network, but views emits views"),
        ("angular_views", {"teacher": "tekap"}, "branches grow on one plain network, but tekap emits copies"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    method: str, inputs: dict[str, str], reason: str
) -> None:
    (found,) = refusals(METHODS[method], inputs)
    assert reason in found


def test_pooled_features_of_different_widths_are_refused_before_anything_runs() -> None:
    wide = stage("kd", ModelSettings(name="tiny_cnn"))
    inputs = {"teacher.0": stage("supervised"), "teacher.1": wide}
    settings = PooledDistance.Settings()
    (reason,) = PooledDistance.refusals(settings, inputs)
    assert "widths differ (supervised 12, kd 64)" in reason
    assert list(METHODS["dkd"].refusals(settings, inputs)) == []


@pytest.mark.parametrize(("source", "kind"), [(name, name) for name in SOURCES])
def test_settings_of_views_are_inactive_for_other_sources(source: str, kind: str) -> None:
    inputs = {role: stage(case) for role, case in SOURCES[source].items()}
    assert kind_of(inputs) == kind
    inactive = METHODS["dkd"].inactive_for(METHODS["dkd"].Settings(), inputs)
    assert inactive == (set() if kind == "views" else {"view_weight", "heads", "detach_target"})


def test_a_mlkd_without_strong_view_says_what_to_do() -> None:
    student = student_of(METHODS["mlkd"], SOURCES["plain"])
    with pytest.raises(ValueError, match="strong=True"):
        student(make_batch()._replace(strong=None))


def test_tekap_stands_for_its_teacher_in_evaluation() -> None:
    method = build("tekap")
    signals = method.teacher(make_batch().images)
    hits = (signals.logits.argmax(-1) == make_batch().labels).float().mean()
    assert method.summarise(method.statistics(make_batch()))["top1"] == pytest.approx(100 * float(hits))
    teacher = finished(method, "tekap").teacher()
    assert teacher.noise == TekapSettings()
    assert teacher.key == "key-of-tekap"
