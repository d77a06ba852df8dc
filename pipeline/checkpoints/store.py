"""Checkpoints: what they are called, which of them stay, and which one a training goes on from."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from pipeline.checkpoints.files import FILES, CheckpointFiles, check_finite, written
from pipeline.checkpoints.state import (
    MisfitError,
    Progress,
    Snapshot,
    TrainingState,
    expected_tensors,
    load_network,
    restore,
)
from pipeline.checkpoints.storage import DamagedError, Storage, one_line, storage_of
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from data_prep import Manifest
    from pipeline.config import Experiment
    from pipeline.weights import Sources

#: Before a save that failed is tried again: storage behind a network may be away for a moment.
_PAUSES = (1.0, 5.0)

#: What no second attempt mends: the disk is full, or may not be written.
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EEXIST}

_T = TypeVar("_T")


class CheckpointError(PipelineError):
    """Checkpoints that cannot be written or reached; the message is one line that names them.

    Attributes:
        transient: whether the training can go on later, when there is room on the disk, say.
    """

    transient = True


class UnusableCheckpointError(CheckpointError):
    """A checkpoint that is damaged, or not what this training would have written."""

    transient = False


@dataclass(frozen=True, order=True)
class Position:
    """Where a training is: after complete epochs, and steps of the epoch in progress."""

    epoch: int
    done: int = 0

    @property
    def name(self) -> str:
        """``epoch-0004``, or ``epoch-0004-step-000123`` within the fifth epoch."""
        step = f"-step-{self.done:06d}" if self.done else ""
        return f"epoch-{self.epoch:04d}{step}"

    @classmethod
    def parse(cls, name: str) -> Position | None:
        """The position of that name; None where it is no such name."""
        found = re.fullmatch(r"epoch-(\d{4,12})(?:-step-(\d{6,12}))?", name, re.ASCII)
        if found is None:
            return None
        position = cls(int(found[1]), int(found[2] or 0))
        return position if position.name == name else None


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
    """The checkpoints of the run in this run folder.

    Raises:
        PipelineError: one line, when ``checkpoint.folder`` is no place to keep any.
    """
    storage = storage_of(experiment, folder)
    identity = run_identity(experiment, manifest, sources)
    return CheckpointStore(storage, identity, experiment.checkpoint.keep)


class CheckpointStore:
    """The checkpoints of one run, named by their position.

    Args:
        storage: where they lie.
        identity: hash of the experiment and its data; one of another identity is never loaded.
        keep: how many of the newest to keep.
    """

    def __init__(self, storage: Storage, identity: str, keep: int = 2) -> None:
        self.storage = storage
        self.identity = identity
        self.keep = keep

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint and drop those that nobody can need.

        What stays are the newest ``keep``, and the result of each of them (see ``kept_epoch``):
        where the newest turns out to be damaged, the training goes on from an older one, which
        may know another epoch as the best. What lies beyond the one that is written was skipped
        as damaged by ``newest`` and goes too.

        Raises:
            FloatingPointError: a tensor is not finite, so that nothing was written.
            CheckpointError: it cannot be written, even after a while.
        """
        check_finite(snapshot)
        progress = snapshot.progress
        position = Position(progress.epoch, progress.done)

        def write() -> None:
            self.storage.write(position.name, written(snapshot, self.identity))
            self._drop(position, progress.history)

        try:
            _patiently(write)
        except OSError as error:
            raise self._not_saved(position, one_line(error)) from error
        except ValueError as error:
            raise self._not_saved(position, one_line(error)) from None

    def newest(
        self,
        warn: Callable[[str], None],
        state: TrainingState | None = None,
        row: Mapping[str, Tensor] | None = None,
        misfit: Callable[[Progress], str] = lambda progress: "",
    ) -> Position | None:
        """The newest valid checkpoint, None without one.

        Args:
            warn: called with a line for each newer checkpoint that had to be skipped.
            state: whose tensors have to fit; None: only the files are looked at.
            row: of each rank, as of ``load``.
            misfit: why the training never comes to where a checkpoint says it was, or nothing.

        Raises:
            CheckpointError: the storage cannot be read.
        """
        for position in self._all():
            try:
                checkpoint = self._open(position)
                if state is not None:
                    _read(checkpoint, state, row or {})
                problem = misfit(_progress(checkpoint))
                if problem:
                    raise DamagedError(problem)
            except DamagedError as error:
                warn(f"checkpoint {position.name} is skipped: {error}")
            else:
                return position
        return None

    def load(
        self,
        position: Position,
        state: TrainingState,
        row: Mapping[str, Tensor],
    ) -> tuple[Progress, dict[str, Tensor]]:
        """Restore what is trained, strictly.

        Args:
            row: by name, a tensor of the shape and dtype of what each rank has of its own within
                an epoch.

        Returns:
            How far it is, and within an epoch what the ranks had of their own, (world size, ...)
            each, on the CPU.

        Raises:
            UnusableCheckpointError: it is damaged, or not of this training; the state is then
                not to be used.
        """
        with self._named(position):
            checkpoint = self._open(position)
            tensors, rank_state = _read(checkpoint, state, row)
            restore(state, tensors, checkpoint.record.counters, checkpoint.record.scaler)
        return _progress(checkpoint), rank_state

    def load_model(self, epoch: int, model: nn.Module) -> None:
        """Restore the network alone from the checkpoint after ``epoch`` epochs.

        Raises:
            UnusableCheckpointError: it is damaged, or another network's.
        """
        with self._named(Position(epoch)):
            checkpoint = self._open(Position(epoch))
            load_network(model, checkpoint.tensors(checkpoint.kept_part, model.state_dict()))

    def network_file(self, epoch: int) -> Path:
        """The tensors of the network after ``epoch`` epochs: their moving average, if there is one.

        The file may be a copy, which is gone when the store is, or opens another checkpoint.

        Raises:
            UnusableCheckpointError: the checkpoint is damaged.
        """
        with self._named(Position(epoch)):
            checkpoint = self._open(Position(epoch))
            return checkpoint.path(checkpoint.kept_part)

    def history(self, position: Position) -> list[dict[str, float]]:
        """Metrics of each complete epoch at this position.

        Raises:
            UnusableCheckpointError: the checkpoint is damaged.
        """
        with self._named(position):
            return self._open(position).record.history

    def _all(self) -> list[Position]:
        """Newest first."""
        try:
            names = _patiently(self.storage.names)
        except OSError as error:
            place = self.storage.place
            raise CheckpointError(
                f"cannot read checkpoints in {place}: {one_line(error)}"
            ) from error
        found = [Position.parse(name) for name in names]
        return sorted((position for position in found if position is not None), reverse=True)

    def _open(self, position: Position) -> CheckpointFiles:
        """A checkpoint that is whole, and of this experiment."""
        try:
            files = _patiently(lambda: self.storage.open(position.name, FILES))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self._path(position)} cannot be read: {one_line(error)}"
            ) from error
        checkpoint = CheckpointFiles(files)
        record = checkpoint.record
        if record.identity != self.identity:
            raise DamagedError("it belongs to another experiment")
        if Position(record.epoch, record.done) != position:
            raise DamagedError(f"it was saved after {record.epoch} epochs and {record.done} steps")
        return checkpoint

    @contextmanager
    def _named(self, position: Position) -> Iterator[None]:
        """Say which checkpoint it is that cannot be used."""
        try:
            yield
        except (DamagedError, MisfitError) as error:
            raise UnusableCheckpointError(
                f"checkpoint {self._path(position)} cannot be used: {error}"
            ) from None

    def _path(self, position: Position) -> str:
        return f"{self.storage.place}/{position.name}"

    def _not_saved(self, position: Position, problem: str) -> CheckpointError:
        text = f"checkpoint {position.name} cannot be saved in {self.storage.place}: {problem}"
        with suppress(OSError):
            whole = [name for name in self.storage.names() if Position.parse(name)]
            text += f"; the last whole one is {max(whole)}" if whole else "; there is none yet"
        return CheckpointError(text)

    def _drop(self, saved: Position, history: Sequence[Mapping[str, float]]) -> None:
        """Remove what lies beyond the checkpoint just saved, and what nobody can need before it."""
        positions = self._all()
        before = [position for position in positions if position <= saved]
        newest = before[: self.keep]
        results = {Position(kept_epoch(history[: position.epoch])) for position in newest}
        for position in positions:
            if position not in newest and position not in results:
                self.storage.remove(position.name)


def _read(
    checkpoint: CheckpointFiles, state: TrainingState, row: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors by part, and those of the ranks; all of them fit the state."""
    tensors = {
        part: checkpoint.tensors(part, expected)
        for part, expected in expected_tensors(state).items()
    }
    return tensors, checkpoint.rank_state(row) if checkpoint.record.done else {}


def _patiently(action: Callable[[], _T]) -> _T:
    """Try again what the storage did not do, unless that is what it will say the next time too."""
    for pause in _PAUSES:
        try:
            return action()
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno in _LASTING:
                raise
        time.sleep(pause)
    return action()


def _progress(checkpoint: CheckpointFiles) -> Progress:
    record = checkpoint.record
    return Progress(record.epoch, record.step, record.history, record.done)
