"""Data preparation and loading under kill -9, full disks, damaged files and hanging reads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import DataError, Loader, Manifest, loaders, make_loader, prepare

BACKENDS = ["ffcv", "torch"]
SMALL = (2000, 300)

KILLED_AT_STAGE = """
import os, signal, sys
from pathlib import Path
from data_prep import prepare

def progress(stage, done, total):
    if stage == sys.argv[3] and done > 0:
        os.kill(os.getpid(), signal.SIGKILL)

prepare("digits", prepared=Path(sys.argv[1]), backend=sys.argv[2], synthetic=(2000, 300),
        progress=progress)
"""


def left_over(folder: Path) -> list[str]:
    """Everything below a folder of prepared data but for the lock files."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "BetonEpoch" in type(thread).__name__]


def test_a_preparer_killed_at_any_stage_leaves_nothing_that_the_next_one_trusts(
    tmp_path: Path,
) -> None:
    stages = {
        "ffcv": ["read", "write train", "verify train", "verify test"],
        "torch": ["write test"],
    }
    killed = {}
    for backend, names in stages.items():
        for stage in names:
            prepared = tmp_path / f"{backend} {stage}"
            killed[backend, prepared] = subprocess.Popen(
                [sys.executable, "-c", KILLED_AT_STAGE, str(prepared), backend, stage]
            )
    expected = prepare("digits", prepared=tmp_path / "whole", synthetic=SMALL).fingerprint
    for (backend, prepared), process in killed.items():
        assert process.wait(timeout=120) == -signal.SIGKILL
        assert [name.endswith(".partial") for name in left_over(prepared)] == [True]
        manifest = prepare("digits", prepared=prepared, backend=backend, synthetic=SMALL)
        assert manifest.fingerprint == expected and not manifest.reused
        assert left_over(prepared) == [manifest.folder.name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_two_preparers_at_once_one_works_and_the_other_waits_and_says_so(
    backend: str, tmp_path: Path
) -> None:
    waits, started = threading.Event(), threading.Event()
    told: list[str] = []
    results: list[Manifest] = []

    def first_progress(stage: str, done: int, total: int) -> None:
        if stage == "write train" and done == 0:
            started.set()
            assert waits.wait(timeout=30)

    def second_progress(stage: str, done: int, total: int) -> None:
        told.append(stage)
        if stage.startswith("wait"):
            waits.set()

    def run(progress: Callable[[str, int, int], None]) -> None:
        results.append(
            prepare(
                "digits", prepared=tmp_path, backend=backend, synthetic=SMALL, progress=progress
            )
        )

    first = threading.Thread(target=run, args=(first_progress,))
    first.start()
    assert started.wait(timeout=30)
    second = threading.Thread(target=run, args=(second_progress,))
    second.start()
    first.join(timeout=30)
    second.join(timeout=30)
    assert sorted(manifest.reused for manifest in results) == [False, True]
    assert told[0] == "wait for the process that prepares digits"
    assert results[0] == results[1]


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield disk
    # Lazily: the caught error still holds the file that could not be written.
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("small_disk", [64, 700, 1500, 2100, 2300], indirect=True)
def test_a_full_disk_is_one_line_and_leaves_nothing(backend: str, small_disk: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare("digits", prepared=small_disk, backend=backend, synthetic=SMALL)
    line = str(caught.value)
    assert "cannot prepare digits" in line and "No space left on device" in line
    assert "\n" not in line
    assert left_over(small_disk) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "verify train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("digits", prepared=tmp_path, synthetic=SMALL, progress=interrupt)
    assert left_over(tmp_path) == []
    assert loader_threads() == []


@pytest.fixture
def beton(tmp_path: Path) -> Manifest:
    return prepare("digits", prepared=tmp_path, synthetic=SMALL)


def in_order(manifest: Manifest) -> Loader:
    return make_loader(manifest, "train", batch_size=100, training=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_cut_after_its_preparation_is_not_opened(backend: str, tmp_path: Path) -> None:
    manifest = prepare("digits", prepared=tmp_path, backend=backend, synthetic=SMALL)
    path = manifest.folder / manifest.files["train"][0].name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=rf"{path} has \d+ bytes instead of \d+; delete the folder"):
        in_order(manifest)


def test_an_error_in_the_loader_thread_is_raised_in_the_consumer_with_its_step(
    beton: Manifest,
) -> None:
    loader = in_order(beton)
    # FFCV maps the file at the first epoch: what is gone by then cannot be decoded.
    path = beton.folder / "train.beton"
    first_page = 1 << 21
    os.truncate(path, first_page + 1024 * 750)
    seen = 0
    with (
        pytest.raises(DataError, match=r"step 7 of epoch 2: IndexError: .*out of bounds") as caught,
        loader.epoch(2) as batches,
    ):
        for _ in batches:
            seen += 1
    assert seen == 7
    assert isinstance(caught.value.__cause__, IndexError)
    assert loader_threads() == []


def test_a_read_that_hangs_is_an_error_with_its_step(
    beton: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "BATCH_TIMEOUT", 1.5)
    monkeypatch.setattr(loaders, "_JOIN_TIMEOUT", 0.5)
    loader = in_order(beton)
    assert isinstance(loader._reader, loaders.BetonReader)
    ffcv_loader = loader._reader._loader
    (((decode, defined),), outputs) = ffcv_loader.code
    released = threading.Event()
    calls = 0

    def hanging(**arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            released.wait(timeout=60)
        return decode(**arguments)

    ffcv_loader.code = ([(hanging, defined)], outputs)
    started = time.monotonic()
    with (
        pytest.raises(DataError, match=r"step 3 of epoch 0: no batch came in 1\.5 s"),
        loader.epoch(0) as batches,
    ):
        list(batches)
    assert time.monotonic() - started < 10
    released.set()
    for thread in loader_threads():
        thread.join(timeout=10)
    assert loader_threads() == []


def test_fifty_abandoned_epochs_leave_no_thread_and_no_open_file(beton: Manifest) -> None:
    loader = in_order(beton)
    with loader.epoch(0) as batches:  # maps the file, once and for all
        next(batches)
    threads = threading.active_count()
    files = len(list(Path("/proc/self/fd").iterdir()))
    started = time.monotonic()
    for epoch in range(50):
        with loader.epoch(epoch) as batches:
            for _ in range(epoch % 4):
                next(batches)
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert time.monotonic() - started < 15


def test_an_exception_in_the_training_step_ends_the_loader_thread(beton: Manifest) -> None:
    with pytest.raises(ZeroDivisionError), in_order(beton).epoch(0) as batches:
        for _ in batches:
            raise ZeroDivisionError
    assert loader_threads() == []


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
