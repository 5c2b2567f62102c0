"""Models that the mirror hands to MLflow load back through MLflow's own loader."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tracking_doubles import (
    assert_predicts,
    bundle,
    send,
)

from methods import BUILTIN
from orchestrator.errors import ConfigurationError
from orchestrator.journal import Journal
from orchestrator.serving import load_bundle
from orchestrator.tracking_state import state_path


def test_a_model_is_logged_once_and_loads_back(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "j.jsonl"
    folder, network = bundle(tmp_path / "best")
    for _ in range(2):
        journal = Journal(path)
        journal.run("trial", name="t", parent=None, kind="trial")
        journal.params("trial", {"margin": 0.2})
        journal.model("trial", folder)
        mirror = send(path, uri)
        state_path(path).unlink()
    assert_predicts(uri, mirror, "trial", network)
    files = sorted(file.suffix for file in (tmp_path / "mlflow-artifacts").rglob("*") if file.is_file())
    assert files.count(".safetensors") == 1
    assert not {".pkl", ".pt", ".pth"} & set(files)


def test_a_bundle_that_was_replaced_is_not_logged_for_the_wrong_trial(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = bundle(tmp_path / "best")
    journal = Journal(tmp_path / "j.jsonl")
    journal.run("trial", name="t", parent=None, kind="trial")
    journal.model("trial", folder)
    bundle(tmp_path / "best", key="k2")
    with caplog.at_level(logging.WARNING):
        mirror = send(journal.path, uri)
    assert mirror.num_rejected == 1
    assert "k2" in caplog.text


@pytest.mark.parametrize(("spoil", "text"), [
    (lambda folder: bundle(folder, name="my_net"), r"'my_net', which is not built in.*BUILTIN.extended"),
    (lambda folder: (folder / "model.json").write_text("{}"), r"model.json cannot be read"),
    (lambda folder: (folder / "weights.safetensors").write_bytes(b"x" * 40), r"weights.safetensors"),
    (lambda folder: (folder / "weights.safetensors").unlink(), r"weights.safetensors"),
])  # fmt: skip
def test_a_bundle_that_cannot_be_loaded_says_why(tmp_path: Path, spoil: Any, text: str) -> None:
    folder, _ = bundle(tmp_path / "best")
    spoil(folder)
    with pytest.raises(ConfigurationError, match=text):
        load_bundle(folder, BUILTIN)
