"""Machines that are lost and come back, on Ray clusters of several nodes."""

from __future__ import annotations

import time

import pytest

from tests.command_line import (
    BEGINNING,
    CommandLine,
    assert_equal_bit_for_bit,
    workers_of,
)
from tests.ray_cluster import answer_of, ray_cluster

NAME = "digits_lenet5_ternary"
SETTINGS = (
    *("--experiment", NAME, "train.epochs=2", "train.batch_size=8", "data.synthetic=[800,64]"),
    *("checkpoint.steps=20", "tracking.enabled=false"),
)
ONE_CORE = {"num_cpus": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prepared):
    """Final weights of two workers that were left in peace."""
    command_line = CommandLine(tmp_path_factory.mktemp("undisturbed") / "project", prepared)
    command_line.run(*SETTINGS, "scaling.workers=2")
    return command_line.weights(NAME, 2)


@pytest.mark.slow
def test_a_training_that_loses_a_machine_waits_for_another_one(command_line, undisturbed):
    with ray_cluster(ONE_CORE, ONE_CORE) as cluster:
        (second,) = cluster.worker_nodes
        run = command_line.watch(*SETTINGS, "scaling.workers=2", RAY_ADDRESS=cluster.address)
        command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000040")
        cluster.remove_node(second, allow_graceful=False)
        lost = time.monotonic()
        noticed = run.wait_for_line("restarting from the last checkpoint") - lost
        run.wait_for_line("waiting for 2 workers; the cluster has room for 1")
        cluster.add_node(num_cpus=1)
        added = time.monotonic()
        restored = run.wait_for_line("continuing after step") - added
        print(
            f"noticed {noticed:.1f} s after the loss, restored {restored:.1f} s after the new one"
        )
        output = run.end(0, BEGINNING)
    assert "the machine " in output and " is lost" in output
    assert_equal_bit_for_bit(command_line.weights(NAME, 2), undisturbed)


#: An elastic training on two machines, of which one is lost, and comes back.
PROGRAM = """
import json, sys
from pathlib import Path
from pipeline import inputs, launch
from pipeline.experiments import load_experiment
from tests.ray_cluster import ray_cluster

launch._RESIZE_INTERVAL = 2.0  # a minute, otherwise
folder = Path(sys.argv[1])
experiment = load_experiment("digits_lenet5_ternary", sys.argv[2:])
manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *words: None)
events = []

def count(kind):
    return sum(event["kind"] == kind for event in events)

with ray_cluster({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
    (second,) = cluster.worker_nodes

    def tell(event):
        events.append(event)
        if event["kind"] != "checkpoint":
            return
        if count("workers") == 1 and count("checkpoint") == 3:
            cluster.remove_node(second, allow_graceful=False)
        elif count("resumed") == 1 and not cluster.worker_nodes:
            cluster.add_node(num_cpus=1)

    launch.train_on_ray(experiment, manifest, folder, tell)
print(json.dumps([event for event in events if event["kind"] != "evaluation"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_training_goes_on_with_the_machines_that_there_are(tmp_path):
    epochs, steps = 30, 64
    settings = (
        f"data.prepared={tmp_path / 'prepared'}",
        *("data.synthetic=[512,64]", f"train.epochs={epochs}", "train.batch_size=8"),
        *("checkpoint.steps=20", "scaling.workers=1..2", "tracking.enabled=false"),
    )
    events = answer_of(PROGRAM, str(tmp_path), *settings, seconds=500)
    by_kind = {
        kind: [event for event in events if event["kind"] == kind]
        for kind in ("workers", "epoch", "restart", "resumed", "checkpoint", "stopped")
    }
    assert [event["workers"] for event in by_kind["workers"]] == [2, 1, 2]
    assert [event["machines"] for event in by_kind["workers"]] == [2, 1, 2]
    assert by_kind["workers"][0]["hardware"] == "2 CPU workers on 2 machines, gloo"
    (restart,) = by_kind["restart"]
    assert "is lost" in restart["text"]
    shrunk, grown = by_kind["resumed"]
    # Every epoch is counted once, in its order. One that was safe, but not told of before the
    # machine was lost, comes with what the next workers begin with.
    told = [event["epoch"] for event in by_kind["epoch"]]
    assert told == sorted(set(told))
    handed_on = range(1, 1 + len(shrunk["history"]))
    assert {*told, *handed_on} == set(range(1, epochs + 1))
    saved = [event["epoch"] * steps + event["done"] for event in by_kind["checkpoint"]]
    before_the_loss = [place for place, event in zip(saved, by_kind["checkpoint"], strict=True)
                       if event["time"] < restart["time"]]  # fmt: skip
    assert shrunk["epoch"] * steps + shrunk["done"] >= before_the_loss[-1]
    # Growing loses nothing: the new workers go on at the step at which the old ones have stopped.
    (stopped,) = by_kind["stopped"]
    assert (grown["epoch"], grown["done"]) == (stopped["epoch"], stopped["done"])
    assert (tmp_path / "checkpoints" / f"epoch-{epochs:04d}" / "manifest.json").exists()


@pytest.mark.slow
def test_an_elastic_training_that_loses_a_worker_ends_with_the_weights_of_a_fixed_one(
    command_line, undisturbed
):
    run = command_line.watch(*SETTINGS, "scaling.workers=1..2")
    command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000040")
    workers = workers_of(run.process.pid)
    assert len(workers) == 2, "both cores are free, so Ray takes both"
    workers[-1].kill()
    run.wait_for_line("continuing after step")
    output = run.end(0, BEGINNING)
    assert "1 to 2 CPU workers, gloo" in output
    assert_equal_bit_for_bit(command_line.weights(NAME, 2), undisturbed)
