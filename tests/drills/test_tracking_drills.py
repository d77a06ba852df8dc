"""Stores that go away, lock up or see their writer die: in the end each holds every epoch once."""

from __future__ import annotations

import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import BEGINNING, CommandLine, WatchedRun
from tests.mlflow_server import Server

pytestmark = pytest.mark.slow

NAME, EPOCHS = "digits_lenet5_ternary", 8
SETTINGS = (
    *("--experiment", NAME, f"train.epochs={EPOCHS}", "train.batch_size=32"),
    *("data.synthetic=[512,64]", "data.backend=torch", "scaling.launcher=local"),
)
UNREGISTERED = (*SETTINGS, "tracking.register_model=false")

#: Metrics that are the same in each run of these settings.
REPRODUCIBLE = ("train_loss", "train_top1", "test_loss", "test_top1", "lr", "epoch")


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        return connection.execute(query).fetchall()


def epochs_in(database: Path) -> int:
    found = rows(database, "SELECT count(DISTINCT step) FROM metrics WHERE key = 'epoch'")
    return int(found[0][0])


def values(database: Path) -> dict[tuple[str, int], float]:
    """Of each metric in each step, which no database may hold twice."""
    stored = rows(database, "SELECT key, step, value FROM metrics")
    twice = [place for place, count in Counter(row[:2] for row in stored).items() if count > 1]
    assert not twice
    return {(key, step): value for key, step, value in stored}


