"""What loaders must survive: damage, hangs, exceptions, epochs that nobody finishes."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from data_prep import Augmentation, DataError, Loader, Manifest, Reading, make_loader, prepare
from data_prep.augment import Geometry, Indices
from data_prep.reading import ffcv_reader
from data_prep.reading.ffcv_reader import FFCVReader
from data_prep.reading.readers import Cache, open_file
from tests.pictures import write_class_folders

SMALL = (2000, 200)


def loader_threads() -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if type(thread).__module__.startswith("data_prep")
    ]


@pytest.fixture
def beton(tmp_path: Path) -> Manifest:
    return prepare("digits", prepared=tmp_path, synthetic=SMALL)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("photographs")
    raw = write_class_folders(folder / "raw", train=100)
    return prepare("folder", raw=raw, prepared=folder / "prepared")


def in_order(manifest: Manifest, **options: Any) -> Loader:
    return make_loader(manifest, "train", batch_size=100, training=False, **options)


@pytest.mark.parametrize("backend", ["ffcv", "torch"])
def test_a_file_cut_after_its_preparation_is_not_opened(beton: Manifest, backend: str) -> None:
    path = beton.folder / beton.files["train"].name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=rf"{path} has \d+ bytes instead of \d+; delete the folder"):
        in_order(beton, reading=Reading(backend))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_page_that_is_gone_while_it_is_read_is_an_error_and_no_dead_process(
    beton: Manifest, threads: int
) -> None:
    loader = in_order(beton, reading=Reading(threads=threads))
    index = beton.files["train"].open_index(beton.folder)
    os.truncate(index.path, int(index.pointers[750]))
    seen = 0
    with (
        pytest.raises(DataError, match=r"epoch 3, step 7: .*: sample 750 cannot be read; "),
        loader.epoch(2) as batches,
    ):
        for _ in batches:
            seen += 1
    assert seen == 7
    assert loader_threads() == []


def test_a_page_of_zeros_is_an_error_that_names_the_first_sample_in_it(beton: Manifest) -> None:
    index = beton.files["train"].open_index(beton.folder)
    loader = in_order(beton)
    with index.path.open("r+b") as file:
        file.seek(int(index.pointers[1234]))
        file.write(bytes(300_000))
    with (
        pytest.raises(DataError, match=r"epoch 1, step 12: .*: sample 1234 is damaged"),
        loader.epoch(0) as batches,
    ):
        list(batches)


class Failing(Augmentation):
    """An augmentation with a mistake that shows in the fourth batch."""

    def geometry(self, indices: Indices, shapes: np.ndarray, seed: int, epoch: int) -> Geometry:
        if 300 in indices:
            raise ZeroDivisionError("a mistake")
        return super().geometry(indices, shapes, seed, epoch)


@pytest.mark.parametrize("backend", ["ffcv", "torch"])
def test_an_operation_that_raises_ends_the_epoch_at_once(beton: Manifest, backend: str) -> None:
    loader = in_order(beton, view=Failing(shift=1), reading=Reading(backend))
    started = time.monotonic()
    with pytest.raises(DataError) as caught, loader.epoch(0) as batches:
        list(batches)
    assert time.monotonic() - started < 10
    assert str(caught.value) == "epoch 1, step 3: ZeroDivisionError: a mistake"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert loader_threads() == []


class Hanging(Augmentation):
    """An augmentation that waits for an event in the fourth batch."""

    released = threading.Event()

    def geometry(self, indices: Indices, shapes: np.ndarray, seed: int, epoch: int) -> Geometry:
        if 300 in indices:
            self.released.wait(timeout=60)
        return super().geometry(indices, shapes, seed, epoch)


def test_a_read_that_hangs_is_an_error_with_its_step(
    beton: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffcv_reader, "BATCH_TIMEOUT", 1.5)
    monkeypatch.setattr(ffcv_reader, "_JOIN_TIMEOUT", 0.5)
    started = time.monotonic()
    with (
        pytest.raises(
            DataError, match=r"epoch 1, step 3: no batch came in 1\.5 s; its first sample is 300"
        ),
        in_order(beton, view=Hanging()).epoch(0) as batches,
    ):
        list(batches)
    assert time.monotonic() - started < 10
    Hanging.released.set()
    for thread in loader_threads():
        thread.join(timeout=10)
    assert loader_threads() == []


def test_a_thread_that_dies_without_a_word_is_an_error(
    beton: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = in_order(beton)
    assert isinstance(loader._reader, FFCVReader)
    epoch_type = ffcv_reader._epoch_type()
    monkeypatch.setattr(epoch_type, "run", lambda epoch: None)
    started = time.monotonic()
    with (
        pytest.raises(DataError, match="epoch 1, step 0: the loader thread is gone"),
        loader.epoch(0) as batches,
    ):
        next(batches)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("threads", [1, 4])
def test_fifty_abandoned_epochs_leave_no_thread_no_open_file_and_no_memory(
    photographs: Manifest, threads: int
) -> None:
    view = Augmentation(flip=True, crop_area=(0.3, 1.0))
    loader = make_loader(
        photographs,
        "train",
        batch_size=20,
        training=True,
        view=view,
        reading=Reading(threads=threads),
    )

    def abandon(epochs: range) -> None:
        for epoch in epochs:
            with loader.epoch(epoch) as batches:
                for _ in range(epoch % 4):
                    next(batches)

    process = psutil.Process()
    abandon(range(8))  # buffers, and the threads that decode, are kept from here on
    active, files, memory = threading.active_count(), process.num_fds(), process.memory_info().rss
    started = time.monotonic()
    abandon(range(8, 58))
    assert threading.active_count() <= active  # those of an earlier test may end meanwhile
    assert process.num_fds() <= files
    # One batch of these images takes 12 MB.
    assert process.memory_info().rss - memory < 40e6
    assert time.monotonic() - started < 60


def test_an_exception_in_the_training_step_ends_the_loader_thread(beton: Manifest) -> None:
    with pytest.raises(ZeroDivisionError), in_order(beton).epoch(0) as batches:
        for _ in batches:
            raise ZeroDivisionError
    assert loader_threads() == []


def test_a_batch_that_is_kept_is_not_overwritten_by_later_ones(photographs: Manifest) -> None:
    loader = make_loader(photographs, "train", batch_size=20, training=True)
    with loader.epoch(0) as batches:
        kept = [images for images, _ in batches]
    with loader.epoch(0) as batches:
        for before, (images, _) in zip(kept, batches, strict=True):
            assert before.equal(images)


def test_reading_changes_no_setting_of_a_fresh_process(beton: Manifest) -> None:
    code = f"""
