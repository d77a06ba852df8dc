from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data_prep
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointStore
from pipeline.config import Experiment, Recipe
from pipeline.context import TrainContext
from pipeline.evaluate import Evaluation, evaluate
from pipeline.failures import TrainingError
from pipeline.launch import train_locally
from pipeline.loop import build_model, train


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return data_prep.prepare(
        "digits", prepared=tmp_path_factory.mktemp("prepared"), synthetic=(100, 30)
    )


def small(**train_settings) -> Experiment:
    settings = {"epochs": 2, "batch_size": 16, "lr": 0.05, "shift": 1, **train_settings}
    return Experiment(
        name="digits_lenet5_ternary",
        dataset="digits",
        backbone="lenet5",
        method="ternary",
        train=Recipe(**settings),
    )


def run(experiment, manifest, folder, tell=lambda event: None):
    events = []

    def both(event):
        events.append(event)
        tell(event)

    context = TrainContext(both)
    context.device = torch.device("cpu")
    store = CheckpointStore(LocalStorage(folder), experiment.identity(manifest.fingerprint))
    train(experiment, manifest, store, context)
    model = build_model(experiment, manifest)
    store.load_model(events[-1]["epoch"], model)
    return model.state_dict(), events


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(manifest, tmp_path):
    first, _ = run(small(), manifest, tmp_path / "a")
    second, _ = run(small(), manifest, tmp_path / "b")
    other, _ = run(small().model_copy(update={"seed": 1}), manifest, tmp_path / "c")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.9, "optimizer": "lamb", "clip_norm": 1.0},
        {"precision": "float16", "accumulation": 2},
        {"mixup": 0.2, "cutmix": 1.0},
        {"validation": 30, "schedule": "plateau", "patience": 0},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_run_stopped_after_an_epoch_ends_with_the_uninterrupted_weights(
    manifest, tmp_path, settings
):
    experiment = small(epochs=3, **settings)
    whole, whole_events = run(experiment, manifest, tmp_path / "whole")

    def stop_after_first(event):
        if event["kind"] == "epoch":
            raise Stop

    with pytest.raises(Stop):
        run(experiment, manifest, tmp_path / "broken", stop_after_first)
    resumed, events = run(experiment, manifest, tmp_path / "broken")
    assert [event["epoch"] for event in events if event["kind"] == "resumed"] == [1]
    assert [event["epoch"] for event in events if event["kind"] == "epoch"] == [2, 3]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    last = [e["metrics"]["train_loss"] for e in whole_events if e["kind"] == "epoch"][1:]
    assert last == [e["metrics"]["train_loss"] for e in events if e["kind"] == "epoch"]


def test_a_finished_training_is_only_evaluated_again(manifest, tmp_path):
    run(small(), manifest, tmp_path)
    _, events = run(small(), manifest, tmp_path)
    kinds = [event["kind"] for event in events]
    assert "epoch" not in kinds
    assert kinds[-1] == "evaluation"


