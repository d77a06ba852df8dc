"""An elastic training that loses a machine, goes on without it, and takes in a new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.command_line import CommandLine, wait_for, workers_of

REPOSITORY = Path(__file__).parents[2]
EPOCHS = 60

#: Two Ray nodes with a core each on this machine, and a training that sees them come and go.
PROGRAM = """
import json, os, sys
from pathlib import Path
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
from pipeline import inputs, launch
from pipeline.experiments import load_experiment
launch._RESIZE_INTERVAL = 2.0  # a minute, otherwise
folder = Path(sys.argv[1])
experiment = load_experiment("digits_lenet5_ternary", sys.argv[2:])
manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *words: None)
changes, told, epochs = [], [], []

def tell(event):
    if event["kind"] == "workers":
        changes.append({**event, "after": len(epochs)})
    elif event["kind"] in ("note", "restart"):
        told.append(event["text"])
    elif event["kind"] == "epoch":
        epochs.append((event["epoch"], event["metrics"]["test_top1"]))
        if len(changes) == 1 and len(epochs) == 2:
            cluster.remove_node(second, allow_graceful=False)
        if len(changes) == 2 and changes[-1]["after"] == len(epochs) - 1:
            cluster.add_node(num_cpus=1)

launch.train_on_ray(experiment, manifest, folder, tell)
print(json.dumps({"changes": changes, "told": told, "epochs": epochs}))
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_machine_and_a_new_one_change_the_workers_and_the_training_goes_on(tmp_path):
    settings = (
        f"data.prepared={tmp_path / 'prepared'}",
        "data.synthetic=[1024,64]",
        f"train.epochs={EPOCHS}",
        "train.batch_size=32",
        "scaling.workers=1..2",
        "tracking.enabled=false",
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *settings],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert [change["workers"] for change in answer["changes"]] == [2, 1, 2]
    assert [change["machines"] for change in answer["changes"]] == [2, 1, 2]
    assert answer["changes"][0]["hardware"] == "2 CPU workers on 2 machines, gloo"
    assert "a worker process was killed or crashed" in answer["told"]
    # An epoch that was cut short is trained again, and none is left out.
    epochs = [epoch for epoch, _ in answer["epochs"]]
    assert sorted(set(epochs)) == list(range(1, EPOCHS + 1)) and epochs == sorted(epochs)
    assert answer["epochs"][-1][1] == 100
    assert (tmp_path / "checkpoints" / f"epoch-{EPOCHS:04d}" / "manifest.json").exists()


@pytest.mark.slow
def test_an_elastic_training_that_loses_a_worker_ends_with_the_weights_of_a_fixed_one(
    tmp_path, prepared
):
    name = "digits_lenet5_ternary"
    settings = (
        *("train.epochs=4", "train.batch_size=32", "data.synthetic=[2048,64]"),
        "tracking.enabled=false",
    )
    fixed = CommandLine(tmp_path / "fixed", prepared)
    fixed.run("--experiment", name, *settings, "scaling.workers=2")
    elastic = CommandLine(tmp_path / "elastic", prepared)
    process = elastic.start("--experiment", name, *settings, "scaling.workers=1..2")
    checkpoints = elastic.folder / "runs" / name
    wait_for(
        lambda: bool(list(checkpoints.glob("*/checkpoints/epoch-0001/manifest.json"))),
        200,
        "the first checkpoint",
    )
    workers = workers_of(process.pid)
    assert len(workers) == 2, "both cores are free, so Ray takes both"
    workers[-1].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "1 to 2 CPU workers, gloo" in output
    assert "killed or crashed; restarting from the last checkpoint" in output
    weights, expected = elastic.weights(name, 4), fixed.weights(name, 4)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