import pathlib, torch
torch.set_num_threads(3)
from data_prep import Manifest, make_loader
manifest = Manifest.read(pathlib.Path({str(beton.folder)!r}))
loader = make_loader(manifest, "train", batch_size=100, training=True)
with loader.epoch(0) as batches:
    next(batches)
    counts = [torch.get_num_threads()]
import numba
print(counts[0], torch.get_num_threads(), numba.config.DISABLE_JIT)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["3", "3", "0"]
    assert done.stderr == ""


@pytest.mark.slow
def test_the_compiled_code_is_kept_on_disk(beton: Manifest, tmp_path: Path) -> None:
    """A second process does not compile again."""
    code = f"""
import pathlib
from data_prep import Manifest, make_loader
from data_prep.reading import kernels
manifest = Manifest.read(pathlib.Path({str(beton.folder)!r}))
with make_loader(manifest, "train", batch_size=100, training=True).epoch(0) as batches:
    next(batches)
stats = kernels.decode.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
    answers = []
    for _ in range(2):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env=environment,
        )
        answers.append(done.stdout.split())
    assert answers == [["0", "1"], ["1", "0"]]


def resident_bytes(path: Path) -> int:
    """Of a file, in the system's page cache."""
    size = path.stat().st_size
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        return mmap.PAGESIZE * sum(page & 1 for page in pages)


@pytest.mark.parametrize("cache", ["page", "process"])
def test_a_file_that_fits_is_read_ahead_and_one_that_does_not_is_not(
    cache: Cache, tmp_path: Path
) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(60_000_000))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident_bytes(path)
    if before > 5e6:
        pytest.skip("this file system keeps what it is told to forget")
    with open_file(path, cache):
        deadline = time.monotonic() + (20 if cache == "page" else 1)
        while resident_bytes(path) < 59e6 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (resident_bytes(path) > 59e6) == (cache == "page")


def test_a_hanging_read_does_not_keep_the_process_from_ending(beton: Manifest) -> None:
    code = f"""
import pathlib, sys, threading, time
from data_prep import Augmentation, Manifest, Reading, ffcv_available, make_loader
from data_prep.reading import ffcv_reader
ffcv_reader.BATCH_TIMEOUT = ffcv_reader._JOIN_TIMEOUT = 1.0
class Hanging:
    padding = "black"
    def geometry(self, *arguments):
        time.sleep(60)
manifest = Manifest.read(pathlib.Path({str(beton.folder)!r}))
options = {{"view": Hanging(), "reading": Reading(threads=2)}}
loader = make_loader(manifest, "train", batch_size=100, training=True, **options)
try:
    with loader.epoch(0) as batches:
        next(batches)
except Exception as error:
    print(error)
"""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True
    )
    assert "no batch came in 1 s" in done.stdout
    assert time.monotonic() - started < 40


def test_loaders_may_be_made_in_many_threads_at_once(beton: Manifest) -> None:
    code = f"""
import pathlib, threading
from data_prep import Manifest, make_loader
manifest = Manifest.read(pathlib.Path({str(beton.folder)!r}))
counts = []
def read():
    with make_loader(manifest, "train", batch_size=500, training=True).epoch(0) as batches:
        counts.append(sum(1 for _ in batches))
threads = [threading.Thread(target=read) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import numba
print(counts, numba.config.DISABLE_JIT)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[4, 4, 4, 4] 0", done.stderr
