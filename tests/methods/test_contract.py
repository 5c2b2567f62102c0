"""What the training loop may rely on, asked of every method in the table."""

from __future__ import annotations

import dataclasses
import math

import contract_cases as cases
import pytest
import torch
from contract_cases import CASES, TRAINED, build, finished, make_batch, trained_steps
from torch import Tensor

from methods import METHODS, Method, Step, Task, Teacher

every_case = pytest.mark.parametrize("name", CASES)
every_trained_case = pytest.mark.parametrize("name", TRAINED)
zero_weights = [(name, weight) for name, case in CASES.items() for weight in case.weights]


def teachers_of(method: Method) -> list[Teacher]:
    values = [value for value in vars(method).values() if isinstance(value, Teacher)]
    for several in vars(method).values():
        if isinstance(several, tuple):
            values += [value for value in several if isinstance(value, Teacher)]
    return list({id(value): value for value in values}.values())


def frozen_state(teacher: Teacher) -> dict[str, Tensor]:
    modules = [teacher.network, *([] if teacher.heads is None else [teacher.heads])]
    return {
        f"{number}.{key}": value.clone()
        for number, module in enumerate(modules)
        for key, value in module.state_dict().items()
    }


def check_finite(step: Step) -> None:
    for name, loss in step.losses.items():
        assert loss.value.shape == (), name
        assert loss.value.dtype == torch.float32, name
        assert loss.value.isfinite(), name
    for name, metric in step.metrics.items():
        assert not metric.requires_grad, name
        assert metric.isfinite(), name


def check_gradients(method: Method, step: Step) -> None:
    step.total.backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_every_method_has_cases() -> None:
    classifying = {name for name, method in METHODS.items() if method.task_type is Task}
    assert {case.method for case in CASES.values()} == classifying


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_frozen_keyword_only_and_known_to_inactive(name: str) -> None:
    method = METHODS[name]
    settings = method.Settings()
    fields = {field.name for field in dataclasses.fields(settings)}
    assert all(field.kw_only for field in dataclasses.fields(settings))
    assert method.inactive(settings) <= fields
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, min(fields, default="any"), 0)


@every_trained_case
def test_two_steps_move_the_weights_and_stay_finite(name: str) -> None:
    method = build(name)
    before = {key: value.clone() for key, value in method.artifact().named_parameters()}
    assert all(total.isfinite() for total in trained_steps(method, 2))
    after = dict(method.artifact().named_parameters())
    assert any(not torch.equal(before[key], after[key]) for key in before)
    check_finite(method(make_batch()))


@every_trained_case
def test_the_same_seed_gives_the_same_numbers(name: str) -> None:
    assert trained_steps(build(name), 2) == trained_steps(build(name), 2)


@pytest.mark.parametrize(("name", "weight"), zero_weights)
def test_a_weight_of_zero_trains(name: str, weight: str) -> None:
    method = build(name, **{weight: 0.0})
    step = method(make_batch())
    check_finite(step)
    check_gradients(method, step)


@every_trained_case
def test_resumed_equals_uninterrupted_to_the_bit(name: str) -> None:
    whole, first, second = build(name), build(name), build(name, seed=5)
    torch.manual_seed(11)
    expected = trained_steps(whole, 4)
    torch.manual_seed(11)
    found = trained_steps(first, 2)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    found += trained_steps(second, 2, first=2)
    assert found == expected
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in whole.state_dict().items())


@every_trained_case
def test_a_batch_of_one_trains(name: str) -> None:
    method = build(name)
    step = method(make_batch(1))
    check_finite(step)
    check_gradients(method, step)


@every_trained_case
def test_a_class_absent_from_the_batch_is_fine(name: str) -> None:
    method = build(name)
    step = method(make_batch()._replace(labels=torch.zeros(12, dtype=torch.int64)))
    check_finite(step)
    check_gradients(method, step)


@every_trained_case
def test_inputs_as_large_as_float16_stay_finite(name: str) -> None:
    method = build(name)
    step = method(make_batch(scale=1e4))
    check_finite(step)
    check_gradients(method, step)


@every_trained_case
def test_autocast_leaves_losses_in_float32(name: str) -> None:
    method = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = method(make_batch())
    check_finite(step)
    check_gradients(method, step)


