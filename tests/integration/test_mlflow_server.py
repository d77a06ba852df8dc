"""Tracking and registry against a real `mlflow server`, also one that dies and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from pipeline.config import Experiment, Tracking
from pipeline.registry import register
from pipeline.tracking import Tracker, TrackingStore, open_tracking
from pipeline.weight_sources import resolve
from tests.mlflow_server import Server


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
    tracker.catch_up()
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


def test_nobody_waits_for_a_server_that_is_away_and_it_gets_all_when_it_is_back(
    server: Server, store: TrackingStore
) -> None:
    said: list[str] = []
    tracker = Tracker.start(store, "outage", "run", {}, {}, tell=said.append)
    tracker.log_epoch(1, {"loss": 3.0})
    tracker.catch_up()
    server.signal(signal.SIGSTOP)
    started = time.monotonic()
    for epoch in (2, 3, 4):
        tracker.log_epoch(epoch, {"loss": 1.0 / epoch})
    assert time.monotonic() - started < 0.5, "a server that does not move holds up nobody"
    server.stop()
    while not said:
        time.sleep(0.05)
    server.start()
    tracker.finish()
    away, back = said
    assert re.search(
        r"is away \((nothing listens there|the connection broke)\); the training", away
    )
    assert re.search(r"is back after \d+ s: epochs 2 to 4, status delivered$", back)
    assert server.metric(tracker.run_id, "loss") == [(1, 3.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]


def test_an_epoch_that_is_sent_again_by_a_later_process_is_stored_once(
    server: Server, store: TrackingStore
) -> None:
    tracker = Tracker.start(store, "twice", "run", {}, {})
    rows = {"loss": 0.5, "top1": float("nan"), "time": 1_700_000_000.25}
    tracker.log_epoch(1, rows)
    tracker.finish("KILLED")
    later = Tracker(store, tracker.run_id, 0, set(), print)  # that does not know of the marker
    later.log_epoch(1, rows)
    later.finish()
    history = store.client.get_metric_history(tracker.run_id, "loss")
    assert [(row.step, row.value, row.timestamp) for row in history] == [
        (1, 0.5, 1_700_000_000_250)
    ]
    assert len(server.metric(tracker.run_id, "top1")) == 1
    assert server.metric(tracker.run_id, "time") == []
