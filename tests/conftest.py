"""Fixtures of all test folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.command_line import CommandLine


def pytest_configure() -> None:
    """One thread, here and in subprocesses: on busy cores threads wait longer than they work."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that start clusters and servers on one worker, so that they do not compete."""
    for item in items:
        if item.path.parent.name in ("integration", "drills"):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def command_line(tmp_path: Path, prepared: Path) -> CommandLine:
    return CommandLine(tmp_path / "project", prepared)
