from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import Manifest, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session", params=["ffcv", "torch"])
def digits(request: pytest.FixtureRequest, prepared: Path) -> Manifest:
    return prepare("digits", prepared=prepared, backend=request.param)


@pytest.fixture(scope="session")
def digits_of_both(prepared: Path) -> tuple[Manifest, Manifest]:
    return (
        prepare("digits", prepared=prepared, backend="ffcv"),
        prepare("digits", prepared=prepared, backend="torch"),
    )
