"""Run folders: one per run, found again by identity, held by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_prep.locks import wait_for_disk
from pipeline.checkpoints.storage import storage_of
from pipeline.config import Experiment, PipelineError
from pipeline.errors import Interrupted
from pipeline.failures import TrainingError
from pipeline.runlist import ListedRun, UnclearRunError, differences, setting_differences, state
from pipeline.sections import without_credentials
from pipeline.settings import build_experiment

_RECORD, _LOCK = "run.json", "lock"
_KEYS = {"identity", "status", "experiment", "mlflow_run"}
_UNUSABLE = "cannot be read: damaged or of another version"

#: A process that lists runs holds each of them for a moment: so often (and seconds) to try again.
_TRIES, _MOMENT = 5, 0.1


@dataclass
class RunFolder:
    """A folder ``<runs>/<experiment>/<time>-<identity>`` and its record ``run.json``.

    The record holds what a later process needs to go on: the resolved experiment, its identity,
    the MLflow run, what it is made of (data and weights from elsewhere), and whether it finished.
    A finished one holds its result. The files are the user's own to read.

    Attributes:
        doubt: what may be wrong with going on here, where another process has not said that it
            ended; None without such a doubt.
    """

    path: Path
    record: dict[str, Any]
    doubt: str | None = None
    _lock: IO[str] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def usable(self) -> bool:
        return self.record["status"] != _UNUSABLE

    def update(self, **changes: Any) -> None:
        """Change the record on disk, atomically.

        Raises:
            PipelineError: when it cannot be written; then it is as before.
        """
        record = self.record | changes
        partial = self.path / f".{_RECORD}.partial"
        try:
            with _own_file(partial, "w") as file:
                json.dump(record, file, indent=1)
            wait_for_disk(partial)
            partial.replace(self.path / _RECORD)
            wait_for_disk(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise PipelineError(f"cannot write {self.path / _RECORD}: {error.strerror}") from None
        self.record = record

    def hold(self) -> None:
        """Lock the folder for this process; the lock goes with the process, however it ends.

        Raises:
            PipelineError: when another process trains in it, or nothing can be locked there.
        """
        try:
            lock = _own_file(self.path / _LOCK, "a+")
            free = _lock(lock, fcntl.LOCK_EX, _TRIES)
            holder = _read_holder(lock)
            if free:
                lock.truncate(0)
                os.write(lock.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        except OSError as error:
            raise PipelineError(
                f"cannot lock {self.path / _LOCK}: {error.strerror}; set tracking.runs to a folder "
                "of your own, on a file system with locks and space"
            ) from None
        if not free:
            lock.close()
            raise PipelineError(
                f"run {self.name} is being trained by {holder or 'another process'}; wait for it, "
                "or start a run of your own without --resume"
            )
        if holder is not None and " on " in holder:
            self.doubt = (
                f"{holder} has not said that it ended this run; where machines do not see each "
                "other's locks, make sure that it is not there any more"
            )
        self._lock = lock

    def release(self) -> None:
        """Let another process go on with the run."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # of a disk that is gone: the lock goes all the same
                self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def holder(self) -> str | None:
        """The process that holds the folder, in words; None where there is none."""
        try:
            with (self.path / _LOCK).open() as lock:
                if _lock(lock, fcntl.LOCK_SH):
                    return None
                return _read_holder(lock) or "another process"
        except OSError:
            return None

    def listed(self, changes: list[str]) -> ListedRun:
        """The run in words, with its differences to another one."""
        if not self.usable:
            return ListedRun(self.name, _UNUSABLE, [])
        trained = build_experiment(self.record["experiment"])
        return ListedRun(self.name, state(self.path, trained, self.record, self.holder()), changes)


def _own_file(path: Path, mode: str) -> IO[str]:
    """Open a text file that, where it is new, none but the user may read."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


def _lock(file: IO[str], kind: int, tries: int = 1) -> bool:
    """Take a lock without waiting for another process that works with it; whether it was free."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(_MOMENT)
        else:
            return True
    return False


def _read_holder(lock: IO[str]) -> str | None:
    """The process that a lock file names, with its machine where that is another one."""
    lock.seek(0)
    return lock.read().strip().removesuffix(f" on {platform.node()}") or None