def assert_all_is_there_once(database: Path, undisturbed: dict[tuple[str, int], float]) -> None:
    found = values(database)
    assert {key for key, _ in found} == {key for key, _ in undisturbed}
    for key in REPRODUCIBLE:
        for step in range(1, EPOCHS + 1):
            assert found[key, step] == undisturbed[key, step], (key, step)
    assert {step for _, step in found} == set(range(1, EPOCHS + 1))
    status = rows(database, "SELECT status FROM runs WHERE lifecycle_stage = 'active'")
    assert status == [("FINISHED",)]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path
) -> dict[tuple[str, int], float]:
    """The metrics of a run that is left in peace."""
    command_line = CommandLine(tmp_path_factory.mktemp("undisturbed") / "project", prepared)
    command_line.run(*UNREGISTERED)
    return values(command_line.folder / "runs" / "mlflow.db")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "store").mkdir()
    server = Server(tmp_path / "store", tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """That the server keeps its runs in."""
    return tmp_path / "store" / "mlflow.db"


def wait_for_epochs(run: WatchedRun, database: Path, count: int) -> None:
    run.wait_until(lambda: epochs_in(database) >= count, f"epoch {count} in MLflow", BEGINNING)


def wait_for_end(run: WatchedRun, code: int) -> list[str]:
    """The lines of a run, which may have most of its training before it."""
    return run.end(code, BEGINNING).splitlines()


def test_a_server_that_is_killed_and_started_again_misses_nothing(
    command_line: CommandLine, server: Server, database: Path, undisturbed: dict[Any, float]
) -> None:
    secret = server.uri.replace("http://", "http://ann:hunter2@")
    run = command_line.watch(*UNREGISTERED, f"tracking.uri={secret}")
    wait_for_epochs(run, database, 2)
    server.stop()
    run.wait_for_line("is away", 60)
    time.sleep(3)
    server.start()
    output = wait_for_end(run, 0)
    assert sum("is away" in line for line in output) == 1
    (back,) = [line for line in output if "is back after" in line]
    assert re.search(r"epochs \d to 8, .*delivered$", back)
    assert_all_is_there_once(database, undisturbed)
    assert "hunter2" not in run.output
    for file in (*command_line.folder.rglob("*"), *database.parent.rglob("*")):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


def test_a_server_that_accepts_and_never_answers_holds_up_no_training(
    command_line: CommandLine, server: Server, database: Path, undisturbed: dict[Any, float]
) -> None:
    address = f"tracking.uri={server.uri}"
    run = command_line.watch(*UNREGISTERED, address, MLFLOW_HTTP_REQUEST_TIMEOUT="3")
    wait_for_epochs(run, database, 2)
    server.signal(signal.SIGSTOP)
    command_line.wait_for_checkpoint(run, NAME, f"epoch-{EPOCHS:04d}")
    run.wait_for_line("is away (no answer in time)")
    server.signal(signal.SIGCONT)
    wait_for_end(run, 0)
    assert_all_is_there_once(database, undisturbed)


def test_a_server_that_stays_away_ends_the_run_with_the_command_that_sends_what_is_missing(
    command_line: CommandLine, server: Server, database: Path, undisturbed: dict[Any, float]
) -> None:
    secret = server.uri.replace("http://", "http://ann:hunter2@")
    run = command_line.watch(*SETTINGS, f"tracking.uri={secret}")
    wait_for_epochs(run, database, 2)
    server.stop()
    trained = run.wait_for_line("test top-1", BEGINNING)
    last = wait_for_end(run, 1)[-1]
    assert time.monotonic() - trained < 60
    said = re.match(
        r"error: run \w+ is not complete in http://\S+: it lacks (epoch.*), figures/curves\.png, .*"
        r"\(nothing listens there\); continue with: (.*) \(with the password of tracking\.uri\)$",
        last,
    )
    assert said is not None, last
    assert "hunter2" not in run.output
    assert re.search(r"waiting up to \d+ s for http://\S+ to take epoch", run.output)
    assert f"to {EPOCHS}" in said[1] or f"epoch {EPOCHS}" in said[1]

    server.start()
    command = subprocess.run(
        shlex.split(said[2]),
        cwd=command_line.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert command.returncode == 0, command.stderr
    assert f"continuing after epoch {EPOCHS} of {EPOCHS}" in command.stdout
    assert "ETA" not in command.stdout, "nothing is trained again"
    assert_all_is_there_once(database, undisturbed)
    assert rows(database, "SELECT version FROM model_versions") == [(1,)]


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another process has the database for itself."""
    program = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], timeout=60)\n"
        "connection.execute('BEGIN EXCLUSIVE')\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"locked\n"
    yield
    holder.communicate()


@pytest.mark.parametrize("seconds", [10, 25])  # MLflow itself waits for 20
def test_a_database_that_another_process_has_locked_for_a_while_misses_nothing(
    seconds: int, command_line: CommandLine, undisturbed: dict[Any, float]
) -> None:
    database = command_line.folder / "runs" / "mlflow.db"
    run = command_line.watch(*UNREGISTERED)
    command_line.wait_for_checkpoint(run, NAME, "epoch-0002")
    with locked(database):
        time.sleep(seconds)
    wait_for_end(run, 0)
    assert_all_is_there_once(database, undisturbed)


def test_a_driver_killed_while_its_server_does_not_answer_loses_and_doubles_nothing(
    command_line: CommandLine, server: Server, database: Path, undisturbed: dict[Any, float]
) -> None:
    arguments = (*UNREGISTERED, f"tracking.uri={server.uri}")
    run = command_line.watch(*arguments)
    wait_for_epochs(run, database, 2)
    server.signal(signal.SIGSTOP)  # what was sent to it then it still carries out, later
    command_line.wait_for_checkpoint(run, NAME, "epoch-0005")
    run.process.kill()
    run.process.wait()
    server.signal(signal.SIGCONT)
    command_line.run(*arguments, "--resume")
    assert_all_is_there_once(database, undisturbed)


def test_a_driver_killed_after_it_registered_its_network_registers_it_once(
    command_line: CommandLine, undisturbed: dict[Any, float]
) -> None:
    database = command_line.folder / "runs" / "mlflow.db"
    run = command_line.watch(*SETTINGS)
    run.wait_until(database.exists, "the database", BEGINNING)
    query = "SELECT version FROM model_versions"
    run.wait_until(lambda: bool(rows(database, query)), "a registered version", BEGINNING)
    run.process.kill()  # while it reads the version back
    run.process.wait()
    assert rows(database, "SELECT alias FROM registered_model_aliases") == []
    command_line.run(*SETTINGS, "--resume")
    assert rows(database, query) == [(1,)]
    assert rows(database, "SELECT count(*) FROM inputs WHERE source_type = 'RUN_OUTPUT'") == [(1,)]
    assert rows(database, "SELECT alias, version FROM registered_model_aliases") == [
        ("synthetic", 1)
    ]
    models = rows(database, "SELECT lifecycle_stage FROM logged_models")
    assert models == [("active",)]
    assert_all_is_there_once(database, undisturbed)
