"""Runs that are killed or stopped and still end with the weights of a run left in peace."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.command_line import (
    BEGINNING,
    CommandLine,
    assert_equal_bit_for_bit,
    survivors,
    workers_of,
    writer_of,
)

#: 100 steps of some 20 ms in each of two epochs.
NAME = "digits_lenet5_ternary"
SETTINGS = ("train.epochs=2", "train.batch_size=8", "data.synthetic=[800,64]")
UNTRACKED = (*SETTINGS, "tracking.enabled=false")
OFTEN = "checkpoint.steps=20"

#: With checkpoints of 113 MB and batch norm, whose statistics differ from worker to worker.
LARGE = "digits_vgg16"
LARGE_SETTINGS = (
    *("train.epochs=2", "train.batch_size=4", "data.synthetic=[48,8]", "checkpoint.steps=2"),
    "tracking.enabled=false",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prepared):
    """Final weights of an uninterrupted run, by experiment and launcher."""
    found = {}

    def weights(launcher: str, name: str = NAME):
        if (name, launcher) not in found:
            folder = tmp_path_factory.mktemp("undisturbed") / "project"
            command_line = CommandLine(folder, prepared)
            settings = LARGE_SETTINGS if name == LARGE else UNTRACKED
            command_line.run("--experiment", name, *settings, f"scaling.launcher={launcher}")
            found[name, launcher] = command_line.weights(name, 2)
        return found[name, launcher]

    return weights


def saving(command_line: CommandLine, name: str) -> Callable[[], bool]:
    """Whether a checkpoint of the run is being written at this moment."""
    runs = command_line.folder / "runs" / name
    return lambda: any(runs.glob("*/checkpoints/.partial-*/*"))


@pytest.mark.slow
def test_a_worker_killed_in_mid_epoch_changes_nothing(command_line, undisturbed):
    run = command_line.watch("--experiment", NAME, *UNTRACKED, OFTEN)
    command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000040")
    workers = workers_of(run.process.pid)
    assert len(workers) == 2
    workers[-1].kill()
    killed = time.monotonic()
    resumed = run.wait_for_line("continuing after step") - killed
    print(f"{resumed:.1f} s from the kill to the restored state")
    output = run.end(0, BEGINNING)
    assert "killed" in output and "restarting from the last checkpoint" in output
    (step,) = re.findall(r"continuing after step (\d+) of epoch 1 of 2", output)
    assert int(step) >= 40 and int(step) % 20 == 0
    assert_equal_bit_for_bit(command_line.weights(NAME, 2), undisturbed("ray"))


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_save_changes_nothing(command_line, undisturbed):
    run = command_line.watch("--experiment", LARGE, *LARGE_SETTINGS)
    command_line.wait_for_checkpoint(run, LARGE, "epoch-0000-step-000004")
    writer = writer_of(run.process.pid)
    run.wait_until(saving(command_line, LARGE), "another save")
    writer.kill()
    run.wait_for_line("continuing after step")
    run.end(0, BEGINNING)
    folder = command_line.run_folder(LARGE) / "checkpoints"
    assert not list(folder.glob(".*")), "what the killed writer left is removed"
    assert_equal_bit_for_bit(command_line.weights(LARGE, 2), undisturbed("ray", LARGE))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while it saves", "while workers start"])
def test_nothing_of_a_driver_that_is_killed_stays_behind(command_line, undisturbed, moment):
    settings = ("--experiment", LARGE, *LARGE_SETTINGS)
    run = command_line.watch(*settings)
    if moment == "while it saves":
        command_line.wait_for_checkpoint(run, LARGE, "epoch-0000-step-000004")
        run.wait_until(saving(command_line, LARGE), "another save")
    else:
        run.wait_until(lambda: bool(workers_of(run.process.pid)), "a worker", BEGINNING)
    processes = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.wait()
    # Two small agents look for their machine's other processes for a minute before they end.
    computing = [process for process in processes if "Agent" not in process.name()]
    assert not survivors(computing, 20)
    assert not survivors(processes, 90)
    resumed = command_line.run(*settings, "--resume")
    assert ("continuing after step" in resumed) == (moment == "while it saves")
    assert_equal_bit_for_bit(command_line.weights(LARGE, 2), undisturbed("ray", LARGE))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_goes_on_from_each_of_them(command_line, undisturbed):
    settings = ("--experiment", LARGE, *LARGE_SETTINGS, "scaling.launcher=local")
    whole = undisturbed("local", LARGE)
    chance = random.Random(0)
    resume: tuple[str, ...] = ()
    for _ in range(5):
        run = command_line.watch(*settings, *resume)
        run.wait_for_line("opening the prepared data")
        time.sleep(chance.uniform(0.0, 4.0))
        run.process.kill()
        run.process.wait()
        resume = ("--resume",)
    command_line.run(*settings, "--resume")
    assert_equal_bit_for_bit(command_line.weights(LARGE, 2), whole)


@pytest.mark.parametrize(
    ("number", "launcher", "code"),
    [
        (signal.SIGINT, "local", 130),
        pytest.param(signal.SIGINT, "ray", 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "local", 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "ray", 143, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_saves_within_the_epoch_and_says_how_to_go_on(
    command_line, undisturbed, number, launcher, code
):
    settings = (*SETTINGS, "tracking.register_model=false", f"scaling.launcher={launcher}")
    run = command_line.watch("--experiment", NAME, *settings, OFTEN)
    command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000020")
    if number == signal.SIGINT:
        # As a terminal does it: the signal reaches the whole group, Ray's processes too.
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    stopped = run.end(code)
    (step,) = re.findall(r"saved after step (\d+) of epoch 1 of 2", stopped)
    name = command_line.run_folder(NAME).name
    assert stopped.splitlines()[-1].endswith(f"--resume {name}"), stopped

    resumed = command_line.run("--experiment", NAME, *settings, "--resume", name)
    assert f"continuing after step {step} of epoch 1 of 2" in resumed
    assert command_line.run_folder(NAME).name == name, "the resumed run keeps its folder"
    assert_equal_bit_for_bit(command_line.weights(NAME, 2), undisturbed(launcher))
    assert_one_tracked_run(command_line)


def assert_one_tracked_run(command_line: CommandLine) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{command_line.folder}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == NAME]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "test_top1")
    assert [entry.step for entry in history] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("second", "code", "seconds"), [(signal.SIGINT, 130, 10), (None, 143, 50)])
def test_a_run_that_cannot_save_ends_all_the_same(command_line, second, code, seconds):
    """Its workers are frozen: the second Ctrl-C ends it at once, and so does the end of the grace.

    A cluster kills what has not ended 30 s after its first signal, and this is how it asks.
    """
    run = command_line.watch("--experiment", NAME, *UNTRACKED, OFTEN)
    command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000020")
    processes = psutil.Process(run.process.pid).children(recursive=True)
    for worker in workers_of(run.process.pid):
        worker.suspend()
    run.process.send_signal(signal.SIGINT if second else signal.SIGTERM)
    time.sleep(2)
    assert run.process.poll() is None, "it waits for the workers to save"
    if second:
        run.process.send_signal(second)
    output = run.end(code, seconds)
    assert output.splitlines()[-1].endswith(f"--resume {command_line.run_folder(NAME).name}")
    assert not survivors(processes, 20)


@pytest.mark.slow
def test_a_run_is_resumed_by_another_number_of_workers_with_the_same_batches(
    command_line, tmp_path, prepared
):
    """Without batch norm, which sees shares of batches, the weights are nearly the same."""
    name = "digits_vgg11"
    network = "backbone=vgg11(batch_norm=false, init=xavier)"
    settings = ("--experiment", name, *LARGE_SETTINGS, network, "train.lr=0.01")
    whole = CommandLine(tmp_path / "whole", prepared)
    whole.run(*settings, "scaling.workers=1")
    run = command_line.watch(*settings, "scaling.workers=1")
    command_line.wait_for_checkpoint(run, name, "epoch-0000-step-000004")
    run.process.terminate()
    run.end(143)
    resumed = command_line.run(*settings, "scaling.workers=2", "--resume")
    assert re.search(r"continuing after step \d+ of epoch 1 of 2", resumed)
    assert "the number of workers changed from 1 to 2" in resumed
    weights, expected = command_line.weights(name, 2), whole.weights(name, 2)
    for key, tensor in expected.items():
        difference = (weights[key] - tensor).norm() / tensor.norm()
        assert difference < 1e-3, key


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_a_loss_that_is_not_finite_names_its_step_and_leaves_the_last_good_state(
    command_line, launcher
):
    """The learning rate becomes absurd after the first epoch."""
    broken = (
        *("train.schedule=multistep", "train.schedule_unit=epoch", "train.milestones=[1]"),
        *("train.gamma=1e30", "train.warmup_epochs=0", f"scaling.launcher={launcher}"),
    )
    run = command_line.watch("--experiment", NAME, *UNTRACKED, *broken)
    output = run.end(1, 120)
    problem = r"^error: the (loss was not finite at step|weights were not finite after) 1\d\d"
    assert re.search(problem, output, re.MULTILINE), output
    assert "restarting" not in output
    (last,) = command_line.checkpoints(NAME)
    assert last.name == "epoch-0001"
    assert all(tensor.isfinite().all() for tensor in command_line.weights(NAME, 1).values())


def test_other_settings_do_not_continue_a_run(tmp_path, monkeypatch, capsys, prepared):
    from pipeline.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["--experiment", NAME, "--smoke", "tracking.enabled=false", "data.backend=torch"]
    words.append(f"data.prepared={prepared}")
    assert main(words) == 0
    (folder,) = Path("runs/smoke", NAME).iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main([*words, "train.lr=0.123", "--resume", folder.name]) == 2
    line = capsys.readouterr().err
    assert f"run {folder.name} cannot be continued" in line
    assert re.search(r"train\.lr=\S+ \(now 0\.123\)", line), line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
