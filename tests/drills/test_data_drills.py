"""Data preparation under kill -9, full disks, interrupts and dying worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from data_prep import DataError, Manifest, prepare
from data_prep.datasets import Storage
from tests.command_line import is_gone
from tests.pictures import write_class_folders

SMALL = (2000, 300)

KILLED_AT_STAGE = """
import os, signal, sys
from pathlib import Path
from data_prep import prepare

def progress(stage, done, total):
    if stage == sys.argv[2] and done > 0:
        os.kill(os.getpid(), signal.SIGKILL)

prepare("digits", prepared=Path(sys.argv[1]), synthetic=(2000, 300), progress=progress)
"""


def left_over(folder: Path) -> list[str]:
    """Everything in a folder of prepared data; nothing where the folder is not there."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def kinds(folder: Path) -> list[str]:
    """The suffixes of what is left over."""
    return [Path(name).suffix for name in left_over(folder)]


def test_a_preparer_killed_at_any_stage_leaves_nothing_that_the_next_one_trusts(
    tmp_path: Path,
) -> None:
    killed = {}
    for stage in ("write train", "verify train", "write test", "verify test"):
        prepared = tmp_path / stage
        killed[prepared] = subprocess.Popen(
            [sys.executable, "-c", KILLED_AT_STAGE, str(prepared), stage]
        )
    expected = prepare("digits", prepared=tmp_path / "whole", synthetic=SMALL).fingerprint
    for prepared, process in killed.items():
        assert process.wait(timeout=120) == -signal.SIGKILL
        assert kinds(prepared) == [".lock", ".partial"]
        manifest = prepare("digits", prepared=prepared, synthetic=SMALL)
        assert manifest.fingerprint == expected and not manifest.reused
        assert left_over(prepared) == [manifest.folder.name]


def test_what_killed_preparers_of_other_sets_left_is_removed_unless_one_still_works(
    tmp_path: Path,
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STAGE, str(tmp_path), "write train"], check=False
    )
    assert killed.returncode == -signal.SIGKILL and kinds(tmp_path) == [".lock", ".partial"]
    busy: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "write train" and done == 0 and not busy:
            busy.extend(left_over(tmp_path))
            prepare("mnist", prepared=tmp_path, synthetic=(20, 20))
            assert set(busy) < set(left_over(tmp_path))

    manifest = prepare("cifar10", prepared=tmp_path, synthetic=(20, 20), progress=progress)
    assert [name.lstrip(".").startswith("cifar10-") for name in busy] == [True, True]
    names = left_over(tmp_path)
    assert manifest.folder.name in names and len(names) == 2
    assert kinds(tmp_path) == ["", ""]


