from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
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


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can enter and write to, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture
def without_root() -> Callable[[], AbstractContextManager[None]]:
    """Give up the administrator's right to read and write everything, for a while."""
    # The reader's import on demand, done now: Python itself may be installed for root alone.
    import_module("torchvision.datasets")

    @contextmanager
    def ordinary_user() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return ordinary_user
