"""Opening a store: files that are no database of MLflow, servers that are none, rights."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.config import PipelineError
from pipeline.stores import open_tracking, reason
from tests.unit.pipeline.stored import one_line, rows, run_python


def test_the_setting_wins_over_the_environment_and_that_over_the_default(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{runs}/mlflow.db")
    elsewhere = open_tracking(None, tmp_path / "unused")
    assert elsewhere.uri == f"sqlite:///{runs}/mlflow.db"
    assert not (tmp_path / "unused").exists()
    shutil.copytree(runs, tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    chosen = open_tracking("sqlite:///set/mlflow.db", tmp_path / "unused")
    assert chosen.uri == f"sqlite:///{tmp_path}/set/mlflow.db"
    assert chosen.artifact_location == (tmp_path / "set" / "artifacts").as_uri()


@pytest.mark.parametrize(
    "address",
    [
        *("ftp://host", "runs/mlflow", "sqlite:///:memory:", "http://"),
        *("http://localhost:abc", "http://localhost:99999", "http://[::1", "http://:5000"),
    ],
)
def test_an_address_that_mlflow_cannot_use_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="is no place for MLflow") as error:
        open_tracking(address, tmp_path)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://ann:secret@host/db",
        "postgresql://ann:sec/secret@host/db",
        "mysql://host/db?user=ann&password=secret",
        "http://ann:secret@host:port",
    ],
)
def test_the_password_of_an_address_that_is_refused_is_not_printed(
    address: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"'\w+://host.*' is no place for MLflow") as error:
        open_tracking(address, tmp_path)
    assert "sec" not in one_line(error)


def test_a_password_in_a_text_of_mlflow_is_not_printed() -> None:
    error = OSError("request to http://ann:secret@host:1/api failed\nwith a page of HTML")
    assert reason(error) == "request to http://host:1/api failed"


@pytest.mark.parametrize("name", ["a%20b", "a?b"])
def test_a_path_that_the_database_cannot_have_is_refused_before_anything_is_made(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"has a % or a \?") as error:
        open_tracking(None, tmp_path / name)
    one_line(error)
    with pytest.raises(PipelineError, match=r"has a % or a \?"):
        open_tracking(f"sqlite:///{tmp_path}/mlflow.db?timeout=5", tmp_path)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from pipeline.config import PipelineError
from pipeline.stores import open_tracking
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    open_tracking(None, Path(sys.argv[1]))
except PipelineError as error:
    print(error)
"""


def test_a_disk_that_is_full_before_the_database_is_made_is_one_line(tmp_path: Path) -> None:
    output, errors = run_python(FULL_DISK, str(tmp_path)).communicate(timeout=60)
    assert output.startswith(f"cannot create the database {tmp_path}/mlflow.db: "), errors
    assert output.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()