def test_folders_of_other_people_are_left_alone(tmp_path: Path) -> None:
    others = ["thesis.partial", "digits-0123456789.partial", "mnist-backup.partial"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter1").write_text("precious")
    # Even where a file like a lock lies beside it.
    (tmp_path / ".thesis.lock").touch()
    (tmp_path / ".mnist-backup.lock").touch()
    before = left_over(tmp_path)
    manifest = prepare("digits", prepared=tmp_path, synthetic=(20, 20))
    assert left_over(tmp_path) == sorted([*before, manifest.folder.name])
    assert all((tmp_path / name / "chapter1").read_text() == "precious" for name in others)


def test_of_two_preparers_at_once_one_works_and_the_other_waits_and_says_so(
    tmp_path: Path,
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
        results.append(prepare("digits", prepared=tmp_path, synthetic=SMALL, progress=progress))

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
    assert left_over(tmp_path) == [results[0].folder.name]


def test_a_preparer_that_waits_goes_on_when_the_other_one_fails(tmp_path: Path) -> None:
    prepared = tmp_path / "new"
    waits = threading.Event()
    results: list[Manifest] = []

    def fail(stage: str, done: int, total: int) -> None:
        if stage == "verify train":
            second.start()
            assert waits.wait(timeout=30)
            raise DataError("enough")

    def run() -> None:
        results.append(prepare("digits", prepared=prepared, synthetic=SMALL, progress=see))

    def see(stage: str, done: int, total: int) -> None:
        if stage.startswith("wait"):
            waits.set()

    second = threading.Thread(target=run)
    with pytest.raises(DataError, match="enough"):
        prepare("digits", prepared=prepared, synthetic=SMALL, progress=fail)
    second.join(timeout=30)
    assert not results[0].reused and left_over(prepared) == [results[0].folder.name]


@pytest.mark.parametrize("small_disk", [64, 2300, 8000], indirect=True)
def test_too_small_a_disk_is_one_line_before_anything_is_written(small_disk: Path) -> None:
    told: list[str] = []
    with pytest.raises(DataError) as caught:
        prepare(
            "digits", prepared=small_disk, synthetic=SMALL, progress=lambda *e: told.append(e[0])
        )
    line = str(caught.value)
    assert "cannot prepare digits: it takes about" in line and "MB free: make room" in line
    assert "\n" not in line and not any(stage.startswith("write") for stage in told)
    assert left_over(small_disk) == []


@pytest.mark.parametrize("small_disk", [40_000], indirect=True)
@pytest.mark.parametrize("room", [0, 64, 700, 2100, 2300])
def test_a_disk_that_fills_up_on_the_way_is_one_line_and_leaves_nothing(
    room: int, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"

    def fill(stage: str, done: int, total: int) -> None:
        if stage == "write train" and not ballast.exists():
            free = os.statvfs(small_disk)
            ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - room * 1024)))

    with pytest.raises(DataError) as caught:
        prepare("digits", prepared=small_disk, synthetic=SMALL, progress=fill)
    line = str(caught.value)
    assert "cannot prepare digits" in line and "No space left on device" in line
    assert "\n" not in line
    assert left_over(small_disk) == ["ballast"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "verify train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("digits", prepared=tmp_path, synthetic=SMALL, progress=interrupt)
    assert left_over(tmp_path) == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with so many images that processes share the work: links to a few files."""
    folder = write_class_folders(tmp_path_factory.mktemp("raw") / "pets", train=4, val=2)
    for name in ("cat", "dog"):
        for number in range(4, 3000):
            link = folder / "train" / name / f"{number:04}.jpg"
            link.symlink_to(folder / "train" / name / f"{number % 4:03}.jpg")
    return folder


def begin(pictures: Path, prepared: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """``python -m data_prep`` in the middle of its work, and its worker processes."""
    command = [sys.executable, "-m", "data_prep", "folder", f"raw={pictures}"]
    process = subprocess.Popen(
        [*command, f"prepared={prepared}", "processes=2", "side=32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while True:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        written = list(prepared.glob("*.partial/train.beton"))
        if len(workers) == 2 and written and written[0].stat().st_size > 0:
            return process, children
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "how", ["worker killed", "interrupt", "interrupt again and again", "terminate"]
)
def test_a_preparer_that_is_stopped_ends_in_seconds_and_leaves_nothing(
    how: str, pictures: Path, tmp_path: Path
) -> None:
    process, children = begin(pictures, tmp_path)
    if how == "worker killed":
        children[-1].kill()
    elif how == "interrupt":  # as a terminal sends it, to parent and workers alike
        os.killpg(process.pid, signal.SIGINT)
    elif how == "interrupt again and again":
        for _ in range(20):
            os.killpg(process.pid, signal.SIGINT)
            process.terminate()
            time.sleep(0.01)
    else:
        process.terminate()
    out, error = process.communicate(timeout=10)
    assert out == "" and error.count("\n") == 1
    if how == "worker killed":
        assert process.returncode == 2 and error.startswith("error: a worker process was killed")
    else:
        assert process.returncode == 130 and error.startswith("interrupted: nothing was prepared; ")
    assert left_over(tmp_path) == []
    psutil.wait_procs(children, timeout=5)
    assert all(is_gone(child) for child in children)


def test_workers_of_a_killed_preparer_die_and_the_next_one_starts_afresh(
    pictures: Path, tmp_path: Path
) -> None:
    process, children = begin(pictures, tmp_path)
    process.kill()
    process.communicate(timeout=10)
    psutil.wait_procs(children, timeout=5)
    assert all(is_gone(child) for child in children)
    assert kinds(tmp_path) == [".lock", ".partial"]
    manifest = prepare("folder", raw=pictures, prepared=tmp_path, storage=Storage(side=32))
    assert manifest.counts == {"train": 6000, "test": 4}
    assert left_over(tmp_path) == [manifest.folder.name]


UNGUARDED = """
import sys
from pathlib import Path
from data_prep import DataError, prepare
from data_prep.datasets import Storage

raw, prepared = map(Path, sys.argv[1:])
try:
    prepare("folder", raw=raw, prepared=prepared, processes=2, storage=Storage(side=32))
except DataError as error:
    sys.exit(f"error: {error}")
"""


def test_a_script_without_the_guard_of_its_main_part_ends_and_is_told_of_it(
    pictures: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(script), str(pictures), str(tmp_path / "new")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") and "__main__" in line for line in lines)
    assert not (tmp_path / "new").exists()


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from data_prep import DataError, prepare
from data_prep.datasets import Storage

def progress(stage, done, total):
    if stage == "write train":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]), -1))

raw, prepared = map(Path, sys.argv[1:3])
options = {"processes": 1, "storage": Storage(side=6000), "progress": progress}
try:
    prepare("folder", raw=raw, prepared=prepared, **options)
except DataError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("room", [50_000_000, 400_000_000])
def test_too_little_memory_to_decode_or_to_reduce_is_one_line(room: int, tmp_path: Path) -> None:
    raw = write_class_folders(tmp_path / "raw", train=2, val=2)
    Image.new("RGB", (9000, 9000)).save(raw / "train" / "cat" / "001.jpg")  # 243 MB of pixels
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(raw), str(tmp_path / "new"), str(room)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: too little memory: try fewer data.processes (now 1)")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "new").exists()
