"""Tracking and registry against a real `mlflow server`, also one that dies and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pipeline.config import Experiment, PipelineError, Tracking
from pipeline.registry import register
from pipeline.tracking import Tracker, TrackingStore, open_tracking
from pipeline.weight_sources import resolve


class Server:
    """`mlflow server` on a folder of runs, with its own process group."""

    def __init__(self, runs: Path, folder: Path) -> None:
        with closing(socket.socket()) as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.command = [
            *(sys.executable, "-m", "mlflow", "server", "--port", str(self.port)),
            *("--workers", "1", "--serve-artifacts", "--artifacts-destination", str(folder)),
            *("--backend-store-uri", f"sqlite:///{runs / 'mlflow.db'}"),
        ]

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=5) as response:
                    assert response.read() == b"OK"
                    return
            except URLError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()
        while self.listens():  # its workers may die a moment after it
            time.sleep(0.05)

    def listens(self) -> bool:
        with closing(socket.socket()) as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, path: str, /, **query: str) -> bytes:
        with urlopen(f"{self.uri}{path}?{urlencode(query)}", timeout=20) as response:
            return bytes(response.read())

    def metric(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row of a metric, from the server's own interface."""
        path = "/api/2.0/mlflow/metrics/get-history"
        answer = json.loads(self.get(path, run_id=run_id, metric_key=name))
        return [(int(row.get("step", 0)), row["value"]) for row in answer.get("metrics", [])]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """A finished run in a default store, the one that the server will show."""
    runs = tmp_path_factory.mktemp("my runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracker = Tracker.start(open_tracking(None, runs), "local", "local", {"a": 1}, {})
    tracker.log_epoch(0, {"loss": 1.0})
    tracker.log_text("notes.txt", "kept beside the database")
    tracker.finish()
    return tracker


@pytest.fixture(scope="module")
def server(local: Tracker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    database = Path(local.store.uri.removeprefix("sqlite:///"))
    server = Server(database.parent, tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def store(server: Server, tmp_path: Path) -> TrackingStore:
    return open_tracking(server.uri, tmp_path / "unused")


def test_a_server_on_the_default_store_shows_its_runs_and_their_files(
    server: Server, local: Tracker
) -> None:
    assert server.metric(local.run_id, "loss") == [(0, 1.0)]
    listed = json.loads(server.get("/api/2.0/mlflow/artifacts/list", run_id=local.run_id))
    assert [file["path"] for file in listed["files"]] == ["notes.txt"]
    content = server.get("/get-artifact", run_id=local.run_id, path="notes.txt")
    assert content == b"kept beside the database"


def test_a_run_on_a_server_is_logged_there_an_epoch_per_request(
    server: Server, store: TrackingStore, tmp_path: Path
) -> None:
    tracker = Tracker.start(store, "remote", "run", {"train.epochs": 2}, {})
    before = server.log.read_text().count("runs/log-batch")
    for epoch in range(3):
        tracker.log_epoch(epoch, {"loss": 3.0 - epoch, "top1": 90.0 + epoch})
    assert server.log.read_text().count("runs/log-batch") - before == 3
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.log_figure("curves", figure)
    tracker.finish()
    assert server.metric(tracker.run_id, "top1") == [(0, 90.0), (1, 91.0), (2, 92.0)]
    picture = server.get("/get-artifact", run_id=tracker.run_id, path="figures/curves.png")
    assert picture.startswith(b"\x89PNG")
    assert not (tmp_path / "unused").exists()


STRANGER = """
import mlflow.pytorch, torch
model = mlflow.pytorch.load_model("models:/small_net@candidate")
print([tuple(model(torch.zeros(count, 3, 8, 8)).shape) for count in (1, 2, 7)])
"""


def test_a_model_registered_on_a_server_loads_from_it_elsewhere(
    server: Server, store: TrackingStore, tmp_path: Path
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ).eval()
    tracker = Tracker.start(store, "small_net", "run", {}, {})
    registered = register(
        model,
        "small_net",
        store=store,
        run_id=tracker.run_id,
        example_shape=(3, 8, 8),
        reference=model,
        experiment=Experiment(name="small_net", dataset="svhn", backbone="small"),
        model_card="# Small",
        preprocessing={"mean": [0.0]},
        tags={},
    )
    tracker.finish()
    assert (registered.version, registered.uri) == (1, "models:/small_net@candidate")
    stranger = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": server.uri},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert stranger.stdout == "[(1, 5), (2, 5), (7, 5)]\n", stranger.stderr
    tracking = Tracking(uri=server.uri, runs=tmp_path / "runs")
    beginner = Experiment(name="next", dataset="svhn", backbone="small", tracking=tracking)
    weights = resolve("models:/small_net@candidate", beginner)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in weights.read().items())


def test_epochs_logged_while_the_server_is_dead_arrive_when_it_is_back(
    server: Server, store: TrackingStore, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.start(store, "outage", "run", {}, {})
    tracker.log_epoch(0, {"loss": 3.0})
    server.signal(signal.SIGSTOP)
    logging_epoch = threading.Thread(target=tracker.log_epoch, args=(1, {"loss": 2.0}))
    logging_epoch.start()
    time.sleep(0.5)  # the request is on its way to a server that does not move
    assert logging_epoch.is_alive()
    server.stop()
    logging_epoch.join(timeout=20)
    assert not logging_epoch.is_alive()
    (warning,) = caplog.messages
    assert re.search(r"is away \((nothing listens there|the connection broke)\)", warning)
    assert "kept to send later: epoch 1" in warning
    assert "\n" not in warning
    tracker.log_epoch(2, {"loss": 1.0})
    with pytest.raises(PipelineError, match=r"lacks .*: epoch 1, epoch 2, status"):
        tracker.finish()
    server.start()
    tracker.log_epoch(3, {"loss": 0.5})
    tracker.finish()
    assert server.metric(tracker.run_id, "loss") == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]
