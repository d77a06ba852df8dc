"""One finished run for all tests of what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import CommandLine

NAME = "digits_lenet5_ternary"
EPOCHS = 6


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> CommandLine:
    """The command line after digits were learned by two Ray workers, with the run's output."""
    command_line = CommandLine(tmp_path_factory.mktemp("slice") / "project", prepared)
    command_line.run("--experiment", NAME, f"train.epochs={EPOCHS}")
    return command_line