def test_training_learns_the_made_up_images(manifest, tmp_path):
    _, events = run(small(epochs=8), manifest, tmp_path)
    epochs = [event["metrics"] for event in events if event["kind"] == "epoch"]
    assert epochs[-1]["train_loss"] < 0.8 * epochs[0]["train_loss"]
    assert epochs[-1]["test_top1"] > 50, "ten classes: chance is 10 %"
    assert epochs[-1]["lr"] < epochs[0]["lr"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step(manifest, tmp_path):
    experiment = small(epochs=1, optimizer="sgd", lr=1e30, schedule="constant", momentum=0.0,
                       nesterov=False)  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step [1-5] \(epoch 1\)"):
        run(experiment, manifest, tmp_path)
    assert not list(tmp_path.glob("epoch-*")), "no checkpoint of a broken state"


def test_weights_that_broke_in_the_last_step_are_noticed_by_the_evaluation(manifest, tmp_path):
    one_step = small(epochs=1, batch_size=100, lr=1e30, schedule="constant", momentum=0.0,
                     nesterov=False)  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 0 \(epoch 1\)"):
        run(one_step, manifest, tmp_path)
    assert not list(tmp_path.glob("epoch-*"))


def test_a_broken_file_in_training_is_one_line(manifest, tmp_path):
    broken = replace(manifest, folder=tmp_path / "nowhere")
    with pytest.raises(TrainingError, match="is missing") as caught:
        train_locally(small(), broken, tmp_path, lambda event: None)
    assert "\n" not in str(caught.value)


def test_an_unforeseen_error_is_one_line_and_a_trace_in_a_file(manifest, tmp_path):
    def broken(event):
        if event["kind"] == "phase":
            raise KeyError("unforeseen")

    with pytest.raises(TrainingError, match=r"unforeseen.*failure-1\.txt") as caught:
        train_locally(small(epochs=1), manifest, tmp_path, broken)
    assert "\n" not in str(caught.value)
    assert "Traceback" in (tmp_path / "failure-1.txt").read_text()


def test_a_place_that_cannot_be_read_is_one_line(manifest, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(TrainingError, match=r"cannot read checkpoints in .*: Not a directory"):
        train_locally(small(epochs=1), manifest, tmp_path, lambda event: None)


def test_bfloat16_changes_the_arithmetic_and_keeps_float32_weights(manifest, tmp_path):
    weights, events = run(small(epochs=1, precision="bfloat16"), manifest, tmp_path / "low")
    full, _ = run(small(epochs=1), manifest, tmp_path / "full")
    assert weights["conv1.weight"].dtype == torch.float32
    assert not torch.equal(weights["conv1.weight"], full["conv1.weight"])
    assert all(math.isfinite(e["metrics"]["train_loss"]) for e in events if e["kind"] == "epoch")


def test_the_best_held_out_epoch_is_the_result(manifest, tmp_path):
    """A rate that ruins the weights after the first epochs: the last ones are not the best."""
    experiment = small(
        epochs=4, validation=30, schedule="multistep", milestones=(2,), gamma=400.0, batch_size=10
    )
    weights, events = run(experiment, manifest, tmp_path)
    accuracies = [e["metrics"]["validation_top1"] for e in events if e["kind"] == "epoch"]
    best = 1 + accuracies.index(max(accuracies))
    assert best < 4, "for this test the last epoch must not be the best one"
    result = events[-1]
    assert (result["kind"], result["epoch"]) == ("evaluation", best)
    assert all("test_top1" not in e["metrics"] for e in events if e["kind"] == "epoch")

    # What was told is what these weights do on the test split.
    model = build_model(experiment, manifest)
    model.load_state_dict(weights)
    context = TrainContext(lambda event: None)
    context.device = torch.device("cpu")
    loader = data_prep.make_loader(manifest, "test", batch_size=10, training=False)
    again = evaluate(model, loader, context, classes=10, images=30)
    assert torch.equal(again.confusion, Evaluation.from_event(result).confusion)


def test_without_the_best_epoch_the_result_is_the_last_one_and_a_note_says_so(manifest, tmp_path):
    experiment = small(
        epochs=3, validation=30, schedule="multistep", milestones=(1,), gamma=400.0, batch_size=10
    )
    _, events = run(experiment, manifest, tmp_path)
    best = events[-1]["epoch"]
    assert best < 3, "for this test the last epoch must not be the best one"
    (tmp_path / f"epoch-{best:04d}" / "model.safetensors").write_bytes(b"")
    weights, again = run(experiment, manifest, tmp_path)
    (note,) = [e["text"] for e in again if e["kind"] == "note"]
    assert note.endswith("the result is that of epoch 3 instead")
    assert again[-1]["epoch"] == 3
    last = load_file(tmp_path / "epoch-0003" / "model.safetensors")
    assert all(torch.equal(weights[name], last[name]) for name in last)


def test_the_moving_average_is_evaluated_and_kept(manifest, tmp_path):
    weights, events = run(small(ema_decay=0.8), manifest, tmp_path)
    plain, _ = run(small(), manifest, tmp_path / "plain")
    assert not torch.equal(weights["conv1.weight"], plain["conv1.weight"])
    model = build_model(small(), manifest)
    model.load_state_dict(weights)
    context = TrainContext(lambda event: None)
    context.device = torch.device("cpu")
    loader = data_prep.make_loader(manifest, "test", batch_size=10, training=False)
    again = evaluate(model, loader, context, classes=10, images=30)
    assert torch.equal(again.confusion, Evaluation.from_event(events[-1]).confusion)


def test_a_result_of_low_precision_is_evaluated_in_float32(manifest, tmp_path):
    weights, events = run(small(precision="bfloat16"), manifest, tmp_path)
    model = build_model(small(), manifest)
    model.load_state_dict(weights)
    context = TrainContext(lambda event: None)
    context.device = torch.device("cpu")
    loader = data_prep.make_loader(manifest, "test", batch_size=16, training=False)
    exact = evaluate(model, loader, context, classes=10, images=30)
    assert events[-1]["loss"] == pytest.approx(exact.loss, rel=1e-5)
    last = [event["metrics"] for event in events if event["kind"] == "epoch"][-1]
    assert last["test_loss"] != pytest.approx(exact.loss, rel=1e-5), "epochs are evaluated fast"


def test_only_reports_wait_for_the_device(manifest, tmp_path, monkeypatch):
    """Twice the steps of an epoch read no scalar more than the steps once."""
    monkeypatch.setattr("pipeline.loop.PROGRESS_INTERVAL", math.inf)
    waits = []
    for batch_size in (20, 10):
        with torch.profiler.profile() as profile:
            run(small(epochs=1, batch_size=batch_size), manifest, tmp_path / str(batch_size))
        events = profile.events()
        assert events is not None
        assert sum(event.name == "forward" for event in events) == 100 // batch_size
        waits.append(sum(event.name == "aten::_local_scalar_dense" for event in events))
    assert waits[0] == waits[1]


def test_the_loop_needs_torch_and_safetensors_alone():
    """So that it runs from the bare checkout on a machine that has only these."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['pydantic', 'yaml', 'rich', 'ray', 'mlflow', 'ffcv', 'numba', 'sklearn', 'matplotlib']));"
        "import pipeline.loop, pipeline.context"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
