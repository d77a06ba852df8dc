"""Running the command line for real, in a process of its own, and disturbing it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).parents[1]

#: Seconds within which a run has to go on, or to end with a word, whatever was done to it.
PATIENCE = 60.0

#: Seconds within which a run that is left alone comes to its first epochs, however busy the cores.
BEGINNING = 150.0


class CommandLine:
    """``run.py`` in a folder of its own; prepared data is shared between the runs of a session."""

    def __init__(self, folder: Path, prepared: Path) -> None:
        self.folder = folder
        self._prepared = prepared
        self.output = ""
        self._started: list[subprocess.Popen[str]] = []
        folder.mkdir(exist_ok=True)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        inherited = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
        process = subprocess.Popen(
            [
                sys.executable,
                str(REPOSITORY / "run.py"),
                f"data.prepared={self._prepared}",
                *arguments,
            ],
            cwd=self.folder,
            env=inherited | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        """Kill what a test that failed has left running, so that the next one has the cores."""
        for process in self._started:
            if process.poll() is None:
                driver = psutil.Process(process.pid)
                for one in (driver, *driver.children(recursive=True)):
                    one.kill()

    def watch(self, *arguments: str, **environment: str) -> WatchedRun:
        return WatchedRun(self.start(*arguments, **environment))

    def run(self, *arguments: str, **environment: str) -> str:
        """Output of a run that has to succeed, which stays in ``output``."""
        process = self.start(*arguments, **environment)
        self.output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, self.output
        return self.output

    def run_folder(self, experiment: str) -> Path:
        (folder,) = (self.folder / "runs" / experiment).iterdir()
        return folder

    def checkpoints(self, experiment: str) -> list[Path]:
        """The whole checkpoints of the one run, oldest first; empty before there is a run."""
        manifests = (self.folder / "runs" / experiment).glob("*/checkpoints/epoch-*/manifest.json")
        return sorted(manifest.parent for manifest in manifests)

    def wait_for_checkpoint(self, run: WatchedRun, experiment: str, name: str) -> None:
        """Until a run has a checkpoint of this name, or one behind it."""
        run.wait_until(
            lambda: any(path.name >= name for path in self.checkpoints(experiment)),
            f"checkpoint {name}",
            BEGINNING,
        )

    def weights(self, experiment: str, epoch: int) -> dict[str, Tensor]:
        checkpoint = self.run_folder(experiment) / "checkpoints" / f"epoch-{epoch:04d}"
        return load_file(checkpoint / "model.safetensors")


class WatchedRun:
    """A run whose lines are read as they come, with the times at which they do."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append((time.monotonic(), line))

    @property
    def output(self) -> str:
        return "".join(line for _, line in self._lines)

    def wait_until(
        self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE
    ) -> None:
        """Until the condition holds; fail where the run ends before, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it has ended before {what}:\n{self.output}"
            late = f"{what} did not happen within {seconds:.0f} s:\n{self.output}"
            assert time.monotonic() < deadline, late
            time.sleep(0.01)

    def wait_for_line(self, text: str, seconds: float = PATIENCE) -> float:
        """Monotonic time at which the first line with this text came."""
        self.wait_until(lambda: text in self.output, f"a line with {text!r}", seconds)
        return next(moment for moment, line in self._lines if text in line)

    def end(self, code: int, seconds: float = PATIENCE) -> str:
        """Output of the run, which has to end with this code within so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it goes on after {seconds:.0f} s:\n{self.output}") from None
        self._reader.join(5)
        assert self.process.returncode == code, self.output
        assert "Traceback" not in self.output
        return self.output


def assert_equal_bit_for_bit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


def workers_of(driver: int) -> list[psutil.Process]:
    """The Ray Train worker processes below a driver process."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def writer_of(driver: int) -> psutil.Process:
    """The worker that writes the checkpoints, by what it has written to disk so far."""
    return max(workers_of(driver), key=lambda worker: worker.io_counters().write_bytes)


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, also where nobody has taken notice of it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def survivors(processes: Iterable[psutil.Process], seconds: float) -> list[str]:
    """The names of those processes that still run after so many seconds."""
    deadline = time.monotonic() + seconds
    alive = list(processes)
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [process for process in alive if not is_gone(process)]
    return [process.name() for process in alive]