@every_trained_case
def test_the_teacher_is_frozen_and_unchanged_by_training(name: str) -> None:
    method = build(name)
    before = [frozen_state(teacher) for teacher in teachers_of(method)]
    trained_steps(method, 20)
    for teacher, state in zip(teachers_of(method), before, strict=True):
        after = frozen_state(teacher)
        assert all(torch.equal(state[key], after[key]) for key in state)
        modules = [teacher.network, *([] if teacher.heads is None else [teacher.heads])]
        assert all(parameter.grad is None for module in modules for parameter in module.parameters())
        assert not any(module.training for root in modules for module in root.modules())


@every_case
def test_a_checkpoint_holds_no_teacher(name: str) -> None:
    method = build(name)
    ours = {tensor.data_ptr() for tensor in method.state_dict().values()}
    for teacher in teachers_of(method):
        theirs = {tensor.data_ptr() for tensor in teacher.network.state_dict().values()}
        assert not ours & theirs
    own = {
        key: value
        for key, value in method.state_dict().items()
        if key.partition(".")[0] not in CASES[name].beside
    }
    num_expected = sum(value.numel() for value in method.artifact().state_dict().values())
    if getattr(method, "heads", None) is not None and method.artifact() is not method.heads:
        num_expected += sum(value.numel() for value in method.heads.state_dict().values())
    assert sum(value.numel() for value in own.values()) == num_expected
    assert set(CASES[name].beside) <= {key.partition(".")[0] for key in method.state_dict()}


@every_trained_case
def test_the_artifact_emits_what_was_trained(name: str) -> None:
    method = build(name)
    trained_steps(method, 2)
    method.eval()
    batch = make_batch()
    random_state = torch.get_rng_state()
    teacher = finished(method, name).teacher()
    if not CASES[name].inputs:
        assert torch.equal(torch.get_rng_state(), random_state)
    signals = teacher(batch.images)
    assert teacher.key == f"key-of-{name}"
    assert signals.pooled.shape == (12, teacher.num_features)
    emits = type(method).emits
    if "views" in emits:
        assert teacher.heads is not None
        expected = method.artifact()(signals.pooled)
        actual = teacher.heads(signals.pooled)
        assert teacher.head_settings == method.settings
    else:
        expected = method.model(batch.images)
        actual = (signals.logits, signals.pooled)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_case
def test_statistics_add_up_over_batches(name: str) -> None:
    method = build(name)
    if method.trains:
        trained_steps(method, 2)
    method.eval()
    state = {key: value.clone() for key, value in method.state_dict().items()}
    batch = make_batch()
    halves = [
        batch._replace(images=batch.images[s], labels=batch.labels[s]) for s in (slice(7), slice(7, 12))
    ]
    whole = method.statistics(batch)
    parts = [method.statistics(half) for half in halves]
    assert float(whole["count"]) == 12
    for key, value in whole.items():
        assert value.shape == (), key
        assert float(parts[0][key] + parts[1][key]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), key
    assert all(torch.equal(state[key], value) for key, value in method.state_dict().items())


@every_case
def test_summaries_hold_every_promised_metric(name: str) -> None:
    method = build(name).eval()
    metrics = method.summarise(method.statistics(make_batch()))
    assert set(type(method).evaluation_metrics) <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 100


@every_trained_case
def test_the_total_is_the_weighted_sum(name: str) -> None:
    step = build(name)(make_batch())
    expected = sum(loss.weight * float(loss.value.detach()) for loss in step.losses.values())
    assert float(step.total.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.inputs and METHODS[case.method].same_classes]
)
def test_a_teacher_of_other_classes_is_refused(name: str) -> None:
    method = build(name)
    teacher = dataclasses.replace(teachers_of(method)[0], num_classes=9)
    model = cases.BUILTIN.build_model(cases.MODEL, cases.TASK)
    inputs = dict.fromkeys(CASES[name].inputs, teacher)
    with pytest.raises(ValueError, match="9 classes"):
        type(method)(method.settings, task=cases.TASK, model=model, inputs=inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronisation shows only on a GPU")
@every_trained_case
def test_a_step_never_waits_for_the_device(name: str) -> None:
    method = build(name).cuda()
    for teacher in teachers_of(method):
        teacher.to(torch.device("cuda"))
    batch = make_batch()
    batch = batch._replace(
        **{name: value.cuda() for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    )
    method(batch).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method(batch).total.backward()
        method.eval().statistics(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
