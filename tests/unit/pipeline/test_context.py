"""The same training, whether one process computes a batch or several share it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data_prep
import models
from pipeline.config import Recipe
from pipeline.context import TrainContext, WatchedContext, Wish
from pipeline.stopping import StopRequest
from pipeline.training_step import TrainingStep

REPOSITORY = Path(__file__).parents[3]
STEPS, BATCH, RATE = 5, 64, 0.1

#: Three processes in a group, then the first two; forked, so that torch is imported once.
PROGRAM = f"""
import json, multiprocessing, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
import torch
import torch.distributed as dist
from pipeline.context import ProcessGroupContext
from tests.unit.pipeline.test_context import after_wrapping, course

folder = Path(sys.argv[1])
torch.set_num_threads(1)

def run(rank):
    for world_size, parts in ((3, 1), (3, 2), (2, 1)):
        if rank >= world_size:
            continue
        meeting = f"file://{{folder}}/{{world_size}}-{{parts}}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        machine = "last" if rank == 2 else "first"
        context = ProcessGroupContext(lambda event: None, torch.device("cpu"), machine)
        answer = course(context, folder / "prepared", parts) | context.describe_workers()
        answer |= after_wrapping(context)
        (folder / f"{{world_size}}-{{parts}}-{{rank}}.json").write_text(json.dumps(answer))
        dist.destroy_process_group()

fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=run, args=(rank,)) for rank in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(any(process.exitcode for process in processes))
"""


def network() -> nn.Sequential:
    """Without batch norm, whose statistics are those of a rank's share."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)
    )


def loader(prepared: Path, context: TrainContext) -> data_prep.Loader:
    return data_prep.make_loader(
        data_prep.prepare("digits", prepared=prepared, synthetic=(400, 10)),
        "train",
        batch_size=BATCH,
        training=True,
        rank=context.rank,
        world_size=context.world_size,
        reading=data_prep.Reading("torch"),
    )


def course(context: TrainContext, prepared: Path, parts: int = 1) -> dict:
    """Loss of each step over all ranks, and what the network answers in the end."""
    torch.set_default_dtype(torch.float64)
    model = network()
    recipe = Recipe(batch_size=BATCH, accumulation=parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    step = TrainingStep(recipe, model, context.wrap(model), optimizer, context, classes=10)
    losses = []
    with loader(prepared, context).epoch(0) as batches:
        for _, (images, labels) in zip(range(STEPS), batches, strict=False):
            loss, _ = step(images.double(), labels, RATE)
            total = loss.double() * len(labels) / BATCH
            context.sum_over_ranks(total)
            losses.append(float(total))
    return {"losses": losses, "weights": model.get_parameter("3.weight").sum(dim=1).tolist()}


def after_wrapping(context: TrainContext) -> dict:
    """A weight and a frozen bank of patterns, of a network that is different on each rank."""
    model = models.create_model("resnet20", "step", num_classes=10, image_size=32)
    constants = models.constant_buffers(model)
    trained, frozen = model.get_parameter("fc.weight"), model.get_buffer(next(iter(constants)))
    nn.init.constant_(trained, 10 + context.rank)
    frozen.fill_(10 + context.rank)
    context.wrap(model)
    return {"trained": float(trained.detach().mean()), "frozen": float(frozen.mean())}


def plain_course(prepared: Path) -> dict:
    """The same without any of the pipeline's training: a loop as in torch's tutorial."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    losses = []
    with loader(prepared, TrainContext(lambda event: None)).epoch(0) as batches:
        for _, (images, labels) in zip(range(STEPS), batches, strict=False):
            loss = F.cross_entropy(model(images.double()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {"losses": losses, "weights": model.get_parameter("3.weight").sum(dim=1).tolist()}


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_two_or_three_processes_train_as_one_does_also_where_they_do_not_divide_the_batch(
    tmp_path, double_precision
):
    expected = plain_course(tmp_path / "prepared")
    alone = course(TrainContext(lambda event: None, torch.device("cpu")), tmp_path / "prepared", 3)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    courses = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(courses) == 2 + 3 + 3
    for found in (alone, *courses):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-12)
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-9)
    assert courses[0]["hardware"] == "2 CPU workers, gloo" and courses[0]["machines"] == 1
    assert courses[2]["hardware"] == "3 CPU workers on 2 machines, gloo"
    # Weights begin as rank 0 has them; what each rank makes of the seed itself is not sent.
    assert [found["trained"] for found in courses] == [10] * 8
    assert [found["frozen"] for found in courses] == [10, 11, 10, 11, 12, 10, 11, 12]


def test_a_training_in_this_process_that_hangs_is_noted_once(monkeypatch):
    monkeypatch.setattr("pipeline.workers.watchdog.INTERVAL", 0.02)
    told: list[dict] = []
    with WatchedContext(told.append, StopRequest(lambda: None), 0.1) as context:
        for step in range(3):
            context.beat("computing", step)
            time.sleep(0.05)
        assert told == []
        context.beat("reading images", 3)
        time.sleep(0.4)
    (note,) = told
    assert note["kind"] == "note"
    assert note["text"] == "the training hangs: nothing for 0 s at step 3, reading images"


def test_a_signal_is_a_wish_to_stop_of_a_training_in_this_process():
    received: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: received.append(number))
    try:
        with (
            StopRequest(lambda: None) as stop,
            WatchedContext(lambda event: None, stop, 300.0) as context,
        ):
            assert context.wish() is Wish.NOTHING
            os.kill(os.getpid(), signal.SIGHUP)
            assert context.wish() is Wish.STOP and received == []
            stop.finish()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert received == [signal.SIGHUP]
