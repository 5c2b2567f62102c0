"""Stages that refer to one another, and baselines that take the place of some of them."""

from __future__ import annotations

import pytest
from experiment_cases import document, problems_of, spec_of

from methods import BUILTIN
from methods.base import ModelSettings
from orchestrator.chain import resolve_chain, with_baseline
from orchestrator.errors import ConfigurationError
from orchestrator.settings import Problems


def test_a_chain_has_inputs_before_users_and_the_target_last() -> None:
    chain = spec_of().chain(None, {})
    assert list(chain) == ["teacher", "views", "student"]
    assert chain["student"].inputs == {"teacher": "views"}
    assert chain["views"].model is None
    assert chain["student"].model == ModelSettings(name="mini_cnn")
    assert [stage.seed for stage in chain.values()] == [0, 0, "trial"]


def test_only_what_leads_to_the_target_is_in_the_chain() -> None:
    assert list(spec_of().chain("kd", {})) == ["teacher", "student"]


def test_defaults_of_the_method_lie_below_the_settings_of_the_stage() -> None:
    train = spec_of({"stages/views/train": {"epochs": 7}}).chain(None, {})["views"].train
    assert (train.epochs, train.learning_rate) == (7, 0.1)


@pytest.mark.parametrize(
    ("values", "stage", "attribute", "expected"),
    [
        ({"views.margin": 0.3}, "views", "settings.margin", 0.3),
        ({"student.train.learning_rate": 1}, "student", "train.learning_rate", 1.0),
        ({"student.train.learning_rate": 1}, "student", "train.epochs", 20),
        ({"student.model": "resnet8"}, "student", "model.name", "resnet8"),
        ({"student.model.name": "resnet8"}, "student", "model.name", "resnet8"),
        ({"student.seed": 4}, "student", "seed", 4),
        ({"student.method": "kd"}, "student", "settings.temperature", 4.0),
        (
            {"student.method": "kd", "student.teacher": "$teacher"},
            "student",
            "inputs",
            {"teacher": "teacher"},
        ),
    ],
)
def test_values_are_laid_over_stages(
    values: dict[str, object], stage: str, attribute: str, expected: object
) -> None:
    found: object = spec_of().chain(None, values)[stage]
    for part in attribute.split("."):
        found = getattr(found, part)
    assert found == expected


def test_values_leave_the_experiment_as_it_was() -> None:
    spec = spec_of()
    spec.chain(None, {"student.train.epochs": 1, "student.model.name": "resnet8"})
    assert spec.stages == document()["stages"]


@pytest.mark.parametrize("empty", [None, {}])
def test_a_value_below_an_empty_mapping(empty: object) -> None:
    changes = {"stages/student/train": empty, "search/space": {"student.train.epochs": {"grid": [1, 2]}}}
    chain = spec_of(changes).chain(None, {"student.train.epochs": 2})
    assert chain["student"].train.epochs == 2


def test_a_baseline_inherits_model_train_and_seed_and_nothing_else() -> None:
    changes = {"stages/student/seed": 5, "stages/student/kd_weight": 0.7}
    student = spec_of(changes).chain("kd", {})["student"]
    assert student.model == ModelSettings(name="mini_cnn")
    assert (student.train.epochs, student.seed, student.settings.kd_weight) == (20, 5, 0.9)


def test_a_baseline_may_name_its_own_recipe() -> None:
    changes = {
        "baselines/kd/student": {
            "method": "kd",
            "teacher": "$teacher",
            "model": "resnet8",
            "train": {"epochs": 3},
        }
    }
    student = spec_of(changes).chain("kd", {})["student"]
    assert (student.model, student.train.epochs) == (ModelSettings(name="resnet8"), 3)


def test_a_baseline_without_a_method_keeps_ours() -> None:
    changes = {"baselines/loose": {"views": {"margin": 0.4}}, "stages/views/num_branches": 7}
    chain = spec_of(changes).chain("loose", {})
    assert (chain["views"].method, chain["views"].settings.margin) == ("angular_views", 0.4)
    assert chain["views"].train.epochs == 6
    assert chain["views"].settings.num_branches == 7
    assert chain["views"].inputs == {"teacher": "teacher"}


