"""Run folders: one per run, found again by identity, held by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Experiment, PipelineError, flatten
from pipeline.failures import TrainingError

_RECORD = "run.json"
_KEYS = {"identity", "status", "experiment", "mlflow_run"}
_UNUSABLE = "damaged or of another version"


class Interrupted(KeyboardInterrupt):
    """The user or the system ended the run; ``run`` names the folder that can be resumed."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run


@dataclass
class RunFolder:
    """A folder ``<runs>/<experiment>/<time>-<identity>`` and its record ``run.json``.

    The record holds what a later process needs to go on: the resolved experiment, its identity,
    the MLflow run and whether the run finished. A finished one holds its result.
    """

    path: Path
    record: dict[str, Any]
    _lock: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    def update(self, **changes: Any) -> None:
        """Change the record on disk, atomically."""
        self.record |= changes
        partial = self.path / f".{_RECORD}.partial"
        with partial.open("w") as file:
            json.dump(self.record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / _RECORD)

    def hold(self) -> None:
        """Lock the folder for this process; the lock goes with the process, however it ends.

        Raises:
            PipelineError: when another process trains in it.
        """
        self._lock = (self.path / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise PipelineError(
                f"run {self.name} is being trained by process {self._lock.read().strip()}; "
                "wait for it, or start a run of your own without --resume"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextlib.contextmanager
def opened(experiment: Experiment, identity: str, resume: bool | str) -> Iterator[RunFolder]:
    """A new folder, or the one to go on with, held while inside; what stops the run names it.

    Args:
        resume: True for the one unfinished run of this identity, a text for the run of that name.

    Raises:
        PipelineError: when there is no such run, or from inside, with the run to continue.
        Interrupted: for a KeyboardInterrupt from inside.
    """
    if resume is False:
        folder = create(experiment, identity)
    else:
        folder = find(experiment, identity, None if resume is True else resume)
    try:
        yield folder
    except KeyboardInterrupt:
        raise Interrupted(folder.name) from None
    except PipelineError as error:
        # What fails once the weights are there, or for want of a worker, can be continued.
        if not isinstance(error, TrainingError) or error.transient:
            error.exit_code, error.run = 1, folder.name
        raise
    finally:
        folder.release()


def create(experiment: Experiment, identity: str) -> RunFolder:
    """A new folder that no other run has, held by this process.

    Args:
        identity: 12 hex digits, of which the folder's name has 6, and what may follow them.

    Raises:
        PipelineError: when the folder cannot be written.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parent = experiment.tracking.runs.absolute() / experiment.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        name = f"{stamp}-{identity[:6]}{identity[12:]}"
        path = parent / name
        number = 1
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
                path = parent / f"{name}-{number}"
        folder = RunFolder(path, {})
        folder.hold()
        folder.update(
            identity=identity,
            status="started",
            experiment=experiment.model_dump(mode="json"),
            mlflow_run=None,
        )
    except OSError as error:
        raise PipelineError(
            f"cannot write the run folder under {parent}: {error.strerror}; "
            "set tracking.runs to a folder that you may write"
        ) from None
    return folder


def find(experiment: Experiment, identity: str, name: str | None) -> RunFolder:
    """The unfinished run of this identity that ``--resume`` means, held by this process.

    Args:
        name: of the run folder; None where there is one candidate only.

    Raises:
        PipelineError: when there is none, more than one, or the named one does not fit.
    """
    runs = _all(experiment)
    if name is not None:
        name = Path(name).name
        if not name:
            raise PipelineError(f"--resume names no run{_listing(runs)}")
        chosen = next((run for run in runs if run.name == name), None)
        if chosen is None:
            raise PipelineError(f"no run {name} of {experiment.name}{_listing(runs)}")
        if chosen.record["status"] == _UNUSABLE:
            raise PipelineError(f"{chosen.path / _RECORD} is {_UNUSABLE}; start a new run")
        if chosen.record["identity"] != identity:
            changed = _difference(chosen.record["experiment"], experiment)
            raise PipelineError(f"run {name} cannot be continued, it differs in {changed}")
        if chosen.finished:
            raise PipelineError(f"run {name} is finished; there is nothing to resume")
    else:
        fitting = [run for run in runs if run.record["identity"] == identity and not run.finished]
        if not fitting:
            raise PipelineError(
                f"no unfinished run of {experiment.name} with these settings{_listing(runs)}"
            )
        if len(fitting) > 1:
            names = ", ".join(run.name for run in fitting)
            raise PipelineError(f"several runs can be resumed, name one: --resume RUN of {names}")
        chosen = fitting[0]
    chosen.hold()
    return chosen


def read(experiment: Experiment, name: str) -> RunFolder:
    """The experiment's run of that name as it is, not held."""
    return _read(experiment.tracking.runs.absolute() / experiment.name / name)


def _all(experiment: Experiment) -> list[RunFolder]:
    """Runs of the experiment, newest first; one whose record is unusable has that status."""
    parent = experiment.tracking.runs.absolute() / experiment.name
    return [_read(path.parent) for path in sorted(parent.glob(f"*/{_RECORD}"), reverse=True)]


def _read(folder: Path) -> RunFolder:
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not record.keys() >= _KEYS:
        record = {"identity": None, "status": _UNUSABLE}
    return RunFolder(folder, record)


def _listing(runs: list[RunFolder]) -> str:
    if not runs:
        return "; there are no runs of it yet"
    rows = ", ".join(f"{run.name} ({run.record['status']})" for run in runs[:5])
    return f"; there are {rows}" + (" and older ones" if len(runs) > 5 else "")


def _difference(recorded: dict[str, Any], experiment: Experiment) -> str:
    old, new = flatten(recorded), flatten(experiment.model_dump(mode="json"))
    governed = ("dataset", "backbone", "method", "init_from", "seed", "train.", "data.synthetic")
    rows = [
        f"{key}={old.get(key)} (now {value})"
        for key, value in new.items()
        if key.startswith(governed) and old.get(key) != value
    ]
    return ", ".join(rows) or "its data"
