from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from data_prep import Manifest, prepare
from tests.pictures import write_class_folders


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def digits(prepared: Path) -> Manifest:
    return prepare("digits", prepared=prepared)


@pytest.fixture(scope="session")
def photographs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """JPEGs of many sizes in two classes: 48 to train with, 12 to test."""
    raw = write_class_folders(tmp_path_factory.mktemp("pictures"))
    return prepare("folder", raw=raw, prepared=prepared)


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