def test_a_baseline_keeps_the_preset_with_the_method() -> None:
    """In a grounder's preset is the size of its network: without it, the baseline would be another one by accident."""
    stages = {"grounder": {"method": "latent_vg", "preset": "latent_vg_small", "train": {"epochs": 4}}}
    same = with_baseline(stages, {"grounder": {"attribute_lengths": []}})["grounder"]
    assert same == {**stages["grounder"], "attribute_lengths": []}
    other = with_baseline(stages, {"grounder": {"method": "shared_ris"}})["grounder"]
    assert other == {"method": "shared_ris", "train": {"epochs": 4}}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["student"], ["teacher", "views", "student"]),
        (["assistant", "student"], ["teacher", "views", "assistant", "student"]),
        (
            ["teacher", "assistant", "second", "student"],
            ["teacher", "views", "assistant", "second", "student"],
        ),
        (["large", "teacher"], ["large", "teacher", "views", "student"]),
        (["student", "after"], ["teacher", "views", "student", "after"]),
    ],
)
def test_added_stages_stand_before_those_that_follow_them(names: list[str], expected: list[str]) -> None:
    replaced = {name: {"method": "supervised"} for name in names}
    assert list(with_baseline(document()["stages"], replaced)) == expected


def test_a_baseline_may_add_a_stage_that_learns_from_ours() -> None:
    kd = {"method": "kd", "model": "mini_cnn"}
    changes = {
        "baselines/assistant": {
            "assistant": {**kd, "teacher": "$teacher"},
            "student": {**kd, "teacher": "$assistant"},
        }
    }
    assert problems_of(changes) == []
    assert list(spec_of(changes).chain("assistant", {})) == ["teacher", "assistant", "student"]


def test_an_impossible_combination_is_refused_by_the_chain() -> None:
    with pytest.raises(ConfigurationError, match=r"stages\.views: dropout must satisfy .* dropout_low=0\.5"):
        spec_of().chain(None, {"views.dropout_low": 0.5})


def test_a_broken_stage_does_not_break_its_users() -> None:
    stages = document({"stages/teacher/model": "resnet7"})["stages"]
    problems = Problems()
    resolve_chain(stages, {}, "student", BUILTIN, problems)
    assert len(problems) == 1


SECOND = {"method": "supervised", "model": "tiny_cnn"}


def several(references: object, **student: object) -> dict[str, object]:
    """Changes that give the student these references, and the stages that they name."""
    own = document()["stages"]
    stages = {"teacher": own["teacher"], "second": SECOND, "views": own["views"]}
    named = {
        name: stage for name, stage in stages.items() if name == "teacher" or f"${name}" in str(references)
    }
    changed = {"method": "kd", "model": "mini_cnn", "teacher": references, **student}
    return {"stages": {**named, "student": changed}, "search/space": {}}


def test_a_list_of_references_becomes_numbered_roles() -> None:
    chain = spec_of(several(["$teacher", "$second"])).chain(None, {})
    assert chain["student"].inputs == {"teacher.0": "teacher", "teacher.1": "second"}
    assert list(chain) == ["teacher", "second", "student"]
    assert chain["student"].inactive >= {"view_weight", "heads", "detach_target"}


def test_a_list_of_one_is_what_it_holds() -> None:
    chain = spec_of(several(["$teacher"])).chain(None, {})
    assert chain["student"].inputs == {"teacher": "teacher"}


@pytest.mark.parametrize(
    ("references", "student", "problem"),
    [
        (["$teacher", "$teacher"], {}, "expected different earlier stages"),
        ([], {}, "expected different earlier stages"),
        (["$teacher", "$none"], {}, "stages.student.teacher.1: $none is not a stage"),
        (["$teacher", "$student"], {}, "makes a cycle: student needs itself"),
        (["$teacher", "$views"], {}, "several teachers must be plain networks, but views emits views"),
        (["$views", "$second"], {"method": "angular_kd"}, "AngularDistillation takes one stage here"),
        ("$teacher", {"preset": "resnet20"}, "'resnet20' is not a preset of KnowledgeDistillation"),
        ("$teacher", {"method": "dkd", "preset": "vgg13-vgg9"}, "did you mean 'vgg13-vgg8'?"),
    ],
)
def test_what_cannot_be_combined_is_found_before_anything_starts(
    references: object, student: dict[str, object], problem: str
) -> None:
    problems = problems_of(several(references, **student))
    assert any(problem in line for line in problems), problems


def test_a_preset_lies_below_the_settings_of_the_stage_and_leaves_no_name() -> None:
    preset = {"method": "dkd", "preset": "imagenet-resnet34-resnet18", "temperature": 3.0}
    chain = spec_of(several("$teacher", **preset)).chain(None, {})
    settings = chain["student"].settings
    assert (settings.temperature, settings.other_classes_weight, settings.warmup_epochs) == (3.0, 0.5, 1)


def test_a_stage_that_trains_nothing_takes_no_epochs() -> None:
    tekap = {"method": "tekap", "teacher": "$teacher"}
    changes = {"stages/views": tekap, "stages/student/method": "kd", "search/space": {}}
    assert problems_of(changes) == []
    assert spec_of(changes).chain(None, {})["views"].train.epochs == 0
    (problem,) = problems_of({**changes, "stages/views/train": {"epochs": 3}})
    assert "Tekap trains nothing; leave train out" in problem