def test_a_file_that_is_not_a_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("my thesis" * 100)
    with pytest.raises(PipelineError, match="file is not a database") as error:
        open_tracking(None, tmp_path)
    one_line(error)
    assert (tmp_path / "mlflow.db").read_text() == "my thesis" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_folder_in_the_place_of_the_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be used as a database") as error:
        open_tracking(f"sqlite:///{tmp_path}", tmp_path / "runs")
    one_line(error)
    assert list(tmp_path.iterdir()) == []
    assert not (tmp_path.parent / "artifacts").exists()


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE holidays (day TEXT)")
    with pytest.raises(PipelineError, match="database of another program"):
        open_tracking(None, tmp_path)
    assert rows(tmp_path, "SELECT name FROM sqlite_master") == [("holidays",)]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_database_of_another_mlflow_version_is_not_migrated_unasked(runs: Path) -> None:
    with closing(sqlite3.connect(runs / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    with pytest.raises(PipelineError, match=r"another MLflow version .*mlflow db upgrade sqlite:"):
        open_tracking(None, runs)
    assert rows(runs, "SELECT version_num FROM alembic_version") == [("bd07f7e963c5",)]


def test_a_database_locked_by_another_process_is_reported_in_seconds(runs: Path) -> None:
    holder = run_python(
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('BEGIN EXCLUSIVE')\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
        "import time; time.sleep(60)",
        str(runs / "mlflow.db"),
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    started = time.monotonic()
    try:
        with pytest.raises(PipelineError, match="locked by another process"):
            open_tracking(None, runs)
    finally:
        holder.kill()
        holder.communicate()
    assert time.monotonic() - started < 20
    assert [path.name for path in runs.iterdir()] == ["mlflow.db"]


@contextmanager
def without_root() -> Iterator[None]:
    """Give up the administrator's right to write anywhere, for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_runs(fresh_database: Path) -> Iterator[Path]:
    """A folder of runs below one that every user can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        runs = Path(folder, "runs")
        (runs / "artifacts").mkdir(parents=True)
        shutil.copy(fresh_database, runs)
        for path in (runs, *runs.iterdir()):
            path.chmod(0o777)
        yield runs


@pytest.mark.parametrize("read_only", ["mlflow.db", "artifacts", "."])
def test_what_cannot_be_written_to_is_named_before_the_training(
    read_only: str, public_runs: Path
) -> None:
    path = public_runs / read_only
    with without_root():
        open_tracking(None, public_runs)
    path.chmod(0o555)
    with without_root(), pytest.raises(PipelineError, match=f"^{path} is read-only") as error:
        open_tracking(None, public_runs)
    one_line(error)


def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with without_root(), pytest.raises(PipelineError, match=r"cannot keep runs in .*denied"):
        open_tracking(None, tmp_path / "locked" / "runs")
    assert list((tmp_path / "locked").iterdir()) == []


def test_a_runs_folder_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match="Not a directory") as error:
        open_tracking(None, tmp_path / "file" / "runs")
    one_line(error)


@contextmanager
def http_server(status: int, body: bytes) -> Iterator[str]:
    """A web server that is not MLflow and gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address_where_nothing_listens_is_reported_in_seconds(tmp_path: Path) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = time.monotonic()
    expected = rf"nothing listens there; start one \(mlflow server --port {port}\)"
    with pytest.raises(PipelineError, match=expected) as error:
        open_tracking(f"http://127.0.0.1:{port}", tmp_path)
    one_line(error)
    assert time.monotonic() - started < 20


def test_a_host_that_does_not_exist_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"no MLflow server at http://.*no such host") as error:
        open_tracking("http://nowhere.invalid:5000", tmp_path)
    one_line(error)


def test_a_port_in_use_by_another_program_is_reported(tmp_path: Path) -> None:
    with (
        http_server(200, b"<html>Jupyter</html>") as address,
        pytest.raises(PipelineError, match="in use by another program") as error,
    ):
        open_tracking(address, tmp_path)
    one_line(error)


def test_a_port_that_never_answers_is_given_up_in_seconds(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        started = time.monotonic()
        with pytest.raises(PipelineError, match="no answer in time"):
            open_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        assert time.monotonic() - started < 20


def test_a_server_that_asks_for_a_password_is_reported_without_printing_one(tmp_path: Path) -> None:
    with http_server(401, b"Unauthorized") as address:
        secret = address.replace("http://", "http://ann:hunter2@")
        with pytest.raises(PipelineError, match="MLFLOW_TRACKING_USERNAME") as error:
            open_tracking(secret, tmp_path)
    assert "hunter2" not in one_line(error)


OPEN = """
import sys
from pathlib import Path
from pipeline.stores import open_tracking
open_tracking(None, Path(sys.argv[1]))
"""


def test_a_driver_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    driver = run_python(OPEN, str(tmp_path))
    partial = tmp_path / "mlflow.db.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    store = open_tracking(None, tmp_path)
    assert [experiment.name for experiment in store.client.search_experiments()] == ["Default"]
