"""A tracking store on the default SQLite file, as the pipeline makes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.stores import TrackingStore, open_tracking


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("fresh")
    open_tracking(None, runs)
    return runs / "mlflow.db"


@pytest.fixture(autouse=True)
def _no_tracking_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def runs(tmp_path: Path, fresh_database: Path) -> Path:
    """A folder of runs, with a space in its name, that holds an empty MLflow database."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(fresh_database, folder)
    return folder


@pytest.fixture
def store(runs: Path) -> TrackingStore:
    return open_tracking(None, runs)
