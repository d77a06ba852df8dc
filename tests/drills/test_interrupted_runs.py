"""Runs that are killed and still end with the weights of a run that was left in peace."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.command_line import CommandLine, wait_for, workers_of

NAME = "digits_lenet5_ternary"
SETTINGS = ("train.epochs=4", "train.batch_size=32", "data.synthetic=[2048,64]")
UNTRACKED = (*SETTINGS, "tracking.enabled=false")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prepared):
    """Final weights of the uninterrupted run."""
    command_line = CommandLine(tmp_path_factory.mktemp("undisturbed") / "project", prepared)
    command_line.run("--experiment", NAME, *UNTRACKED)
    return command_line.weights(NAME, 4)


def assert_equal_bit_for_bit(weights, expected):
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


def in_the_middle_of_epoch_two(command_line):
    parent = command_line.folder / "runs" / NAME
    wait_for(
        lambda: bool(list(parent.glob("*/checkpoints/epoch-0001/manifest.json"))),
        120,
        "the first checkpoint",
    )
    time.sleep(0.3)


def test_a_worker_killed_in_mid_epoch_changes_nothing(command_line, undisturbed):
    process = command_line.start("--experiment", NAME, *UNTRACKED)
    in_the_middle_of_epoch_two(command_line)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    workers[-1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert re.search(r"killed or crashed; restarting from the last checkpoint", output)
    assert "continuing after epoch" in output
    assert "Traceback" not in output
    assert_equal_bit_for_bit(command_line.weights(NAME, 4), undisturbed)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_says_how_to_resume_and_does(command_line, undisturbed, number, code):
    settings = (*SETTINGS, "tracking.register_model=false")
    process = command_line.start("--experiment", NAME, *settings)
    in_the_middle_of_epoch_two(command_line)
    if number == signal.SIGINT:
        # As a terminal does it: the signal reaches the whole group, Ray's processes too.
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    name = command_line.run_folder(NAME).name
    if number != signal.SIGKILL:
        assert output.splitlines()[-1].endswith(f"--resume {name}"), output
    wait_for(lambda: not Path(f"/proc/{process.pid}").exists(), 10, "the end of the driver")

    resumed = command_line.run("--experiment", NAME, *settings, "--resume")
    assert "continuing after epoch" in resumed
    assert command_line.run_folder(NAME).name == name, "the resumed run keeps its folder"
    assert_equal_bit_for_bit(command_line.weights(NAME, 4), undisturbed)
    assert_one_tracked_run(command_line)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_at_once_without_restarts(command_line):
    broken = ("train.lr=1e30", "train.schedule=constant", "train.warmup_epochs=0")
    process = command_line.start("--experiment", NAME, *UNTRACKED, *broken)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert re.search(
        r"^error: the loss was not finite at step \d+ \(epoch 1\)", output, re.MULTILINE
    )
    assert "restarting" not in output
    assert "Traceback" not in output


def assert_one_tracked_run(command_line):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{command_line.folder}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == NAME]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "test_top1")
    assert [entry.step for entry in history] == [1, 2, 3, 4]
