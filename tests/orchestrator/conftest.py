"""What takes seconds to make and several modules only read: made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from grounding_artifact import StoredTrial, stored

from orchestrator.journal import Journal
from orchestrator.tracking import Mirror


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, to be copied."""
    folder = tmp_path_factory.mktemp("migrated")
    mirror = Mirror(folder / "j.jsonl", f"sqlite:///{folder}/mlflow.db", "other")
    Journal(folder / "j.jsonl").run("x", name="x", parent=None, kind="sweep")
    mirror.start()
    assert mirror.close(300.0) == 0
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def grounder(tmp_path_factory: pytest.TempPathFactory) -> StoredTrial:
    """A trained grounder in a store of its own."""
    return stored(tmp_path_factory.mktemp("grounder") / "store")