@contextlib.contextmanager
def opened(
    experiment: Experiment,
    identity: str,
    resume: bool | str,
    made_of: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Iterator[RunFolder]:
    """A new folder, or the one to go on with, held while inside; what stops the run names it.

    Args:
        resume: True for the one unfinished run of this identity, a text for the run of that name.
        made_of: data and weights of the experiment, as ``Materials.record`` gives them.
        warn: gets a line where another process may still train in it.

    Raises:
        PipelineError: when there is no such run, or from inside, with the run to continue.
        Interrupted: for a KeyboardInterrupt from inside.
    """
    if resume is False:
        folder = create(experiment, identity, made_of)
    else:
        folder = find(experiment, identity, None if resume is True else resume, made_of)
        if folder.doubt is not None and warn is not None:
            warn(folder.doubt)
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


def create(
    experiment: Experiment, identity: str, made_of: Mapping[str, Any] | None = None
) -> RunFolder:
    """A new folder that no other run has, held by this process.

    Args:
        identity: 12 hex digits, of which the folder's name has 6, and what may follow them.
        made_of: as of ``opened``.

    Raises:
        PipelineError: when the folder cannot be written.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parent = experiment.tracking.runs.absolute() / experiment.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        name = f"{stamp}-{identity[:6]}{identity[12:]}"
        for number in itertools.count(1):
            path = parent / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise PipelineError(
            f"cannot write the run folder under {parent}: {error.strerror}; "
            "set tracking.runs to a folder that you may write"
        ) from None
    folder = RunFolder(path, {})
    try:
        folder.hold()
        folder.update(
            identity=identity,
            status="started",
            experiment=experiment.model_dump(mode="json"),
            mlflow_run=None,
            checkpoints=_elsewhere(experiment),
            **(made_of or {}),
        )
    except PipelineError:
        folder.release()
        shutil.rmtree(path, ignore_errors=True)
        raise
    return folder


def find(
    experiment: Experiment,
    identity: str,
    name: str | None,
    made_of: Mapping[str, Any] | None = None,
) -> RunFolder:
    """The unfinished run of this identity that ``--resume`` means, held by this process.

    Args:
        name: of the run folder; None where there is one candidate only.
        made_of: as of ``opened``.

    Raises:
        UnclearRunError: when there is none, or more than one.
        PipelineError: when the named one does not fit, or is held by another process.
    """

    def changes(run: RunFolder) -> list[str]:
        return differences(run.record, experiment, made_of or {})

    if name is not None:
        chosen = _named(experiment, name, changes)
        if chosen.record["identity"] != identity:
            differing = ", ".join(changes(chosen)) or "its data or weights"
            raise PipelineError(f"run {chosen.name} cannot be continued, it differs in {differing}")
    else:
        runs = _all(experiment)
        fitting = [run for run in runs if run.record["identity"] == identity and not run.finished]
        if len(fitting) != 1:
            raise _unclear(experiment, runs, len(fitting), changes)
        chosen = fitting[0]
    chosen.hold()
    try:
        chosen.record = _read(chosen.path).record  # another process may just have ended it
        if chosen.finished:
            raise PipelineError(f"run {chosen.name} is finished; there is nothing to resume")
        _follow_checkpoints(chosen, experiment)
    except PipelineError:
        chosen.release()
        raise
    return chosen


def _follow_checkpoints(run: RunFolder, experiment: Experiment) -> None:
    """Note that the checkpoints of a run were moved; refuse to begin anew where there are none."""
    before, now = run.record.get("checkpoints"), _elsewhere(experiment)
    if now == before:
        return
    storage = storage_of(experiment, run.path)
    try:
        found = storage.names()
    except OSError as error:
        raise PipelineError(f"cannot look for checkpoints in {storage.place}: {error}") from None
    if not found:
        raise PipelineError(
            f"run {run.name} keeps its checkpoints in {before or run.path}, and there are none in "
            f"{storage.place}: set checkpoint.folder as it was, or move them"
        )
    run.update(checkpoints=now, experiment=experiment.model_dump(mode="json"))


def _elsewhere(experiment: Experiment) -> str | None:
    """Below what the checkpoints of a run lie that are not in its folder."""
    place = experiment.checkpoint.folder
    if place is None or experiment.seeds > 1:  # of several seeds each has its own
        return None
    is_uri = "://" in place
    return without_credentials(place) if is_uri else str(Path(place).expanduser().absolute())


def begun_with(experiment: Experiment, resume: bool | str) -> dict[str, Any]:
    """The weights from elsewhere that the run to continue began with, from its record.

    Asked before data and weights are there, so that a run is only compared by its settings.

    Raises:
        PipelineError: when settings alone say that there is no such run, or that it does not fit.
    """
    if resume is False:
        return {}

    def changes(run: RunFolder) -> list[str]:
        return setting_differences(run.record, experiment)

    if resume is not True:
        chosen = _named(experiment, resume, changes)
        if changes(chosen):
            raise PipelineError(
                f"run {chosen.name} cannot be continued, it differs in {', '.join(changes(chosen))}"
            )
        fitting = [chosen]
    else:
        runs = _all(experiment)
        fitting = [run for run in runs if run.usable and not run.finished and not changes(run)]
        if not fitting:
            raise _unclear(experiment, runs, 0, changes)
    sources = [run.record.get("sources") or {} for run in fitting]
    return sources[0] if all(one == sources[0] for one in sources) else {}


def _named(
    experiment: Experiment, name: str, changes: Callable[[RunFolder], list[str]]
) -> RunFolder:
    """The run of that name or path, if there is one and its record can be used."""
    runs, folder = _all(experiment), Path(name).name
    chosen = next((run for run in runs if run.name == folder), None)
    if chosen is None:
        problem = f"no run {folder} of {experiment.name}" if folder else "--resume names no run"
        raise UnclearRunError(problem, _listed(runs, changes))
    if not chosen.usable:
        raise PipelineError(f"{chosen.path / _RECORD} {_UNUSABLE}; start a new run")
    return chosen


def _unclear(
    experiment: Experiment,
    runs: list[RunFolder],
    fitting: int,
    changes: Callable[[RunFolder], list[str]],
) -> UnclearRunError:
    """What to say where ``--resume`` alone means none of the runs, or several."""
    problem = f"no unfinished run of {experiment.name} with these settings"
    if fitting:
        problem = f"{fitting} runs can be continued, name one: --resume RUN"
    return UnclearRunError(problem, _listed(runs, changes))


def _listed(runs: list[RunFolder], changes: Callable[[RunFolder], list[str]]) -> list[ListedRun]:
    return [run.listed(changes(run) if run.usable else []) for run in runs]


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
        if not isinstance(record, dict) or not record.keys() >= _KEYS:
            raise ValueError("it lacks what every record has")
        build_experiment(record["experiment"])
    except (OSError, ValueError, PipelineError):
        record = {"identity": None, "status": _UNUSABLE}
    return RunFolder(folder, record)
