"""A grounder that learns from another: its terms, its teacher, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from grounding_cases import Trainer, build, finished
from grounding_samples import TASK, make_batch

from methods import METHODS
from methods.base import Teacher
from methods.grounding.grounding_kd import GroundingStudent, pixel_distance
from methods.grounding.method import GroundingMethod
from methods.grounding.self_distillation import mask_divergence
from methods.teachers import freeze

STUDENTS = [name for name, method in METHODS.items() if issubclass(method, GroundingStudent)]


def student(name: str = "shared_ris_kd", **changes: Any) -> Any:
    return build(name, **changes)


def test_every_grounder_can_be_a_student() -> None:
    assert {name.removesuffix("_kd") for name in STUDENTS} == {
        "shared_ris",
        "latent_vg",
        "cm_masksd",
        "magnet",
    }


@pytest.mark.parametrize("name", STUDENTS)
def test_it_has_its_own_settings_and_those_of_distillation(name: str) -> None:
    method, plain = METHODS[name], METHODS[name].__bases__[1]
    preset = method.presets[f"{name.removesuffix('_kd')}_small"]
    settings = method.Settings(**preset, temperature=3.0)
    assert set(plain.Settings.__dataclass_fields__) < set(method.Settings.__dataclass_fields__)
    assert issubclass(plain, GroundingMethod)
    assert method.version == plain.version
    assert method.inputs == {"teacher": {"grounding"}}
    assert {"kd_weight", "temperature"} <= set(method.ranges)
    without = method.Settings(**preset, kd_weight=0.0)
    assert method.inactive(without) - method.inactive(settings) == {"temperature"}


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"kd_weight": -1.0}, {"pixel_weight": float("nan")}]
)
@pytest.mark.parametrize("name", STUDENTS)
def test_impossible_settings_are_refused(name: str, changes: dict[str, float]) -> None:
    preset = METHODS[name].presets[f"{name.removesuffix('_kd')}_small"]
    with pytest.raises(ValueError, match=next(iter(changes))):
        METHODS[name].Settings(**{**preset, **changes})


def test_terms_are_what_they_say() -> None:
    method, batch = student(), make_batch(3)
    step = method(batch)
    with torch.no_grad():
        own, told = method.network(batch), method.teacher.network(batch)
        expected = mask_divergence(own.mask_logits, told.mask_logits, temperature=2.0)
        adapted = method.sentence_adapter(own.sentence_embed)
        cosine = torch.cosine_similarity(adapted, told.sentence_embed, dim=-1)
    assert torch.equal(step.losses["kd"].value.detach(), expected)
    assert float(step.losses["sentence"].value.detach()) == pytest.approx(float(1 - cosine.mean()), rel=1e-5)
    assert {name: step.losses[name].weight for name in ("kd", "pixels", "sentence")} == {"kd": 1.0, "pixels": 0.5, "sentence": 0.5}  # fmt: skip


def test_pixels_are_compared_at_the_teachers_size() -> None:
    teacher = torch.randn(2, 5, 6, 6)
    assert float(pixel_distance(3 * teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(pixel_distance(-teacher, teacher)) == pytest.approx(2, abs=1e-6)
    assert 0 < float(pixel_distance(torch.randn(2, 5, 3, 3), teacher)) < 2


def test_the_teacher_stays_as_it_was_and_out_of_the_checkpoint() -> None:
    method = student()
    before = {name: value.clone() for name, value in method.teacher.network.state_dict().items()}
    trainer = Trainer(method)
    totals = [float(trainer.step(make_batch(2))) for _ in range(3)]
    assert totals[-1] < totals[0]
    assert not method.teacher.network.training
    after = method.teacher.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    ours = {value.data_ptr() for value in method.state_dict().values()}
    assert not ours & {value.data_ptr() for value in after.values()}


def test_without_any_weight_the_teacher_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    method = student(kd_weight=0.0, pixel_weight=0.0, sentence_weight=0.0)
    assert method.pixel_adapter is method.sentence_adapter is None

    def forbidden(*arguments: Any) -> None:
        raise AssertionError("asked for nothing")

    monkeypatch.setattr(method.teacher.network, "forward", forbidden)
    assert set(method(make_batch(2)).losses) == {"mask_bce", "mask_dice"}


@pytest.mark.parametrize(
    ("change", "message"), [({"vocabulary_size": 40}, "vocabulary_size 40 instead of 34"), ({"tokenizer": "clip"}, "tokenizer 'clip'")]
)  # fmt: skip
def test_a_teacher_of_other_words_is_refused(change: dict[str, Any], message: str) -> None:
    method = student()
    teacher = finished(build("latent_vg-none"), "latent_vg-none").teacher()
    assert type(method).teacher_refusal(teacher, TASK) is None
    teacher.network.task = replace(TASK, **change)
    assert message in str(type(method).teacher_refusal(teacher, TASK))
    with pytest.raises(ValueError, match="use the same data settings"):
        type(method)(method.settings, task=TASK, model=None, inputs={"teacher": teacher})


def test_a_classifier_is_no_teacher() -> None:
    classifier = Teacher(
        network=freeze(torch.nn.Linear(2, 2)), num_features=2, num_classes=2, key="0123456789"
    )
    reason = METHODS["shared_ris_kd"].teacher_refusal(classifier, TASK)
    assert reason is not None
    assert "01234567 is no grounder" in reason
