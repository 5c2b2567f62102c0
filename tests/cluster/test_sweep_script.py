"""The script of ``cluster/``: what it checks, what it waits for, and where it finds experiments."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from orchestrator.document import read_document
from orchestrator.errors import ConfigurationError
from orchestrator.ray_nodes import num_promised_workers, wait_for_workers

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "cluster" / "sweep.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_carries_the_version_of_its_checkout(script: ModuleType) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == script.VERSION


@pytest.mark.parametrize("installed", ["0.0.9", None])
def test_another_version_is_refused(script: ModuleType, installed: str | None, monkeypatch, capsys) -> None:
    def version(name: str) -> str:
        assert name == "stillhouse"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(script, "version", version)
    assert script.main(["configs/angular_digits.yaml"]) == 2
    said = capsys.readouterr().err
    assert script.VERSION in said
    assert "ray up" in said
    assert installed is None or installed in said


def test_nothing_is_started_for_a_wrong_experiment(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: wrong\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--", str(wrong)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert list(tmp_path.iterdir()) == [wrong]


def test_shipped_experiments_are_found_where_only_the_package_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path("configs/angular_digits.yaml")
    assert read_document(shipped)["name"] == "angular-digits"
    (tmp_path / "configs").mkdir()
    shipped.write_text("name: mine\n")
    assert read_document(shipped) == {"name": "mine"}
    for absent in ("configs/none.yaml", "angular_digits.yaml", "other/angular_digits.yaml", "configs/../cluster/local.yaml"):  # fmt: skip
        with pytest.raises(ConfigurationError, match="no such experiment file"):
            read_document(Path(absent))


def test_promised_workers_are_those_of_the_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.yaml"
    assert num_promised_workers(path) == 0
    kinds = {"head": {"min_workers": 0}, "small": {"min_workers": 2}, "large": {"min_workers": 1}, "rare": {}}
    path.write_text(json.dumps({"available_node_types": kinds}))
    assert num_promised_workers(path) == 3


@pytest.mark.parametrize(
    ("counts", "num_workers", "there", "said"),
    [
        ([1], 0, True, []),
        ([3], 2, True, []),
        ([1, 2, 3], 2, True, ["waiting for 2 of 2", "2 worker nodes are there"]),
        ([2, 2, 2], 2, False, ["waiting for 1 of 2", "warning: 1 of 2 worker nodes did not join"]),
    ],
)
def test_waiting_ends_with_the_nodes_or_the_deadline(counts, num_workers, there, said, capsys) -> None:
    left = list(counts)
    joined = wait_for_workers(
        num_workers, 0.2 if not there else 5.0, lambda: left.pop(0) if len(left) > 1 else left[0]
    )
    assert joined is there
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
