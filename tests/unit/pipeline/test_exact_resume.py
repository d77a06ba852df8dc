"""A training that is stopped at any step ends with the weights of one that was left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data_prep
from pipeline import inputs, meter
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointStore
from pipeline.config import Checkpointing, Experiment, Recipe
from pipeline.context import ProcessGroupContext, TrainContext, Wish
from pipeline.loop import train
from tests.unit.pipeline.small_training import forge

REPOSITORY = Path(__file__).parents[3]
IMAGES, BATCH, EPOCHS = 240, 48, 2
STEPS = IMAGES // BATCH

#: Processes of groups, forked so that all is imported once. Arguments: folder, plans by name.
PROGRAM = f"""
import json, multiprocessing, sys
import torchvision
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.unit.pipeline.test_exact_resume import part_of_a_group
fork = multiprocessing.get_context("fork")
for name, plan in json.loads(sys.argv[2]).items():
    for number, (world_size, stop) in enumerate(plan):
        arguments = (f"{{sys.argv[1]}}/{{name}}", number, world_size, stop)
        processes = [
            fork.Process(target=part_of_a_group, args=(*arguments, rank))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(autouse=True)
def check_after_every_step(monkeypatch):
    monkeypatch.setattr(meter, "CHECK_STEPS", 1)


def manifest_in(folder: Path):
    return data_prep.prepare("digits", prepared=folder, synthetic=(IMAGES, 30))


def experiment_with(
    checkpoint: Checkpointing | None = None, method: str = "ternary", **settings
) -> Experiment:
    recipe = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 0.02, "shift": 2, **settings}
    return Experiment(
        name="digits_lenet5",
        dataset="digits",
        backbone="lenet5",
        method=method,
        train=Recipe(**recipe),
        checkpoint=checkpoint or Checkpointing(keep=100),
        data={"backend": "torch"},
    )


def stopping_after(steps: int | None):
    """What a training is asked that shall stop after so many checks."""
    asked = [0]

    def wish() -> Wish:
        asked[0] += 1
        return Wish.STOP if asked[0] == steps else Wish.NOTHING

    return wish


def go(experiment, manifest, folder: Path, stop: int | None = None) -> list[dict]:
    """Train in this process until it stops after so many checks, or to the end."""
    events: list[dict] = []
    context = TrainContext(events.append, torch.device("cpu"), stopping_after(stop))
    train(experiment, manifest, CheckpointStore(LocalStorage(folder), "identity", 100), context)
    return events


