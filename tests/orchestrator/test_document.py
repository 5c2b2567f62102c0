"""Experiment files as plain data, and overrides laid over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment_cases import document

from orchestrator.document import apply_overrides, dump_document, read_document
from orchestrator.errors import ConfigurationError


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "'name' stands twice"),
        ("stages:\n  t: {a: 1, a: 2}\n", "'a' stands twice"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: !!python/object:pathlib.Path {}", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !own 1", "could not determine a constructor"),
        ("a: {b: 1", "not valid YAML"),
        ("a: *unknown", "undefined alias"),
        ("a: &a {b: *a}", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("a: !!float x", "not valid YAML"),
        ("a: " + "[" * 1500, "not valid YAML"),
        ("? [1, 2]\n: x", "cannot be a key"),
        ("? ~\n: x", "cannot be a key"),
        (
            "[1, 2]",
            "expected a mapping with name, data, stages, baselines, controls, search, run, got [1, 2]",
        ),
        ("", "expected a mapping"),
        (b"\xff\xfe\x00a", "cannot be read"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as refused:
        read_document(path)
    (problem,) = refused.value.problems
    assert problem.startswith(f"{path}: ")
    assert expected in problem


def test_yaml_mistakes_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="line 3"):
        read_document(write(tmp_path, "name: a\ndata: {}\nname: b\n"))


@pytest.mark.parametrize(
    ("name", "expected"), [("absent.yaml", "no such experiment file"), (".", "cannot be read")]
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        read_document(tmp_path / name)


def test_merge_keys_may_be_overlaid(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: {<<: [*a, *b]}\n"
    read = read_document(write(tmp_path, text))
    assert read == {
        "a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}, "d": {"x": 1, "y": 2},
    }  # fmt: skip


def test_dumped_documents_read_the_same(tmp_path: Path) -> None:
    assert read_document(write(tmp_path, dump_document(document()))) == document()


def get(mapping: Any, path: str) -> Any:
    for part in path.split("/"):
        mapping = mapping[part]
    return mapping


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("search.seeds=3", "search/seeds", 3),
        ("student.train.epochs=60", "stages/student/train/epochs", 60),
        ("stages.student.train.epochs=60", "stages/student/train/epochs", 60),
        ("student.train.learning_rate=1e-3", "stages/student/train/learning_rate", 0.001),
        ("data.augment={pad: 2}", "data/augment", {"pad": 2}),
        ("run.tracking=sqlite:///a=b.db", "run/tracking", "sqlite:///a=b.db"),
        ("student.model.name=resnet8", "stages/student/model", {"name": "resnet8"}),
        ("student.model.checkpoint=a.pt", "stages/student/model", {"name": "mini_cnn", "checkpoint": "a.pt"}),
        ("student.kd_weight=", "stages/student/kd_weight", None),
        ("search.space.views.margin={grid: [0.3]}", "search/space/views.margin", {"grid": [0.3]}),
        ("search.scheduler.name=asha", "search/scheduler", {"name": "asha"}),
        ("search.confirm.top=2", "search/confirm", {"top": 2}),
        ("baselines.kd.student.kd_weight=1", "baselines/kd/student/kd_weight", 1),
        ("name=other", "name", "other"),
    ],
)
def test_overrides_are_laid_over(override: str, path: str, expected: object) -> None:
    before = document({"search/scheduler": "none"})
    changed = apply_overrides(before, [override])
    assert get(changed, path) == expected
    assert before == document({"search/scheduler": "none"})


@pytest.mark.parametrize(
    ("override", "left"),
    [
        ("views.margin=0.3", ["views.num_branches", "student.model.name", "teacher.model"]),
        ("stages.views.margin=0.3", ["views.num_branches", "student.model.name", "teacher.model"]),
        ("student.model=resnet8", ["views.margin", "views.num_branches", "teacher.model"]),
        ("teacher.model.name=resnet8", ["views.margin", "views.num_branches", "student.model.name"]),
        ("teacher.model.checkpoint=a.pt", ["views.margin", "views.num_branches", "student.model.name", "teacher.model"]),
        ("views.train.epochs=3", ["views.margin", "views.num_branches", "student.model.name", "teacher.model"]),
    ],
)  # fmt: skip
def test_a_fixed_setting_leaves_the_space(override: str, left: list[str]) -> None:
    names = ["views.margin", "views.num_branches", "student.model.name", "teacher.model"]
    swept = document({"search/space": {name: {"grid": [1]} for name in names}})
    assert sorted(apply_overrides(swept, [override])["search"]["space"]) == sorted(left)


def test_all_wrong_overrides_are_told() -> None:
    wrong = [
        "margin",
        "=3",
        "viws.margin=1",
        "data.dataset.x=1",
        "views.margin=[",
        "views.margin=!!python/name:os.system",
    ]
    with pytest.raises(ConfigurationError) as refused:
        apply_overrides(document(), wrong)
    expected = [
        "expected path=value", "expected path=value", "'viws' is neither a section", "data.dataset is 'digits', which has no settings",
        "the value is not valid YAML", "the value is not valid YAML",
    ]  # fmt: skip
    for override, text, problem in zip(wrong, expected, refused.value.problems, strict=True):
        assert problem.startswith(f"override {override!r}: ")
        assert text in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 0.001),
        ("-2E5", -2e5),
        ("+1.e3", 1000.0),
        ("1.5e-3", 0.0015),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1e3x", "1e3x"),
        ("'1e3'", "1e3"),
    ],
)
def test_exponents_are_numbers(tmp_path: Path, text: str, expected: object) -> None:
    read = read_document(write(tmp_path, f"a: {{grid: [{text}]}}"))
    assert read == {"a": {"grid": [expected]}}


def test_own_yaml_is_plain_yaml(tmp_path: Path) -> None:
    text = "a: 0x10\nb: yes\nc: 1.5\nd: [1, two]\ne: ~\n"
    assert read_document(write(tmp_path, text)) == yaml.safe_load(text)
