"""The command line: exit codes, and one clear message for everything that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import ABSENT, document, trial_of

from orchestrator.cli import main
from orchestrator.document import dump_document
from orchestrator.store import Store

COMMANDS = (
    "plan",
    "run",
    "results",
    "preflight",
    "submit",
    "status",
    "logs",
    "stop",
    "show",
    "export",
    "predict",
    "methods",
    "models",
    "doctor",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def experiment(tmp_path: Path, changes: dict[str, Any] | None = None) -> str:
    path = tmp_path / "experiment.yaml"
    path.write_text(dump_document(document({"run/storage": str(tmp_path / "store"), **(changes or {})})))
    return str(path)


def errors_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Messages on standard error. None spreads over several lines, none is a traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"stillhouse {command}" in capsys.readouterr().out


def test_help_lists_the_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "exit codes: 0 done, 1 some trials failed, 2 " in text


@pytest.mark.parametrize("arguments", [[], ["paln"], ["plan"], ["show"], ["plan", "a", "--fast"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: stillhouse" in capsys.readouterr().err


def test_plan_prints_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", experiment(tmp_path)]) == 0
    out = capsys.readouterr()
    assert "To run: 1 teacher stage, 10 views stages, 22 student stages." in out.out
    assert out.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


def test_overrides_change_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", experiment(tmp_path), "views.margin=0.3", "search.seeds=1"]) == 0
    assert "6 trials (1 x kd, 5 points)" in capsys.readouterr().out


WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    ({"serach": {}}, [], "serach: 'serach' is not a section; did you mean 'search'?"),
    ({"search/objective": []}, [], "search.objective: is missing"),
    ({"search": ABSENT}, [], "search.objective: is missing"),
    ({"stages": ABSENT, "baselines": ABSENT, "search/space": {}}, [], "stages: an experiment needs at least one stage"),
    ({}, ["margin"], "override 'margin': expected path=value"),
    ({}, ["viws.margin=1"], "override 'viws.margin=1': 'viws' is neither a section"),
    ({}, ["views.margin=1.5"], "stages.views.margin: margin must lie between 0 and 1"),
    ({}, ["run.storage=foo://x/y"], "cannot look for foo://x/y/"),
    ({}, ["run.storage="], "run.storage: expected str, got None"),
    ({"data": {"dataset": "cifar100", "root": "absent"}}, [], "data: data root absent does not exist"),
    ({"data": {"dataset": "parquet", "root": "."}}, [], "data: no file"),
    ({"data": {"dataset": "imagefolder", "root": "."}}, [], "data: . needs a folder train"),
    ({"stages/teacher/model": {"name": "tiny_cnn", "checkpoint": "absent.pt"}}, [], "model.checkpoint: 'absent.pt' cannot be read"),
    ({"search/space": {"views.dropout_low": {"grid": [0.1, 0.3]}, "views.dropout_high": {"grid": [0.35, 0.2]}}}, [],
     "point {'views.dropout_low': 0.3, 'views.dropout_high': 0.2}: stages.views: dropout must satisfy"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(("changes", "overrides", "expected"), WRONG)
def test_a_wrong_experiment_ends_with_its_mistakes(
    command: str, changes: dict[str, Any], overrides: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([command, experiment(tmp_path, changes), *overrides]) == 2
    errors = errors_of(capsys)
    assert any(error.startswith(expected) for error in errors), errors


def test_every_mistake_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"name": "a/b", "stages/views/num_branches": 0, "run/workers": 0}
    assert main(["plan", experiment(tmp_path, changes)]) == 2
    assert [error.partition(":")[0] for error in errors_of(capsys)] == [
        "name",
        "run.workers",
        "stages.views.num_branches",
    ]


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "a: !!python/object/apply:os.getcwd []", "a: 1\na: 2"])
def test_a_file_that_is_no_experiment(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert main(["plan", str(path)]) == 2
    assert f"error: {path}: " in capsys.readouterr().err


def test_an_absent_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "absent.yaml"]) == 2
    assert errors_of(capsys) == ["absent.yaml: no such experiment file"]


def test_half_a_parquet_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("train.parquet", "test.parquet"):
        pq.write_table(pa.table({"image": [b"x"] * 500, "label": [0] * 500}), tmp_path / name)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[: len(whole) // 2])
    path = experiment(tmp_path, {"data": {"dataset": "parquet", "root": str(tmp_path)}})
    assert main(["plan", path]) == 2
    (error,) = errors_of(capsys)
    assert error.startswith("data: ")
    assert "train.parquet" in error


@pytest.mark.parametrize("command", ["run", "results"])
def test_a_storage_that_cannot_be(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([command, experiment(tmp_path), f"run.storage={tmp_path}/file/below"]) == 2
    (error,) = errors_of(capsys)
    assert error.endswith("a part of the path is a file, not a folder: set run.storage to another place")


def test_an_unknown_tracking_scheme_stops_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", experiment(tmp_path), "run.tracking=foo://x"]) == 2
    (error,) = errors_of(capsys)
    assert error.startswith("tracking uri 'foo://x': MLflow does not know the scheme 'foo'")
    assert not (tmp_path / "store" / "artifacts").exists()


def test_results_of_a_sweep_that_never_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", experiment(tmp_path)]) == 0
    out = capsys.readouterr()
    assert out.out.count("waiting") == 11
    assert (tmp_path / "store" / "sweeps" / "angular-digits" / "report" / "report.md").exists()
    assert out.err == ""


def test_results_tell_of_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = experiment(tmp_path, {"search/space": {}, "baselines": {}})
    from orchestrator.api import Experiment

    trial = Experiment.load(path)._sweep.planner.trial(trial_of().point, 0)
    failure = {"name": "teacher", "kind": "DivergedError", "reason": "not finite", "run": "x"}
    Store(str(tmp_path / "store")).write_json(f"failures/{trial.stages[0].key}.json", failure)
    assert main(["results", path]) == 1
    assert "not finite" in capsys.readouterr().out


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sweeps").write_text("")
    assert main(["results", experiment(tmp_path)]) == 2
    (error,) = errors_of(capsys)
    assert error.startswith("the report cannot be written: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "abcd"], "--storage: 'runs' is not a folder"),
        (["export", "abcd"], "--storage: 'runs' is not a folder"),
        (["show", "abcd", "--storage", "."], "no artifact in"),
        (["show", "xyz", "--storage", "."], "the start of a key is lower-case hexadecimal, got 'xyz'"),
        (["methods", "kdd"], "'kdd' is not a method; did you mean 'kd'"),
        (
            ["status", "--address", "ray://127.0.0.1:1"],
            "--address: 'ray://127.0.0.1:1' is not the http address",
        ),
        (
            ["logs", "x", "--address", "http://127.0.0.1:1"],
            "submit: no Ray job endpoint takes us at http://127.0.0.1:1",
        ),
        (["models", "resnet9"], "'resnet9' is not a model; did you mean 'resnet"),
    ],
)
def test_what_does_not_exist_cannot_be_shown(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (error,) = errors_of(capsys)
    assert error.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["methods"], "angular_views"),
        (["methods", "kd"], "temperature = 4.0"),
        (["models", "resnet8"], "parameters"),
    ],
)
def test_listings(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert expected in capsys.readouterr().out


def test_an_interruption_has_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.describe.methods_text", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err.startswith("interrupted;")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m orchestrator.cli methods angular_views | head -n 1"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("angular_views\n", "", 0)
