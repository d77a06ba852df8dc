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

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import models
from pipeline.config import Experiment, PipelineError, Tracking
from pipeline.registry.overview import compare, list_models
from pipeline.registry.predictions import Predictions
from pipeline.registry.promotion import consider, promote
from pipeline.registry.registering import register
from pipeline.registry.registration import Registration
from pipeline.registry.versions import fetch_packed, find_version, parse_reference
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
model = mlflow.pytorch.load_model("models:/small_net@champion")
print([tuple(model(torch.zeros(count, 1, 32, 32)).shape) for count in (1, 2, 7)])
"""


def registered_on(store: TrackingStore, run: str, wrong: int) -> tuple[nn.Module, str]:
    """A network of that run, which gets so many of 40 images wrong, and what becomes champion."""
    model = models.create_model(
        "lenet5", "ternary", num_classes=10, in_channels=1, image_size=32, seed=wrong
    ).eval()
    labels = np.arange(40, dtype=np.uint8) % 10
    predicted = np.where(np.arange(40) < wrong, labels + 1, labels).astype(np.uint8)
    tracker = Tracker.start(store, "small_net", run, {}, {})
    registration = Registration(
        name="small_net",
        run_id=tracker.run_id,
        experiment=Experiment(name="small_net", dataset="digits", backbone="lenet5"),
        image_shape=(1, 32, 32),
        model_card="# Small",
        preprocessing={"mean": [0.0]},
        predictions=Predictions("da" * 32, predicted, labels),
        metadata={},
        tags={},
    )
    registered = register(model, models.fold(model), registration, store=store)
    tracker.finish()
    assert registered.uri == "models:/small_net@candidate"
    return model, consider(store, "small_net", registered.version)


def test_models_registered_on_a_server_load_from_it_elsewhere_and_the_better_one_is_champion(
    server: Server, store: TrackingStore, tmp_path: Path
) -> None:
    _, first = registered_on(store, "first", wrong=20)
    better, second = registered_on(store, "second", wrong=5)
    _, third = registered_on(store, "third", wrong=4)
    assert first == "champion is version 1, the first one"
    assert second.startswith("champion is version 2, was version 1: ")
    assert third.startswith("champion stays version 2: ")
    with pytest.raises(PipelineError, match="--force"):
        promote(store, "small_net", False, "ada")
    assert promote(store, "small_net", True, "ada").endswith("was version 2: forced by ada")
    assert promote(store, "small_net@2", True, "ada").endswith("was version 3: forced by ada")
    stranger = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": server.uri},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert stranger.stdout == "[(1, 10), (2, 10), (7, 10)]\n", stranger.stderr
    tracking = Tracking(uri=server.uri, runs=tmp_path / "runs")
    beginner = Experiment(name="next", dataset="digits", backbone="lenet5", tracking=tracking)
    weights = resolve("models:/small_net@champion", beginner)
    assert all(torch.equal(better.state_dict()[name], t) for name, t in weights.read().items())
    version = find_version(parse_reference("small_net"), store)
    assert (version.number, version.aliases) == (2, ("champion",))
    images = torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        unpacked = models.unpack(fetch_packed(version, store, tmp_path))
        assert torch.equal(unpacked(images), models.fold(better)(images))
    assert list_models(store, "small*").row_count == 3
    assert compare(store, "small_net@1", "small_net@champion").row_count > 10


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
