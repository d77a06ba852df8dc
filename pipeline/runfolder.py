"""Run folders: one per run, found again by identity, held by one process at a time."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Experiment, PipelineError

_RECORD = "run.json"
_KEYS = {"identity", "status", "experiment", "mlflow_run"}
_UNUSABLE = "damaged or of another version"


@dataclass
class RunFolder:
    """A folder ``<runs>/<experiment>/<time>-<identity>`` and its record ``run.json``.

    The record holds what a later process needs to go on: the resolved experiment, its identity,
    the MLflow run and whether the run finished.
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


def create(experiment: Experiment, identity: str) -> RunFolder:
    """A new folder that no other run has, held by this process.

    Raises:
        PipelineError: when the folder cannot be written.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parent = experiment.tracking.runs.absolute() / experiment.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path = parent / f"{stamp}-{identity[:6]}"
        number = 1
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
                path = parent / f"{stamp}-{identity[:6]}-{number}"
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
    from pipeline.config import flatten

    old, new = flatten(recorded), flatten(experiment.model_dump(mode="json"))
    governed = ("dataset", "backbone", "method", "seed", "train.", "data.synthetic")
    rows = [
        f"{key}={old.get(key)} (now {value})"
        for key, value in new.items()
        if key.startswith(governed) and old.get(key) != value
    ]
    return ", ".join(rows) or "its data"
