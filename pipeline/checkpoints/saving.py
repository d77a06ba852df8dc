"""When a training keeps its state, and how all ranks go on from what was kept."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import torch

from pipeline.checkpoints.state import Progress, TrainingState
from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Position
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.context import Wish

if TYPE_CHECKING:
    from pipeline.averaging import Statistics
    from pipeline.config import Experiment
    from pipeline.context import TrainContext

#: Before an evaluation that takes longer (in seconds), the epoch's training is kept.
LONG_EVALUATION = 10.0


class Saving:
    """The checkpoints of a training as one rank sees them; rank 0 writes, beside the training.

    An epoch, or a step within one, is told of once its checkpoint is safe.

    Args:
        statistics: of the networks in ``state``; within an epoch each rank has its own.
        steps_per_epoch: optimizer steps.
    """

    def __init__(
        self,
        experiment: Experiment,
        store: CheckpointStore,
        context: TrainContext,
        state: TrainingState,
        statistics: Statistics,
        steps_per_epoch: int,
    ) -> None:
        self._settings = experiment.checkpoint
        self._store, self._context = store, context
        self._state, self._statistics = state, statistics
        self._steps = steps_per_epoch
        self._all_steps = experiment.train.epochs * steps_per_epoch
        judged_by = "validation" if experiment.train.validation else "test"
        own = {f"{judged_by}_top1", f"{judged_by}_loss"}
        self._metrics = own | {"train_loss", "train_top1", "images_per_second", "evaluate_seconds"}
        self._writer = CheckpointWriter(store)
        self._saved_at = time.monotonic()
        self._held_up = 0.0

    def restore(self, nothing: torch.Tensor) -> tuple[Progress, torch.Tensor | None]:
        """Go on from the newest valid checkpoint, on which all ranks agree.

        Args:
            nothing: what ``save`` would be given as counted before the first step of an epoch.

        Returns:
            The progress, and within an epoch, what ``save`` was given as counted on this rank.
            Where the number of ranks has changed, rank 0 has what all had counted.
        """
        context = self._context
        rows = {"statistics": self._statistics.row(), "counted": nothing}
        newest = None
        if context.rank == 0:
            newest = self._store.newest(
                lambda line: context.event("note", text=line), self._state, rows, self._misfit
            )
        newest = newest or Position(0)
        position = Position(context.agree(newest.epoch), context.agree(newest.done))
        if position == Position(0):
            return Progress(0, 0, []), None
        progress, by_rank = self._store.load(position, self._state, rows)
        counted = None
        if by_rank:
            counted = self._restore_ranks(by_rank["statistics"], by_rank["counted"])
        context.event("resumed", epoch=progress.epoch, done=progress.done, history=progress.history)
        return progress, counted

    def _misfit(self, progress: Progress) -> str:
        """Why this training never is there; empty where it can be."""
        passed = progress.epoch * self._steps + progress.done
        if progress.done > self._steps or not progress.step == passed <= self._all_steps:
            return (
                f"it was saved after {progress.step} steps, {progress.done} of epoch "
                f"{progress.epoch + 1}, where an epoch has {self._steps}"
            )
        for epoch, metrics in enumerate(progress.history, start=1):
            missing = sorted(self._metrics - metrics.keys())
            if missing:
                return f"there is no {missing[0]} of epoch {epoch}"
        return ""

    def _restore_ranks(self, statistics: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        rank = self._context.rank
        if len(statistics) == self._context.world_size:
            self._statistics.set(statistics[rank])
            return counted[rank]
        self._statistics.set(statistics.mean(dim=0))
        return counted.sum(dim=0) if rank == 0 else torch.zeros_like(counted[0])

    def is_due(self, step: int, done: int) -> bool:
        """Whether the settings want a checkpoint after ``step`` steps, ``done`` of the epoch.

        The end of an epoch is kept after its evaluation.
        """
        every = self._settings.steps
        return every is not None and step % every == 0 and done < self._steps

    def wish(self, progress: Progress, done: int) -> Wish:
        """What this rank is asked for after ``done`` steps of the epoch; rank 0 sees the clock."""
        wish = self._context.wish()
        if self._context.rank == 0 and wish is Wish.NOTHING and self._is_time(progress, done):
            return Wish.CHECKPOINT
        return wish

    def _is_time(self, progress: Progress, done: int) -> bool:
        if done == self._steps:
            history = progress.history
            return bool(history) and history[-1]["evaluate_seconds"] > LONG_EVALUATION
        if self._settings.steps is not None or self._settings.minutes is None or self._writer.busy:
            return False
        return time.monotonic() - self._saved_at > 60 * self._settings.minutes

    def save(self, progress: Progress, counted: torch.Tensor | None = None) -> None:
        """Copy the state, which rank 0 then writes beside the training; every rank calls it.

        Args:
            counted: within an epoch, what this rank has counted in it, (n,).

        Raises:
            CheckpointError: when an earlier one could not be written.
            FloatingPointError: when the weights of an earlier one were not finite.
        """
        started = time.perf_counter()
        by_rank = {}
        if counted is not None:
            statistics = self._context.gather(self._statistics.row())
            by_rank = {"statistics": statistics, "counted": self._context.gather(counted)}
        if self._context.rank == 0:
            self._writer.start(self._state, progress, by_rank)
        self._saved_at = time.monotonic()
        self._held_up += time.perf_counter() - started

    def held_up(self) -> float:
        """Seconds that checkpoints have kept the training waiting since the last call."""
        seconds, self._held_up = self._held_up, 0.0
        return seconds

    def tell(self) -> None:
        """Tell of the checkpoints that have become safe meanwhile.

        Raises:
            CheckpointError: when one could not be written.
        """
        for progress in self._writer.collect():
            self._tell(progress)

    def finish(self) -> None:
        """Wait, on all ranks, until all checkpoints are safe, and tell of them.

        Raises:
            CheckpointError: when one could not be written.
        """
        for progress in self._writer.wait():
            self._tell(progress)
        self._context.agree(0)  # the others wait here

    def close(self) -> None:
        """Let what is being written become whole before the training ends with an error."""
        # Which is another one.
        with contextlib.suppress(CheckpointError, FloatingPointError):
            self._writer.wait()

    def _tell(self, progress: Progress) -> None:
        if progress.done:
            self._context.event("checkpoint", epoch=progress.epoch, done=progress.done)
            return
        self._context.event(
            "epoch",
            epoch=progress.epoch,
            step=progress.step,
            steps=self._all_steps,
            metrics=progress.history[-1],
        )
