"""Checkpoints on storage that fails: for a moment, for good, and when it is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.checkpoints import store as checkpoint_module
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Position
from tests.unit.pipeline.small_training import ROW, save, saved, small_training


class Hiccups(LocalStorage):
    """Storage that fails the first few times that something is written."""

    def __init__(self, folder: Path, failures: int, number: int) -> None:
        super().__init__(folder)
        self.failures, self.number, self.attempts = failures, number, 0

    def write(self, name, files):
        self.attempts += 1
        if self.attempts <= self.failures:
            raise OSError(self.number, os.strerror(self.number))
        super().write(name, files)


@pytest.mark.parametrize(
    ("failures", "number", "attempts", "is_saved"),
    [
        (2, errno.EIO, 3, True),
        (3, errno.EIO, 3, False),
        (1, errno.ENOSPC, 1, False),
        (1, errno.EACCES, 1, False),
    ],
)
def test_storage_that_is_away_for_a_moment_is_tried_again(
    tmp_path, monkeypatch, failures, number, attempts, is_saved
):
    monkeypatch.setattr(checkpoint_module, "_PAUSES", (0.0, 0.0))
    storage = Hiccups(tmp_path, failures, number)
    store = CheckpointStore(storage, "identity")
    if is_saved:
        save(store, small_training(), 1)
        assert store.newest(pytest.fail) == Position(1)
    else:
        with pytest.raises(CheckpointError) as raised:
            save(store, small_training(), 1)
        assert str(raised.value) == (
            f"checkpoint epoch-0001 cannot be saved in {tmp_path}: {os.strerror(number)}; there is "
            "none yet"
        )
    assert storage.attempts == attempts


def test_storage_that_cannot_be_reached_is_no_reason_to_begin_anew(tmp_path, monkeypatch):
    class Unreachable(LocalStorage):
        def open(self, name, allowed):
            raise ConnectionError("nobody answers")

    monkeypatch.setattr(checkpoint_module, "_PAUSES", (0.0, 0.0))
    saved(tmp_path)
    store = CheckpointStore(Unreachable(tmp_path), "identity")
    for use in (
        lambda: store.newest(pytest.fail),
        lambda: store.load(Position(2), small_training(), ROW),
    ):
        with pytest.raises(CheckpointError) as raised:
            use()
        assert str(raised.value) == (
            f"checkpoint {tmp_path}/epoch-0002 cannot be read: nobody answers"
        )
