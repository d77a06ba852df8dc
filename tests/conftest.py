"""Fixtures of all test folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import CommandLine


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def command_line(tmp_path: Path, prepared: Path) -> CommandLine:
    return CommandLine(tmp_path / "project", prepared)
