"""Saving while the training goes on: it stops for a copy in memory, a thread does the rest."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import Tensor

from pipeline.checkpoints.state import Progress, Snapshot, TrainingState
from pipeline.checkpoints.store import CheckpointStore


class CheckpointWriter:
    """Writes the checkpoints of a training one after the other, each beside the training.

    Every method raises the error of a save that failed, once, see ``CheckpointStore.save``.

    Args:
        store: where they are kept.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._writing: _Save | None = None
        self._memory: Snapshot | None = None
        self._safe: list[Progress] = []

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and self._writing.is_alive()

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
        self._memory = Snapshot.of(state, progress, rank_state, reuse=self._memory)
        self._writing = _Save(self._store, self._memory)
        self._writing.start()

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
        if self._writing is None:
            return
        self._writing.join()
        written, self._writing = self._writing, None
        if written.error is not None:
            raise written.error
        self._safe.append(written.snapshot.progress)


class _Save(threading.Thread):
    """A checkpoint that is being written; the error of a save that failed stays in ``error``."""

    def __init__(self, store: CheckpointStore, snapshot: Snapshot) -> None:
        # A process that is to end at once does not wait for storage that hangs.
        super().__init__(name="checkpoint", daemon=True)
        self._store = store
        self.snapshot = snapshot
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._store.save(self.snapshot)
        except Exception as error:  # for the training to raise
            self.error = error