def assert_same_end(folder: Path, expected: Path) -> None:
    """All tensors of the last checkpoint, of the network, its average and the optimizer."""
    last = f"epoch-{EPOCHS:04d}"
    files = sorted(path.name for path in (expected / last).glob("*.safetensors"))
    assert "model.safetensors" in files and "optimizer.safetensors" in files
    for name in files:
        mine, theirs = load_file(folder / last / name), load_file(expected / last / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(mine[key], tensor), (name, key)


def assert_stopping_changes_nothing(experiment, manifest, folder: Path, stops) -> None:
    """A training that stops after so many checks, again and again, ends as one left alone."""
    whole = go(experiment, manifest, folder / "whole")
    stopped = []
    for stop in stops:
        events = go(experiment, manifest, folder / "broken", stop)
        stopped += [(e["epoch"], e["done"]) for e in events if e["kind"] == "stopped"]
    assert any(done for _, done in stopped), "for this test, some have to be within an epoch"
    resumed = go(experiment, manifest, folder / "broken")
    assert resumed[-1]["kind"] == "evaluation"
    assert_same_end(folder / "broken", folder / "whole")
    assert computed(history(folder / "broken")) == computed(history(folder / "whole"))
    assert {**resumed[-1], "time": 0} == {**whole[-1], "time": 0}


SETTINGS = [
    {},
    {"optimizer": "adamw", "ema_decay": 0.9, "clip_norm": 1.0, "label_smoothing": 0.1},
    {"optimizer": "lamb", "mixup": 0.2, "cutmix": 1.0},
    {"precision": "float16", "accumulation": 2},
    {"method": "float", "optimizer": "adam"},
    {"method": "binary", "optimizer": "rmsprop"},
    {"method": "sparse", "ema_decay": 0.9},
    {"method": "step", "optimizer": "adam", "ema_decay": 0.9},
    {"method": "sparse+ternary", "loss": "square-hinge"},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "sgd")
def test_a_training_stopped_at_random_steps_ends_bit_for_bit_as_one_left_alone(
    prepared, tmp_path, settings
):
    random.seed(str(settings))
    stops = [random.randint(1, 4) for _ in range(4)]
    experiment = experiment_with(**settings)
    assert_stopping_changes_nothing(experiment, manifest_in(prepared), tmp_path, stops)


def test_so_does_one_stopped_at_the_first_and_the_last_step_of_an_epoch(prepared, tmp_path):
    experiment = experiment_with(
        optimizer="adamw", ema_decay=0.9, validation=48, schedule="plateau", patience=0
    )
    steps = (IMAGES - 48) // BATCH
    # Then the end of the first epoch is the first check, and the next step the second.
    assert_stopping_changes_nothing(experiment, manifest_in(prepared), tmp_path, (steps, 2))
    within = {path.name for path in (tmp_path / "broken").glob("*-step-*")}
    assert within == {f"epoch-0000-step-{steps:06d}", "epoch-0001-step-000001"}


def history(folder: Path) -> list[dict]:
    """Of all epochs, as the last checkpoint has it."""
    state = json.loads((folder / f"epoch-{EPOCHS:04d}" / "state.json").read_text())
    return state["history"]


def computed(epochs: list[dict]) -> list[dict]:
    """Without what is measured with a clock."""
    names = ("train_loss", "train_top1", "lr", "test_top1", "validation_loss")
    return [{name: epoch.get(name) for name in names} for epoch in epochs]


def test_checkpoints_lie_within_epochs_at_the_steps_that_are_wanted(prepared, tmp_path):
    experiment = experiment_with(Checkpointing(steps=3, keep=100))
    events = go(experiment, manifest_in(prepared), tmp_path)
    told = [(e["epoch"], e["done"]) for e in events if e["kind"] == "checkpoint"]
    # Steps 3, 6 and 9 of five in an epoch; the end of an epoch is one anyway.
    assert told == [(0, 3), (1, 1), (1, 4)]
    names = {path.name for path in tmp_path.glob("epoch-*")}
    within = {f"epoch-{epoch:04d}-step-{done:06d}" for epoch, done in told}
    assert names == within | {"epoch-0001", "epoch-0002"}


def test_checkpoints_are_made_by_the_clock(prepared, tmp_path):
    experiment = experiment_with(Checkpointing(minutes=1e-6, keep=100))
    events = go(experiment, manifest_in(prepared), tmp_path)
    assert {e["epoch"] for e in events if e["kind"] == "checkpoint"} == {0, 1}


def test_a_checkpoint_on_demand_changes_nothing(prepared, tmp_path):
    manifest, experiment = manifest_in(prepared), experiment_with()
    go(experiment, manifest, tmp_path / "whole")
    events: list[dict] = []
    context = TrainContext(events.append, torch.device("cpu"), lambda: Wish.CHECKPOINT)
    store = CheckpointStore(LocalStorage(tmp_path / "asked"), "identity", 100)
    train(experiment, manifest, store, context)
    assert sum(event["kind"] == "checkpoint" for event in events) == EPOCHS * STEPS
    assert_same_end(tmp_path / "asked", tmp_path / "whole")


def part_of_a_group(folder: str, number: int, world_size: int, stop: int | None, rank: int) -> None:
    """One process of a training of several; notes the labels that it has seen, by step."""
    torch.set_num_threads(1)
    meter.CHECK_STEPS = 1
    place = Path(folder)
    meeting = f"file://{folder}/meeting-{number}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    context = ProcessGroupContext(lambda event: None, torch.device("cpu"))
    context._asked = stopping_after(stop if rank == world_size - 1 else None)
    seen: dict[str, list[float]] = {}
    make_loader = inputs.make_loader

    def noting_loader(experiment, manifest, split, **options):
        loader = make_loader(experiment, manifest, split, **options)
        return Noting(loader, seen) if split == "train" else loader

    inputs.make_loader = noting_loader
    manifest = manifest_in(place.parent / "prepared")
    store = CheckpointStore(LocalStorage(place / "checkpoints"), "identity", 100)
    train(experiment_with(), manifest, store, context)
    (place / f"seen-{number}-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


class Noting:
    """A loader that notes a number for each image that it gives, by epoch and step."""

    def __init__(self, loader, seen):
        self._loader, self._seen = loader, seen

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def epoch(self, epoch, start_step=0):
        loader = self._loader

        class Epoch:
            def __enter__(mine):
                mine.inner = loader.epoch(epoch, start_step)
                return mine.noted(mine.inner.__enter__())

            def noted(mine, batches):
                for step, (images, labels) in enumerate(batches, start=start_step):
                    self._seen[f"{epoch}-{step}"] = images.double().sum(dim=(1, 2, 3)).tolist()
                    yield images, labels

            def __exit__(mine, *error):
                return mine.inner.__exit__(*error)

        return Epoch()


def train_in_groups(folder: Path, plans: dict[str, list[tuple[int, int | None]]]) -> None:
    """By name, one group after the other: number of processes, and the check after which it stops.

    They start from what the group before has left in the folder of that name.
    """
    manifest_in(folder / "prepared")
    for name in plans:
        (folder / name).mkdir()
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(plans)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def images_seen(folder: Path) -> dict[str, list[float]]:
    """The images of each step in the order of the ranks; of groups, what the last has seen."""
    seen: dict[str, list[float]] = {}
    files = sorted(folder.glob("seen-*.json"), key=lambda file: file.stem)
    for file in files:
        for step, images in json.loads(file.read_text()).items():
            seen[step] = images if file.stem.endswith("-0") else seen[step] + images
    return seen


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Trainings of several processes: one left alone, and others that were stopped."""
    folder = tmp_path_factory.mktemp("groups")
    plans: dict[str, list[tuple[int, int | None]]] = {
        "whole": [(3, None)],
        "broken": [(3, 3), (3, None)],
        "smaller": [(2, 3), (1, None)],
    }
    train_in_groups(folder, plans)
    return folder


def test_so_does_a_training_of_three_processes(groups):
    assert_same_end(groups / "broken" / "checkpoints", groups / "whole" / "checkpoints")
    assert images_seen(groups / "broken") == images_seen(groups / "whole")


@pytest.mark.slow
def test_so_does_a_training_of_two_processes(tmp_path):
    train_in_groups(tmp_path, {"whole": [(2, None)], "broken": [(2, 3), (2, 7), (2, None)]})
    assert_same_end(tmp_path / "broken" / "checkpoints", tmp_path / "whole" / "checkpoints")
    assert images_seen(tmp_path / "broken") == images_seen(tmp_path / "whole")


def test_another_number_of_processes_goes_on_with_the_same_images_in_the_same_order(groups):
    seen = images_seen(groups / "smaller")
    assert seen == images_seen(groups / "whole")
    assert len(seen) == EPOCHS * STEPS
    epochs = history(groups / "smaller" / "checkpoints")
    expected = history(groups / "whole" / "checkpoints")
    # Batch norm sees other shares of the batch: nearly the same, not to the bit.
    assert epochs[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=0.1)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (
            "epoch-0000-step-000003",
            {"step": 7},
            "after 7 steps, 3 of epoch 1, where an epoch has 5",
        ),
        ("epoch-0000-step-000006", {"step": 6, "done": 6}, "after 6 steps, 6 of epoch 1, where"),
        ("epoch-0003", {"step": 15, "epoch": 3, "done": 0, "history": [{}] * 3}, "15 steps, 0 of"),
        ("epoch-0001", {"step": 5, "epoch": 1, "done": 0, "history": [{}]}, "there is no evaluate"),
    ],
)
def test_a_position_at_which_a_training_never_is_is_skipped_by_name(
    prepared, tmp_path, name, change, problem
):
    """Made up, with the right identity and checksums."""
    manifest, experiment = manifest_in(prepared), experiment_with()
    go(experiment, manifest, tmp_path, stop=3)
    folder = (tmp_path / "epoch-0000-step-000003").rename(tmp_path / name)
    record = json.loads((folder / "state.json").read_text())
    forge(folder, "state.json", json.dumps(record | change).encode())
    events = go(experiment, manifest, tmp_path, stop=1)
    (note,) = [event["text"] for event in events if event["kind"] == "note"]
    assert note.startswith(f"checkpoint {name} is skipped: ")
    assert problem in note
    assert not [event for event in events if event["kind"] == "resumed"]
