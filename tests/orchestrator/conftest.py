"""What takes seconds to make and several modules only read: made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from grounding_artifact import StoredTrial, stored


@pytest.fixture
def uri(tmp_path: Path, migrated: Path) -> str:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="session")
def grounder(tmp_path_factory: pytest.TempPathFactory) -> StoredTrial:
    """A trained grounder in a store of its own."""
    return stored(tmp_path_factory.mktemp("grounder") / "store")
