"""Fixtures of all test folders."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

from tests.command_line import CommandLine


def pytest_configure() -> None:
    """What holds here and in all subprocesses."""
    # On busy cores threads wait longer than they work.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell starts what runs in its background without ears for Ctrl-C.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


#: Of the integration tests these start no clusters, or hardly any, and take minutes.
ALONE = ("test_catalog.py", "test_readme.py")


class Scheduling(LoadScopeScheduling):
    """Spreads test files over two processes, and the matrix by network.

    Tests that start clusters and servers stay on one process, so that they do not compete.
    """

    def _split_scope(self, nodeid: str) -> str:
        path, _, identifier = nodeid.partition("[")
        folder = path.split("/")[1]
        if folder in ("integration", "drills") and not path.endswith(ALONE):
            return "processes"
        return identifier.partition("-")[0] if folder == "matrix" else path.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def command_line(tmp_path: Path, prepared: Path) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path / "project", prepared)
    yield command_line
    command_line.close()
