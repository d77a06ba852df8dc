from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import store as checkpoint_module
from pipeline.checkpoints.state import Progress
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointError, CheckpointStore, Position
from pipeline.checkpoints.writer import CheckpointWriter
from tests.unit.pipeline.small_training import ROW, ROWS, make_step, names, small_training, store_in


class SlowStorage(LocalStorage):
    """A folder in which nothing is written until the gate is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()

    def write(self, name, files):
        assert self.gate.wait(20)
        super().write(name, files)


class FullStorage(LocalStorage):
    """A folder on a disk that is full after the first checkpoint."""

    def write(self, name, files):
        if self.names():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(name, files)


def progress_after(epoch: int) -> Progress:
    return Progress(epoch, epoch, [{}] * epoch)


def test_training_goes_on_while_a_checkpoint_of_the_earlier_state_is_written(tmp_path):
    storage, state = SlowStorage(tmp_path), small_training()
    store = CheckpointStore(storage, "identity")
    writer = CheckpointWriter(store)
    make_step(state, 0)
    weights = state.model.get_parameter("3.weight").detach().clone()
    momentum = [entry["momentum_buffer"].clone() for entry in state.optimizer.state.values()]
    writer.start(state, Progress(0, 1, [], done=1), ROWS)
    for number in range(1, 4):
        make_step(state, number)
    assert writer.busy
    assert writer.collect() == []
    assert names(tmp_path) == []
    storage.gate.set()
    assert writer.wait() == [Progress(0, 1, [], done=1)]

    again = small_training()
    store.load(Position(0, 1), again, ROW)
    assert torch.equal(again.model.get_parameter("3.weight"), weights)
    assert not torch.equal(state.model.get_parameter("3.weight"), weights)
    for before, entry in zip(momentum, again.optimizer.state.values(), strict=True):
        assert torch.equal(entry["momentum_buffer"], before)


def test_each_checkpoint_is_told_of_once_and_in_order(tmp_path):
    writer, state = CheckpointWriter(store_in(tmp_path, keep=9)), small_training()
    told = []
    for epoch in range(1, 6):
        make_step(state, epoch)
        writer.start(state, progress_after(epoch), {})
        told += writer.collect()
    told += writer.wait()
    assert [progress.epoch for progress in told] == [1, 2, 3, 4, 5]
    assert writer.wait() == writer.collect() == []
    assert not writer.busy


def test_what_is_told_is_on_the_disk(tmp_path):
    writer, state = CheckpointWriter(store_in(tmp_path)), small_training()
    for epoch in range(1, 8):
        writer.start(state, progress_after(epoch), {})
        for progress in writer.collect():
            newest = store_in(tmp_path).newest(pytest.fail)
            assert newest is not None and newest.epoch >= progress.epoch
    writer.wait()


@pytest.mark.parametrize("method", ["collect", "wait", "start"])
def test_a_save_that_failed_is_raised_once_by_whatever_is_called_next(tmp_path, method):
    state = small_training()
    writer = CheckpointWriter(CheckpointStore(FullStorage(tmp_path), "identity"))
    for epoch in (1, 2):
        writer.start(state, progress_after(epoch), {})
    while writer.busy:
        pass
    with pytest.raises(CheckpointError) as raised:
        if method == "start":
            writer.start(state, progress_after(3), {})
        else:
            getattr(writer, method)()
    assert str(raised.value) == (
        f"checkpoint epoch-0002 cannot be saved in {tmp_path}: No space left on device; the last "
        "whole one is epoch-0001"
    )
    assert writer.wait() == [progress_after(1)], "the first one was safe"


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    writer, state = CheckpointWriter(store_in(tmp_path)), small_training()
    writer.start(state, progress_after(1), {})
    state.model.get_parameter("3.bias").data[0] = float("nan")
    writer.start(state, progress_after(2), {})
    with pytest.raises(FloatingPointError, match="the weights were not finite after 2 steps"):
        writer.wait()
    assert names(tmp_path) == ["epoch-0001"]


def test_a_disk_that_hiccups_is_asked_again_without_holding_the_training_up(tmp_path, monkeypatch):
    """Two failures, a second and more in all, of which the training notices nothing."""
    monkeypatch.setattr(checkpoint_module, "_PAUSES", (0.2, 0.2))

    class Hiccup(LocalStorage):
        failures = 2

        def write(self, name, files):
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().write(name, files)

    writer = CheckpointWriter(CheckpointStore(Hiccup(tmp_path), "identity"))
    writer.start(small_training(), progress_after(1), {})
    assert writer.collect() == []
    assert writer.wait() == [progress_after(1)]


PROGRAM = """
import sys, time
from pathlib import Path
from pipeline.checkpoints.store import CheckpointStore
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.checkpoints.storage import LocalStorage
from tests.unit.pipeline.small_training import small_training
from pipeline.checkpoints.state import Progress

class Hanging(LocalStorage):
    def write(self, name, files):
        print("writing", flush=True)
        time.sleep(1000)

writer = CheckpointWriter(CheckpointStore(Hanging(Path(sys.argv[1])), "identity"))
writer.start(small_training(), Progress(1, 1, [{}]), {})
try:
    writer.wait()
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_ends_a_process_whose_storage_hangs(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(10) == 130
    finally:
        process.kill()
