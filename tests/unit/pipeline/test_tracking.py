"""The tracker on the default SQLite store, read back with sqlite3 and not through MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pipeline.config import PipelineError
from pipeline.provenance import environment_tags
from pipeline.tracking import Tracker, TrackingStore, open_tracking

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
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


def start(store: TrackingStore, **params: object) -> Tracker:
    return Tracker.start(store, "digits_lenet5", "first", params, {"data.fingerprint": "abc"})


def rows(runs: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(runs / "mlflow.db")) as connection:
        return connection.execute(query).fetchall()


def one_line(error: pytest.ExceptionInfo[PipelineError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_settings_metrics_and_tags_are_in_the_database(runs: Path, store: TrackingStore) -> None:
    tracker = start(store, **{"train.epochs": 3, "method": "ternary(expansion=4)"})
    tracker.log_epoch(0, {"train/loss": 0.5, "test/top1": 97.25})
    tracker.set_tags({"top1": "97.25"})
    tracker.finish()
    assert set(rows(runs, "SELECT key, value FROM params")) == {
        ("train.epochs", "3"),
        ("method", "ternary(expansion=4)"),
    }
    assert set(rows(runs, "SELECT key, value, step FROM metrics")) == {
        ("train/loss", 0.5, 0),
        ("test/top1", 97.25, 0),
        ("epoch", 0.0, 0),
    }
    tags = dict(rows(runs, "SELECT key, value FROM tags"))
    assert tags["data.fingerprint"] == "abc"
    assert tags["top1"] == "97.25"
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows(runs, "SELECT name, status FROM runs") == [("first", "FINISHED")]


def test_pictures_and_files_lie_under_the_runs_folder(
    runs: Path, store: TrackingStore, tmp_path: Path
) -> None:
    tracker = start(store)
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.log_figure("curves", figure)
    tracker.log_text("experiment.yaml", "name: digits\n")
    tracker.log_dict("profile.json", {"macs": 12})
    (tmp_path / "notes.txt").write_text("hello")
    tracker.log_file(tmp_path / "notes.txt", "extra")
    tracker.finish()
    artifacts = runs / "artifacts" / tracker.run_id / "artifacts"
    assert (artifacts / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (artifacts / "experiment.yaml").read_text() == "name: digits\n"
    assert json.loads((artifacts / "profile.json").read_text()) == {"macs": 12}
    assert (artifacts / "extra" / "notes.txt").read_text() == "hello"


def test_an_epoch_is_logged_once_also_after_a_resume(runs: Path, store: TrackingStore) -> None:
    tracker = start(store)
    tracker.log_epoch(0, {"loss": 3.0})
    tracker.log_epoch(1, {"loss": 2.0})
    tracker.log_epoch(1, {"loss": 9.0})
    tracker.finish("KILLED")
    resumed = Tracker.resume(open_tracking(None, runs), tracker.run_id)
    assert rows(runs, "SELECT status FROM runs") == [("RUNNING",)]
    resumed.log_epoch(1, {"loss": 9.0})
    resumed.log_epoch(2, {"loss": 1.0})
    resumed.finish()
    history = rows(runs, "SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step")
    assert history == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_a_setting_too_long_for_mlflow_is_kept_whole(runs: Path, store: TrackingStore) -> None:
    tracker = start(store, note="x" * 7000, **{f"key{index}": index for index in range(250)})
    assert rows(runs, "SELECT count(*) FROM params") == [(251,)]
    whole = runs / "artifacts" / tracker.run_id / "artifacts" / "long_params.json"
    assert json.loads(whole.read_text()) == {"note": "x" * 7000}


def test_any_metric_name_number_and_count_is_taken(runs: Path, store: TrackingStore) -> None:
    tracker = start(store)
    tracker.log_epoch(0, {f"top1/class {index}": index / 10 for index in range(1000)})
    tracker.log_epoch(1, {"top1/cat's eye": 1.0, "loss": float("nan"), "best": float("inf")})
    tracker.finish()
    assert rows(runs, "SELECT count(*) FROM metrics WHERE step = 0") == [(1001,)]
    assert ("top1/cat_s eye",) in rows(runs, "SELECT key FROM metrics WHERE step = 1")
    assert rows(runs, "SELECT is_nan FROM metrics WHERE key = 'loss'") == [(1,)]


def test_what_the_store_refuses_is_named_at_the_end_and_blocks_nothing(
    runs: Path, store: TrackingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(store)
    tracker.log_file(tmp_path / "missing.txt")
    tracker.log_epoch(0, {"loss": 1.0})
    with pytest.raises(PipelineError, match=r"lacks .*missing\.txt") as error:
        tracker.finish()
    one_line(error)
    assert len(caplog.records) == 1
    assert rows(runs, "SELECT status FROM runs") == [("FINISHED",)]
    assert rows(runs, "SELECT count(*) FROM metrics") == [(2,)]


def test_what_a_failed_run_lacks_does_not_hide_its_failure(
    store: TrackingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(store)
    tracker.log_file(tmp_path / "missing.txt")
    tracker.finish("FAILED")
    assert "lacks" in caplog.messages[-1]


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


def test_a_run_that_is_not_there_is_named(store: TrackingStore) -> None:
    with pytest.raises(PipelineError, match="cannot continue run 0123") as error:
        Tracker.resume(store, "0123")
    one_line(error)


def test_a_deleted_experiment_is_reported(store: TrackingStore) -> None:
    start(store).finish()
    experiment = store.client.get_experiment_by_name("digits_lenet5")
    assert experiment is not None
    store.client.delete_experiment(experiment.experiment_id)
    with pytest.raises(PipelineError, match="deleted") as error:
        start(store)
    one_line(error)


@pytest.mark.parametrize("address", ["ftp://host", "runs/mlflow", "sqlite:///:memory:", "http://"])
def test_an_address_that_mlflow_cannot_use_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="is no place for MLflow") as error:
        open_tracking(address, tmp_path)
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_a_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("my thesis" * 100)
    with pytest.raises(PipelineError, match="file is not a database") as error:
        open_tracking(None, tmp_path)
    one_line(error)
    assert (tmp_path / "mlflow.db").read_text() == "my thesis" * 100


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE holidays (day TEXT)")
    with pytest.raises(PipelineError, match="database of another program"):
        open_tracking(None, tmp_path)
    assert rows(tmp_path, "SELECT name FROM sqlite_master") == [("holidays",)]


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


WHOLE_RUN = """
import sys
from pathlib import Path
from pipeline.tracking import Tracker, open_tracking
tracker = Tracker.start(open_tracking(None, Path(sys.argv[1])), "quiet", "run", {"a": 1}, {})
tracker.log_epoch(0, {"loss": 1.0})
tracker.finish()
"""


def test_two_drivers_that_start_at_once_share_one_new_silent_database(tmp_path: Path) -> None:
    drivers = [run_python(WHOLE_RUN, str(tmp_path)) for _ in range(2)]
    assert [driver.communicate(timeout=60) for driver in drivers] == [("", "")] * 2
    assert rows(tmp_path, "SELECT status FROM runs") == [("FINISHED",)] * 2
    assert rows(tmp_path, "SELECT count(*) FROM experiments WHERE name = 'quiet'") == [(1,)]


def test_a_driver_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    driver = run_python(WHOLE_RUN, str(tmp_path))
    partial = tmp_path / "mlflow.db.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    start(open_tracking(None, tmp_path)).finish()
    assert rows(tmp_path, "SELECT status FROM runs") == [("FINISHED",)]


def test_the_environment_names_commit_packages_and_machine() -> None:
    import mlflow
    import torch

    tags = environment_tags()
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert tags.get("mlflow.source.git.commit", "HEAD") in (commit, "HEAD")
    assert tags["version.torch"] == torch.__version__.split("+")[0]
    assert tags["version.mlflow"] == mlflow.__version__
    assert tags["host"] == socket.gethostname()
