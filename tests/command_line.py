"""Running the command line for real, in a process of its own, and disturbing it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).parents[1]


class CommandLine:
    """``run.py`` in a folder of its own; prepared data is shared between the runs of a session."""

    def __init__(self, folder: Path, prepared: Path) -> None:
        self.folder = folder
        self._prepared = prepared
        self.output = ""
        folder.mkdir(exist_ok=True)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        inherited = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
        return subprocess.Popen(
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

    def run(self, *arguments: str, **environment: str) -> str:
        """Output of a run that has to succeed, which stays in ``output``."""
        process = self.start(*arguments, **environment)
        self.output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, self.output
        return self.output

    def run_folder(self, experiment: str) -> Path:
        (folder,) = (self.folder / "runs" / experiment).iterdir()
        return folder

    def weights(self, experiment: str, epoch: int) -> dict[str, Tensor]:
        checkpoint = self.run_folder(experiment) / "checkpoints" / f"epoch-{epoch:04d}"
        return load_file(checkpoint / "model.safetensors")


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until the condition holds; fail with ``what`` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.02)


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
