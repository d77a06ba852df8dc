"""What a checkpoint costs the training: written while it waits, and written beside it.

Each network trains on made-up images of 64 pixels, with the tensors that it has for ImageNet.
`waits, in full` is how long the training stands still when it waits until the checkpoint is safe;
`waits, beside` how long when only a copy is made and a thread does the rest, and `safe after` when
that is on the disk. `steps meanwhile` is the time of the training steps during which it is written,
over that of steps without; on a CPU both want the same cores. The shares are those of a training
that saves every ten minutes: of the waiting, and with what slower steps add to it. Medians over the
rounds, the first of which is a warm-up.

    python tests/benchmarks/checkpoint_cost.py
    python tests/benchmarks/checkpoint_cost.py --device cuda --networks resnet50 --folder /data
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from models import create_model
from pipeline.checkpoints.state import Progress, Snapshot, TrainingState
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.config import Checkpointing, Recipe
from pipeline.loop import channels_last
from pipeline.optim import build_optimizer

IMAGE = 64
BATCH = 16
HEADINGS = (
    *("network", "optimizer", "MB", "waits, in full", "waits, beside", "safe after"),
    *("steps meanwhile", "share, in full", "share, beside", "with slower steps"),
)


@dataclass
class Times:
    """Seconds, of each round."""

    in_full: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    safe_after: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    step_meanwhile: list[float] = field(default_factory=list)


def build(network: str, optimizer: str, device: torch.device) -> TrainingState:
    """A training of a network for ImageNet, before its first step."""
    model = create_model(network, num_classes=1000, image_size=224)
    model = channels_last(model.to(device))
    recipe = Recipe.model_validate({"optimizer": optimizer, "lr": 1e-3})
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return TrainingState(model, build_optimizer(model, recipe), scaler)


def stepper(state: TrainingState, device: torch.device) -> Callable[[], float]:
    """A training step, which takes so many seconds."""
    images = torch.randn(BATCH, 3, IMAGE, IMAGE, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), device=device)

    def step() -> float:
        started = time.perf_counter()
        functional.cross_entropy(state.model(images), labels).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def measure(state: TrainingState, folder: Path, device: torch.device, rounds: int) -> Times:
    """Save in both ways, in turns, so that a noisy machine disturbs them alike."""
    store = CheckpointStore(LocalStorage(folder), "benchmark")
    writer, step, times = CheckpointWriter(store), stepper(state, device), Times()
    for epoch in range(1, 2 * (rounds + 1), 2):
        usual = [step() for _ in range(3)]
        started = time.perf_counter()
        store.save(Snapshot.of(state, Progress(epoch, epoch, [{}] * epoch)))
        in_full = time.perf_counter() - started

        started = time.perf_counter()
        writer.start(state, Progress(epoch + 1, epoch + 1, [{}] * (epoch + 1)), {})
        beside = time.perf_counter() - started
        meanwhile = []
        while writer.busy:
            meanwhile.append(step())
        writer.wait()
        safe_after = time.perf_counter() - started
        if epoch == 1:
            continue
        times.in_full.append(in_full)
        times.beside.append(beside)
        times.safe_after.append(safe_after)
        times.step += usual
        times.step_meanwhile += meanwhile
    return times


def row(network: str, optimizer: str, times: Times, megabytes: float) -> list[str]:
    """A line of the table."""
    minutes = Checkpointing().minutes
    assert minutes is not None
    in_full, beside, safe_after, step, meanwhile = (
        statistics.median(values)
        for values in (
            *(times.in_full, times.beside, times.safe_after),
            *(times.step, times.step_meanwhile),
        )
    )
    slower = max(0.0, 1 - step / meanwhile) * safe_after
    between = 60 * minutes
    return [
        *(network, optimizer, f"{megabytes:.0f}"),
        *(f"{1000 * in_full:.0f} ms", f"{1000 * beside:.0f} ms", f"{safe_after:.1f} s"),
        f"{meanwhile / step:.2f}",
        *(f"{100 * in_full / between:.3f} %", f"{100 * beside / between:.3f} %"),
        f"{100 * (beside + slower) / between:.3f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=("resnet18", "resnet50"))
    parser.add_argument("--optimizers", nargs="+", default=("sgd", "adamw"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary one")
    options = parser.parse_args()
    device = torch.device(options.device)
    where = f"{device.type}, {torch.get_num_threads()} threads"
    table = Table(title=f"a checkpoint, every {Checkpointing().minutes:g} minutes ({where})")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for network, optimizer in product(options.networks, options.optimizers):
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            state = build(network, optimizer, device)
            times = measure(state, Path(scratch), device, options.rounds)
            newest = max(Path(scratch).iterdir())
            size = sum(file.stat().st_size for file in newest.iterdir())
        table.add_row(*row(network, optimizer, times, size / 1e6))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
