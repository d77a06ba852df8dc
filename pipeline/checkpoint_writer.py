"""Saving while the training goes on: it stops for a copy in memory, a thread does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from pipeline.checkpoint import CheckpointStore
from pipeline.training_state import Progress, Snapshot, TrainingState


class CheckpointWriter:
    """Writes the checkpoints of a training one after the other, each beside the training.

    Every method raises the error of a save that failed, once, see ``CheckpointStore.save``.

    Args:
        store: where they are kept.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._snapshot: Snapshot | None = None
        self._writing: Future[None] | None = None
        self._safe: list[Progress] = []

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def start(
        self, state: TrainingState, progress: Progress, rank_state: Mapping[str, Tensor]
    ) -> None:
        """Copy the state to the CPU, and begin to write it; waits for the one before.

        Args:
            rank_state: what differs from rank to rank, (world size, ...) each; empty at the end of
                an epoch.
        """
        self._finish()
        # Into the memory of the one before, which is written.
        self._snapshot = Snapshot.of(state, progress, rank_state, reuse=self._snapshot)
        self._writing = self._thread.submit(self._store.save, self._snapshot)

    def collect(self) -> list[Progress]:
        """Those that have become safe since the last call, in order; never waits."""
        if not self.busy:
            self._finish()
        safe, self._safe = self._safe, []
        return safe

    def wait(self) -> list[Progress]:
        """The same, after all are written."""
        self._finish()
        return self.collect()

    def _finish(self) -> None:
        """Wait for the one that is being written, and learn how it went."""
        writing, self._writing = self._writing, None
        if writing is not None and self._snapshot is not None:
            writing.result()
            self._safe.append(self._snapshot.progress)
