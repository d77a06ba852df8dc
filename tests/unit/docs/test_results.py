"""The tables of results and the pictures of curves say what the records of runs say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from docs.draw_curves import COLORS, PUBLISHED_POINTS, draw
from docs.write_results import (
    CURVES,
    collect,
    collect_curves,
    curves_as_json,
    published_table,
    training_table,
)
from pipeline.checkpoints.state import Progress, Snapshot, TrainingState
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointStore
from pipeline.experiments import catalog, load_experiment
from pipeline.settings import override

REPOSITORY = Path(__file__).parents[3]
NAME = "cifar10_resnet20_ternary"


def write_run(
    runs: Path, stamp: str, curve: list[float], *overrides: str, top1: float | None = None
) -> None:
    """A run folder with a checkpoint of each epoch; finished where it has a result."""
    folder = runs / NAME / stamp
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    store = CheckpointStore(LocalStorage(folder / "checkpoints"), "identity")
    for epoch in range(1, len(curve) + 1):
        history = [{"test_top1": value} for value in curve[:epoch]]
        state = TrainingState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        store.save(Snapshot.of(state, Progress(epoch, epoch, history)))
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "status": "started" if top1 is None else "finished",
        "sessions": 1,
        "experiment": override(load_experiment(NAME), overrides).model_dump(mode="json"),
        "result": {"top1": top1},
    }
    (folder / "run.json").write_text(json.dumps(record))


def curve_of(runs: Path) -> list[float] | None:
    return collect_curves(runs).get(NAME, {}).get("top1_by_epoch")


def test_a_curve_is_that_of_the_longest_run_whether_or_not_it_finished(tmp_path):
    assert curve_of(tmp_path) is None
    write_run(tmp_path, "1", [])
    assert curve_of(tmp_path) is None
    write_run(tmp_path, "2", [10.0, 30.0, 20.0])
    write_run(tmp_path, "3", [11.0], "train.epochs=1", "train.milestones=[0.5,0.6,0.7]", top1=11.0)
    assert curve_of(tmp_path) == [10.0, 30.0, 20.0]
    write_run(tmp_path, "4", [10.0, 31.0, 22.0], "train.precision=bfloat16")
    assert curve_of(tmp_path) == [10.0, 31.0, 22.0]


@pytest.mark.parametrize(
    "setting", ["train.lr=0.3", "method=ternary(expansion=2)", "data.synthetic=[64,16]", "seeds=3"]
)
def test_a_run_of_something_else_is_left_out(tmp_path, setting):
    write_run(tmp_path, "1", [10.0, 20.0], setting, top1=20.0)
    assert curve_of(tmp_path) is None
    assert collect(tmp_path) == {}


def test_the_precision_of_a_result_is_free_and_its_length_is_not(tmp_path):
    write_run(tmp_path, "1", [10.0], "train.precision=bfloat16", top1=10.0)
    write_run(tmp_path, "2", [20.0], "train.epochs=300", top1=20.0)
    assert collect(tmp_path) == {NAME: {"top1": 10.0}}


def test_a_run_stands_beside_its_published_figure_with_its_best_epoch(tmp_path):
    epochs = catalog()[NAME].train.epochs
    write_run(tmp_path, "1", [10.0, 30.0, 20.0])
    (row,) = published_table(collect_curves(tmp_path)).splitlines()[2:]
    assert f"| cifar10 | 3 of {epochs} | - | 30.00 at 2 | 91.65 |" in row
    write_run(
        tmp_path, "2", [10.0, 30.0, 20.0], "train.epochs=3", "train.milestones=[1,2,2.5]", top1=20
    )
    (row,) = published_table(collect_curves(tmp_path)).splitlines()[2:]
    assert f"| 3, the paper's {epochs} shortened | 20.00 |" in row


def test_curves_are_written_a_line_each():
    run = {"top1_by_epoch": [1.5, 2.5]}
    text = curves_as_json({"b": run, "a": run})
    assert json.loads(text) == {"a": run, "b": run}
    assert [line[:3] for line in text.splitlines()] == ["{", '"a"', '"b"', "}"]
    assert CURVES.read_text() == curves_as_json(json.loads(CURVES.read_text()))


def test_a_picture_shows_the_curve_and_what_is_published():
    name = "mnist_lenet5_binary"
    runs = {
        "cifar10_resnet20": {"epochs": 4, "watched": "test", "top1_by_epoch": [50.0, 60.0]},
        name: {"epochs": 150, "watched": "validation", "top1_by_epoch": [97.0, 98.0, 98.5]},
    }
    axes = draw(runs).axes[0]
    first, second = (
        [np.asarray(line.get_xydata()).tolist() for line in axes.lines if line.get_color() == color]
        for color in COLORS[:2]
    )
    assert first[0] == [[1, 50], [2, 60]]
    curve, published, points = second
    assert curve == [[1, 97], [2, 98], [3, 98.5]]
    assert [top1 for _, top1 in published] == [99.16, 99.16]
    # Of the published epochs 10, 100 and 200 the last lies behind the end of this run.
    assert points == [[10, 98.52], [100, 98.98]]


def test_published_points_belong_to_experiments_of_the_catalog():
    assert PUBLISHED_POINTS.keys() <= catalog().keys()


def test_a_picture_of_an_unknown_curve_is_refused_in_one_line(tmp_path):
    command = [sys.executable, "-m", "docs.draw_curves", str(tmp_path / "a.png"), "no_run"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 2 and "no curve of no_run" in answer.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_training_throughput_becomes_a_row_for_each_network_and_worker_count():
    parts = {"data": 0.01, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "report": 0.01}
    network = {"network": "resnet18", "method": "float", "stack": 98.0, "bare": 100.0}
    network |= {"stack_bytes": 2e9, "bare_bytes": 1e9, "parts": {**parts, "other": 0.03}}
    race = {"networks": [network], "workers": {"1 worker": 50.0, "2 workers": 90.0}}
    text = training_table({"2 CPU cores": race})
    assert "| 2 CPU cores | `resnet18` | float | 98 | 0.980 | 2.0 | 1.0 % | 30.0 % |" in text
    assert "|  | 2 workers | 90 | 0.56x |" in text


@pytest.mark.slow
@pytest.mark.slow
def test_the_benchmark_of_training_writes_the_record_of_the_table(tmp_path):
    script = REPOSITORY / "tests" / "benchmarks" / "training_throughput.py"
    record = tmp_path / "training.json"
    words = ["--networks", "lenet5", "--dataset", "digits", "--rounds", "1", "--steps", "2"]
    subprocess.run(
        [
            sys.executable,
            script,
            *words,
            "--methods",
            "float",
            "--workers",
            "1",
            "--record",
            record,
        ],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=True,
        timeout=280,
    )
    ((title, race),) = json.loads(record.read_text()).items()
    (network,) = race["networks"]
    assert sum(network["parts"].values()) == pytest.approx(1)
    assert all(share >= 0 for share in network["parts"].values())
    assert network["parts"]["forward"] + network["parts"]["backward"] > 0.3
    assert network["stack"] > 0 and network["bare"] > 0 and network["stack_bytes"] > 1e8
    assert race["workers"] == {}
    assert title in training_table({title: race})
