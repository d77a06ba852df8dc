"""Checkpoints: a folder each, whole or not there, and free of anything that could execute.

Tensors travel as safetensors, all else as JSON. A checkpoint is written under a hidden name,
synced, and renamed; its manifest, with the size and SHA-256 of every file, is written last. What
does not match its manifest is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from data_prep import Manifest
    from pipeline.config import Experiment
    from pipeline.weights import Sources

_MANIFEST = "manifest.json"
_MODEL = "model.safetensors"
_AVERAGE = "average.safetensors"
_NAME = re.compile(r"epoch-\d+")


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line that names it."""


@dataclass(frozen=True)
class Progress:
    """How far a training is: complete epochs, optimizer steps, and the metrics of each epoch."""

    epoch: int
    step: int
    history: list[dict[str, float]]


def kept_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """The epoch, from 1, whose weights are the result: the best on held-out images, or the last.

    Args:
        history: metrics of each epoch so far.
    """
    accuracies = [metrics.get("validation_top1") for metrics in history]
    held_out = [accuracy for accuracy in accuracies if accuracy is not None]
    return 1 + accuracies.index(max(held_out)) if held_out else len(history)


def run_identity(experiment: Experiment, manifest: Manifest, sources: Sources) -> str:
    """Hash of the experiment, the images, their normalization, and the weights from elsewhere."""
    given = [manifest.fingerprint, manifest.mean, manifest.std]
    given += [weights.digest for weights in (sources.initial, sources.teacher) if weights]
    return experiment.identity(" ".join(map(str, given)))


def run_checkpoints(
    experiment: Experiment, manifest: Manifest, sources: Sources, folder: Path
) -> CheckpointStore:
    """The checkpoints of the run in this folder."""
    return CheckpointStore(
        folder / "checkpoints",
        run_identity(experiment, manifest, sources),
        experiment.checkpoint.keep,
    )


@dataclass
class TrainingState:
    """What is trained, and all that has to be restored to go on.

    Attributes:
        scaler: of the loss; its state is empty unless the precision is float16.
        average: network with the moving average of the weights; None without one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module | None = None


class CheckpointStore:
    """The checkpoints of one run in one folder, named by the number of complete epochs.

    Args:
        folder: where they lie; made when the first one is saved.
        identity: hash of the experiment and its data; one of another identity is never loaded.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, identity: str, keep: int = 2) -> None:
        self.folder = folder
        self.identity = identity
        self.keep = keep

    def save(self, state: TrainingState, progress: Progress) -> Path:
        """Write a checkpoint and drop those that nobody can need.

        What stays are the newest ``keep``, and the result of each of them (see ``kept_epoch``):
        where the newest turns out to be damaged, the training goes on from an older one, which
        may know another epoch as the best.
        """
        final = self._path(progress.epoch)
        with whole_folder(final) as partial:
            save_file(_contiguous(state.model.state_dict()), partial / _MODEL)
            if state.average is not None:
                save_file(_contiguous(state.average.state_dict()), partial / _AVERAGE)
            tensors, settings = _split_optimizer(state.optimizer)
            save_file(tensors, partial / "optimizer.safetensors")
            record = {
                "epoch": progress.epoch,
                "step": progress.step,
                "history": progress.history,
                "identity": self.identity,
                "optimizer": settings,
                "scaler": state.scaler.state_dict(),
            }
            (partial / "state.json").write_text(json.dumps(record, allow_nan=False))
            _write_manifest(partial)
        epochs = [_epoch_of(path) for path in self._all()]
        wanted = {kept_epoch(progress.history[:epoch]) for epoch in epochs[: self.keep]}
        for epoch in epochs[self.keep :]:
            if epoch not in wanted:
                shutil.rmtree(self._path(epoch))
        return final

    def newest(self, warn: Callable[[str], None]) -> int | None:
        """Epoch of the newest valid checkpoint, None without one.

        Args:
            warn: called with a line for each newer checkpoint that had to be skipped.
        """
        for path in self._all():
            problem = self._problem(path)
            if problem is None:
                return _epoch_of(path)
            warn(f"checkpoint {path.name} is skipped: {problem}")
        return None

    def load(self, epoch: int, state: TrainingState) -> Progress:
        """Restore what is trained, strictly, from the checkpoint after ``epoch`` epochs."""
        path = self._path(epoch)
        state.model.load_state_dict(load_file(path / _MODEL))
        if state.average is not None:
            state.average.load_state_dict(load_file(path / _AVERAGE))
        record = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "optimizer.safetensors")
        state.optimizer.load_state_dict(_join_optimizer(tensors, record["optimizer"]))
        _lay_out_like_parameters(state.optimizer)
        state.scaler.load_state_dict(record["scaler"])
        return Progress(record["epoch"], record["step"], record["history"])

    def load_model(self, epoch: int, model: nn.Module) -> None:
        """Restore the network alone from the checkpoint after ``epoch`` epochs.

        Raises:
            CheckpointError: when the checkpoint does not match its manifest.
        """
        model.load_state_dict(load_file(self.network_file(epoch)))

    def network_file(self, epoch: int) -> Path:
        """The tensors of the network after ``epoch`` epochs: their moving average, if there is one.

        Raises:
            CheckpointError: when the checkpoint does not match its manifest.
        """
        path = self._path(epoch)
        problem = self._problem(path)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem}")
        average = path / _AVERAGE
        return average if average.exists() else path / _MODEL

    def history(self, epoch: int) -> list[dict[str, float]]:
        """Metrics of each of the first ``epoch`` epochs, as the checkpoint after them has them."""
        record = json.loads((self._path(epoch) / "state.json").read_text())
        history: list[dict[str, float]] = record["history"]
        return history

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}"

    def _all(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        found = [path for path in self.folder.glob("epoch-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_epoch_of, reverse=True)

    def _problem(self, path: Path) -> str | None:
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            for name, (size, digest) in manifest.items():
                content = (path / name).read_bytes()
                if len(content) != size:
                    return f"{name} holds {len(content)} bytes of {size}"
                if hashlib.sha256(content).hexdigest() != digest:
                    return f"{name} does not match its checksum"
            state = json.loads((path / "state.json").read_text())
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (ValueError, TypeError, AttributeError):
            return "its manifest is damaged"
        if state.get("identity") != self.identity:
            return "it belongs to another experiment"
        return None


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name complete and synced to disk, or not at all."""
    partial = final.with_name(f".partial-{final.name}")
    for leftover in (partial, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _epoch_of(path: Path) -> int:
    return int(path.name.removeprefix("epoch-"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(folder.iterdir())
    }
    (folder / _MANIFEST).write_text(json.dumps(files, indent=1))


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _split_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state as tensors named ``<parameter index>.<key>`` and JSON for the rest."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            place = tensors if isinstance(value, torch.Tensor) else scalars
            place[f"{index}.{key}"] = value
    return _contiguous(tensors), {"groups": state["param_groups"], "scalars": scalars}


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give moments their parameter's memory format back, without which each step is slower."""
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _join_optimizer(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **settings["scalars"]}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": settings["groups"]}
