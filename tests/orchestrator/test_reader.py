"""Wrong experiment files: every mistake at once, each with its path, its value and the nearest valid name."""

from __future__ import annotations

from typing import Any

import pytest
from experiment_cases import ABSENT, document, problems_of, spec_of

from methods import BUILTIN
from orchestrator.errors import ConfigurationError
from orchestrator.reader import parse_experiment

MANY = {"a": {"method": "kd", "model": "mini_cnn", "teacher": "$c"}, "b": {"method": "kd", "model": "mini_cnn", "teacher": "$a"}, "c": {"method": "kd", "model": "mini_cnn", "teacher": "$b"}}  # fmt: skip
PLAIN_SEARCH = {"objective": {"maximize": "c.top1"}}
NO_CHOICE = {"search/space": {}, "baselines": {}}

CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("section", {"serach": {}}, ["serach: 'serach' is not a section; did you mean 'search'? Known: baselines, controls, data"]),
    ("method", {"stages/teacher/method": "supervisd"}, ["stages.teacher.method: 'supervisd' is not a method; did you mean 'supervised'?"]),
    ("no method", {"stages/teacher/method": ABSENT}, ["stages.teacher.method: expected the name of a method, got None. Known: angular_kd"]),
    ("setting", {"stages/views/margn": 1}, ["stages.views.margn: 'margn' is not a setting of AngularViewsSettings; did you mean 'margin'?"]),
    ("train setting", {"stages/student/train": {"epoch": 1}}, ["stages.student.train.epoch: 'epoch' is not a setting of TrainSettings; did you mean 'epochs'?"]),
    ("train type", {"stages/student/train": 3}, ["stages.student.train: expected a mapping, got 3"]),
    ("train value", {"stages/student/train": {"epochs": -1}}, ["stages.student.train.epochs: epochs must be at least 0, got -1"]),
    ("train objective", {"baselines": {}, "stages/student/train": {"keep": "best", "objective": "tpo1"}}, ["stages.student.train.objective: AngularDistillation reports no 'tpo1'; did you mean 'top1'?"]),
    ("branches", {"stages/views/num_branches": -1}, ["stages.views.num_branches: num_branches must be at least 1, got -1"]),
    ("margin", {"stages/views/margin": 1.5}, ["stages.views.margin: margin must lie between 0 and 1 (1 - cosine), got 1.5"]),
    ("wrong type", {"stages/views/num_branches": "many"}, ["stages.views.num_branches: expected int, got 'many'"]),
    ("model", {"stages/student/model": "resnet23"}, ["stages.student.model: 'resnet23' is not a model; did you mean 'resnet32' or 'resnet20'"]),
    ("no model", {"stages/student/model": ABSENT}, ["stages.student.model: is missing: name the network"]),
    ("model for views", {"stages/views/model": "resnet8"}, ["stages.views.model: AngularViews trains no model of its own; remove 'resnet8'"]),
    ("pretrained", {"stages/student/model": {"name": "resnet8", "pretrained": True}}, ["stages.student.model.pretrained: pretrained weights exist only for timm/NAME models, not for 'resnet8'"]),
    ("model setting", {"stages/student/model": {"name": "resnet8", "pretraind": True}}, ["stages.student.model.pretraind: 'pretraind' is not a setting of ModelSettings; did you mean 'pretrained'?"]),
    ("seed", {"stages/student/seed": -1}, ["stages.student.seed: expected 'trial' or a whole number from 0, got -1"]),
    ("role", {"stages/teacher/teacher": "x"}, ["stages.teacher.teacher: 'teacher' is not a setting of SupervisedSettings"]),
    ("no reference", {"stages/student/teacher": "views"}, ["stages.student.teacher: expected a reference to an earlier stage, for instance $teacher; got 'views'"]),
    ("unknown reference", {"stages/student/teacher": "$viws"}, ["stages.student.teacher: $viws is not a stage; did you mean 'views'?"]),
    ("no views", {"stages/student/teacher": "$teacher"}, ["stages.student.teacher: $teacher (supervised) emits no views; stages that do: views"]),
    ("cycle of itself", {"stages/views/teacher": "$views"}, ["stages.views.teacher: $views makes a cycle: views needs itself"]),
    ("cycle of three", {"stages": MANY, "search": PLAIN_SEARCH, "baselines": {}}, [
        "stages.a.teacher: $c makes a cycle: a needs c, and c needs a", "stages.b.teacher: $a makes a cycle", "stages.c.teacher: $b makes a cycle"]),
    ("unused", {"stages/other": {"method": "supervised", "model": "resnet8"}}, ["stages.other: nothing leads from this stage to the objective's stage 'student'"]),
    ("stage name", {"stages/Other": {"method": "supervised", "model": "resnet8"}}, ["stages.Other: a stage name is lower-case letters"]),
    ("section as stage", {"stages/data": {"method": "supervised", "model": "resnet8"}}, ["stages.data: a stage name is"]),
    ("stage type", {"stages/views": [1]}, ["stages.views: expected a mapping, got [1]", "stages.views.method: expected the name of a method, got None"]),
    ("no stages", {"stages": {}, "baselines": {}, "search/space": {}}, ["stages: an experiment needs at least one stage", "search.objective: 'student.top1' names no stage"]),
    ("stages type", {"stages": [1], "baselines": {}, "search/space": {}}, ["stages: expected a mapping, got [1]", "stages: an experiment", "search.objective"]),
    ("name", {"name": "../x"}, ["name: expected letters, digits, '.', '_' or '-' (at most 100), got '../x'"]),
    ("dotted name", {"name": ".."}, ["name: expected letters"]),
    ("long name", {"name": "x" * 101}, ["name: expected letters"]),
    ("name with a line", {"name": "a\n"}, ["name: expected letters"]),
    ("no name", {"name": ABSENT}, ["name: expected letters, digits, '.', '_' or '-' (at most 100), got None"]),
    ("data set", {"data/dataset": "digit"}, ["data.dataset: 'digit' is not a data set; did you mean 'digits'"]),
    ("no data set", {"data": ABSENT}, ["data.dataset: expected the name of a data set, got None. Known: cifar10"]),
    ("data setting", {"data/test_fracton": 0.2}, ["data.test_fracton: 'test_fracton' is not a setting of data set 'digits'; did you mean 'test_fraction'?"]),
    ("data value", {"data/test_fraction": 1.2}, ["data.test_fraction: test_fraction must lie between 0 and 1, got 1.2"]),
    ("root", {"data": {"dataset": "cifar100"}}, ["data.root: is required by Cifar100 and missing"]),
    ("validation", {"data/validation": 1.0}, ["data.validation: validation must be a fraction in [0, 1), got 1.0"]),
    ("augment", {"data/augment": {"pda": 1}}, ["data.augment.pda: 'pda' is not a setting of Augment; did you mean 'pad'?"]),
    ("validation and space", {"data/validation": 0}, ["data.validation: is 0, but this experiment makes choices"]),
    ("validation and best", {**NO_CHOICE, "data/validation": 0, "stages/teacher/train": {"keep": "best"}}, ["data.validation: is 0"]),
    ("validation and best in a baseline", {"search/space": {}, "data/validation": 0, "baselines/kd/student/train": {"keep": "best"}}, ["data.validation: is 0"]),
    ("validation and scheduler", {**NO_CHOICE, "data/validation": 0, "search/scheduler": "asha"}, ["data.validation: is 0"]),
    ("no search", {"search": ABSENT}, ["search.objective: is missing; for instance objective: {maximize: student.top1}"]),
    ("objective stage", {"search/objective": {"maximize": "studnt.top1"}}, ["search.objective: 'studnt.top1' names no stage of this experiment; did you mean 'student'?"]),
    ("objective metric", {"search/objective": {"maximize": "student.tpo1"}}, ["search.objective: stage 'student' reports no 'tpo1'; did you mean 'top1'?"]),
    ("test objective", {"search/objective": {"maximize": "student.test_top1"}}, ["search.objective: 'student.test_top1' reads the test set; choices read the validation split: use student.top1"]),
    ("objective form", {"search/objective": "student.top1"}, ["search.objective: expected {maximize: STAGE.METRIC} or {minimize: ...}, got 'student.top1'"]),
    ("objective direction", {"search/objective": {"maximise": "student.top1"}}, ["search.objective: expected {maximize: STAGE.METRIC}"]),
    ("empty objective", {"search/objective": []}, ["search.objective: is missing"]),
    ("three objectives", {"search/objective": [{"maximize": "student.top1"}, {"maximize": "student.top5"}, {"minimize": "student.loss"}]}, ["search.objective: at most two objectives"]),
    ("two stages", {"search/objective": [{"maximize": "student.top1"}, {"minimize": "teacher.loss"}]}, ["search.objective: at most two objectives, both of the same stage"]),
    ("twice", {"search/objective": [{"maximize": "student.top1"}, {"minimize": "student.top1"}]}, ["search: objective names 'student.top1' twice"]),
    ("shown on test", {"search/shown": ["test_top1"]}, ["search.shown: shown names metrics as validation has them, without stage or test_, got test_top1"]),
    ("two and asha", {"search/objective": [{"maximize": "student.top1"}, {"minimize": "student.loss"}], "search/scheduler": "asha"}, ["search.scheduler: scheduler 'asha' needs a single objective"]),
    ("empty grid", {"search/space": {"views.margin": {"grid": []}}}, ["search.space.views.margin: grid is empty: list at least one value"]),
    ("bad domain", {"search/space": {"views.margin": {"gird": [0.1]}}}, ["search.space.views.margin: 'gird' is not a kind of domain; did you mean 'grid'?"]),
    ("no domain", {"search/space": {"views.margin": [0.1, 0.2]}}, ["search.space.views.margin: expected one of grid: [...], choice: [...]"]),
    ("no list", {"search/space": {"views.margin": {"grid": 0.1}}}, ["search.space.views.margin: grid needs a list, got 0.1"]),
    ("range", {"search/space": {"views.margin": {"uniform": [0.1, 0.2]}}}, ["search.algorithm: grid cannot draw from views.margin; use {grid: [...]} there, or algorithm: random or optuna"]),
    ("reversed", {"search/space": {"views.margin": {"uniform": [0.2, 0.1]}}}, ["search.space.views.margin: uniform needs finite numbers with low < high, got [0.2, 0.1]"]),
    ("log of 0", {"search/space": {"views.margin": {"loguniform": [0, 0.1]}}}, ["search.space.views.margin: loguniform needs 0 < low, got [0, 0.1]"]),
    ("three ends", {"search/space": {"views.margin": {"uniform": [0, 1, 2]}}}, ["search.space.views.margin: uniform needs two numbers [low, high], got [0, 1, 2]"]),
    ("fraction", {"search/space": {"views.num_branches": {"randint": [1.5, 3]}}}, ["search.space.views.num_branches: randint needs whole numbers, got [1.5, 3]"]),
    ("space stage", {"search/space": {"viws.margin": {"grid": [0.1]}}}, ["search.space.viws.margin: expected STAGE.SETTING with a stage of this experiment; stages: teacher, views, student"]),
    ("space setting", {"search/space": {"views.margn": {"grid": [0.1, 0.2, 0.3]}}}, ["search.space.views.margn = 0.1: stages.views.margn: 'margn' is not a setting"]),
    ("space values", {"search/space": {"views.margin": {"grid": [0.1, 1.1, 1.2]}}}, ["search.space.views.margin = 1.1: stages.views.margin: margin must", "search.space.views.margin = 1.2: stages.views.margin: margin must"]),
    ("ends of a range", {"search/space": {"views.margin": {"uniform": [0.1, 1.1]}}, "search/algorithm": "random"}, ["search.space.views.margin = 1.1: stages.views.margin: margin must"]),
    ("swept model", {"search/space": {"student.model": {"grid": ["resnet8", "resnet9"]}}}, ["search.space.student.model = 'resnet9': stages.student.model: 'resnet9' is not a model"]),
    ("below nothing", {"search/space": {"student.train.epochs": {"grid": [1]}}, "stages/student/train": 3}, ["stages.student.train: expected a mapping, got 3"]),
    ("search setting", {"search/num_sample": 3}, ["search.num_sample: 'num_sample' is not a setting of search; did you mean 'num_samples'?"]),
    ("algorithm", {"search/algorithm": "tpe"}, ["search.algorithm: got 'tpe', expected one of grid, random, optuna"]),
    ("ahead", {"search/num_ahead": 0}, ["search.num_ahead: num_ahead must be at least 1, got 0"]),
    ("seeds", {"search/seeds": 0}, ["search.seeds: seeds must be at least 1, got 0"]),
    ("scheduler", {"search/scheduler": "pbt"}, ["search.scheduler.name: got 'pbt', expected one of none, asha, median"]),
    ("scheduler setting", {"search/scheduler": {"name": "asha", "grace": 1}}, ["search.scheduler.grace: 'grace' is not a setting of SchedulerSettings"]),
    ("confirm", {"search/confirm": {"top": -1}}, ["search.confirm.top: top must be at least 0"]),
    ("run setting", {"run/worker": 2}, ["run.worker: 'worker' is not a setting of RunSettings; did you mean 'workers'?"]),
    ("run value", {"run/gpus_per_worker": -1}, ["run.gpus_per_worker: gpus_per_worker must be finite and not negative, got -1.0"]),
    ("run type", {"run": []}, ["run: expected a mapping, got []"]),
    ("lease", {"run/lease_seconds": float("inf")}, ["run.lease_seconds: lease_seconds must be finite and at least 1, got inf"]),
    ("baseline setting", {"baselines/kd/student/kd_weigth": 1}, ["baselines.kd.student.kd_weigth: 'kd_weigth' is not a setting of KnowledgeDistillationSettings; did you mean 'kd_weight'?"]),
    ("baseline method", {"baselines/kd/student/method": "angular-kd"}, ["baselines.kd.student.method: 'angular-kd' is not a method; did you mean 'angular_kd'"]),
    ("baseline teacher", {"baselines/kd/student/teacher": "$techer"}, ["baselines.kd.student.teacher: $techer is not a stage; did you mean 'teacher'?"]),
    ("baseline stage", {"baselines/kd": {"studnet": {"method": "kd", "model": "resnet8", "teacher": "$teacher"}}}, ["baselines.kd.studnet: nothing leads from this stage to the objective's stage 'student'; did you mean 'student'?"]),
    ("baseline type", {"baselines": {"kd": 3}}, ["baselines.kd: expected a mapping, got 3"]),
    ("baseline label", {"baselines/point": {"student": {"method": "supervised"}}}, ["baselines.point: a baseline's name is letters, digits"]),
    ("baseline path", {"baselines/..": {"student": {"method": "supervised"}}}, ["baselines...: a baseline's name is letters, digits"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_mistake_is_named_with_path_value_and_nearest(changes: dict[str, Any], expected: list[str]) -> None:
    problems = problems_of(changes)
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)


def test_the_unchanged_document_is_right() -> None:
    assert problems_of({}) == []


def test_views_before_they_exist() -> None:
    stages = document()["stages"]
    reordered = {name: stages[name] for name in ("teacher", "student", "views")}
    (problem,) = problems_of({"stages": reordered})
    assert (
        problem
        == "stages.student.teacher: $views does not exist yet: stage 'views' stands below 'student'; move it above"
    )


def test_a_cycle_of_two() -> None:
    stages = {
        "a": {"method": "kd", "model": "mini_cnn", "teacher": "$b"},
        "b": {"method": "kd", "model": "mini_cnn", "teacher": "$a"},
    }
    search = {"objective": {"maximize": "b.top1"}}
    assert problems_of({"stages": stages, "search": search, "baselines": {}}) == [
        "stages.a.teacher: $b makes a cycle: a needs b, and b needs a",
        "stages.b.teacher: $a makes a cycle: b needs a, and a needs b",
    ]


def test_every_mistake_is_told_in_one_go() -> None:
    changes = {
        "serach": {}, "name": "a/b", "data/validaton": 0.1, "stages/teacher/train": {"epochs": -3},
        "stages/views/num_branches": 0, "baselines/kd/student/temperature": 0, "search/seeds": 0, "run/workers": 0,
        "search/space": {"views.margin": {"grid": []}},
    }  # fmt: skip
    paths = [problem.partition(":")[0] for problem in problems_of(changes)]
    assert paths[:6] == [
        "serach",
        "name",
        "data.validaton",
        "search.space.views.margin",
        "search.seeds",
        "run.workers",
    ]


def test_mistakes_of_stages_and_baselines_come_together() -> None:
    changes = {
        "stages/teacher/train": {"epochs": -3}, "stages/views/num_branches": 0,
        "baselines/kd/student/temperature": 0, "baselines/sup": {"student": {"method": "supervised", "label_smoothing": 1}},
    }  # fmt: skip
    assert [problem.partition(":")[0] for problem in problems_of(changes)] == [
        "stages.teacher.train.epochs", "stages.views.num_branches",
        "baselines.kd.student.temperature", "baselines.sup.student.label_smoothing",
    ]  # fmt: skip


def test_a_mistake_of_the_experiment_is_not_repeated_for_its_baselines() -> None:
    assert len(problems_of({"stages/teacher/model": "resnet7"})) == 1


def test_validation_may_be_zero_where_nothing_is_chosen() -> None:
    assert spec_of({**NO_CHOICE, "data/validation": 0}).data.validation == 0.0


def test_a_stage_that_only_a_baseline_uses_is_used() -> None:
    changes = {
        "stages": {
            "other": {"method": "supervised", "model": "resnet8"}, **document()["stages"],
        },
        "baselines/kd/student/teacher": "$other",
    }  # fmt: skip
    assert problems_of(changes) == []


def test_python_values_are_accepted_like_yaml() -> None:
    from orchestrator.space import grid

    spec = parse_experiment(document({"search/space": {"views.margin": grid([0.1, 0.2])}}), BUILTIN)
    assert spec.search.space["views.margin"].values == (0.1, 0.2)
    assert spec.target == "student"


def test_the_error_carries_each_problem() -> None:
    import pickle

    error = ConfigurationError("a: b", "c: d")
    assert str(error) == "a: b\nc: d"
    assert pickle.loads(pickle.dumps(error)).problems == ("a: b", "c: d")


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    from orchestrator.api import Experiment
    from orchestrator.document import dump_document
    from orchestrator.space import grid

    sections = document({"search/space": {"views.margin": grid(np.linspace(0.1, 0.3, 3)), "views.num_branches": grid(np.arange(1, 3))}})  # fmt: skip
    sections["stages"]["views"]["margin"] = np.float32(0.25)
    experiment = Experiment(**sections)
    assert experiment.document["search"]["space"]["views.num_branches"] == {"grid": [1, 2]}
    assert experiment.document["stages"]["views"]["margin"] == 0.25
    assert "numpy" not in dump_document(experiment.document)
