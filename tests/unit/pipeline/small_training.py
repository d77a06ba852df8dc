"""A training small enough to be saved and restored in a few milliseconds, and its checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoints.state import Progress, Snapshot, TrainingState
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointStore
from pipeline.config import Recipe
from pipeline.optim import build_optimizer

#: What each of two ranks has of its own within an epoch.
ROWS = {"statistics": torch.randn(2, 5), "counted": torch.randn(2, 4, dtype=torch.float64)}
ROW = {name: rows[0] for name, rows in ROWS.items()}


def small_training(
    optimizer: str = "sgd", precision: str = "float32", lr: float = 0.1
) -> TrainingState:
    """A network with batch norm, its average, and an optimizer that has made no step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    recipe = Recipe.model_validate({"optimizer": optimizer, "lr": lr})
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16", growth_interval=2)
    return TrainingState(model, build_optimizer(model, recipe), scaler, copy.deepcopy(model))


def make_step(state: TrainingState, number: int) -> None:
    """An optimizer step on made-up images that the number decides."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(8, 2, 8, 8, generator=generator)
    loss = state.model(images).square().mean()
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    assert state.average is not None
    for mean, weight in zip(state.average.parameters(), state.model.parameters(), strict=True):
        mean.data.lerp_(weight.data, 0.5)


def store_in(folder: Path, keep: int = 2, identity: str = "identity") -> CheckpointStore:
    """The checkpoints in a folder."""
    return CheckpointStore(LocalStorage(folder), identity, keep)


def save(
    store: CheckpointStore,
    state: TrainingState,
    epoch: int,
    done: int = 0,
    history: list[dict[str, float]] | None = None,
) -> None:
    """A checkpoint after so many epochs of ten steps, and some more steps."""
    progress = Progress(epoch, 10 * epoch + done, history or [{}] * epoch, done)
    store.save(Snapshot.of(state, progress, ROWS if done else {}))


def saved(folder: Path, epochs: int = 2, keep: int = 2) -> CheckpointStore:
    """A folder with a checkpoint of each epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _contents(epochs, keep).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return store_in(folder, keep)


@cache
def _contents(epochs: int, keep: int) -> dict[str, bytes]:
    """Of the files of such a folder: many tests need one, and each would wait for the disk."""
    state = small_training()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for epoch in range(1, epochs + 1):
            make_step(state, epoch)
            save(store_in(folder, keep), state, epoch)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def forge(folder: Path, file: str, content: bytes, name: str | None = None) -> None:
    """Change a file as somebody would who wants it believed: size and checksum are right."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if name is None:
        (folder / file).write_bytes(content)
    said = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][file if name is None else name] = said
    path.write_text(json.dumps(manifest))
