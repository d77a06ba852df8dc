"""What a run did, kept by MLflow: settings, one row of metrics per epoch, figures, files.

Only the driver process tracks: it is the single writer, it outlives restarted workers, and the
default SQLite file need not be reachable from other nodes. MLflow's global state (active run,
tracking URI) is never touched, so two runs in one process do not mix.

What is logged is sent by a thread, see `pipeline.delivery`: a store that goes away, or does not
answer, never holds up the training. What it had not got when the process ended is sent by the
next one: the rows of an epoch are the same whenever they are sent, and MLflow keeps equal rows
once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pipeline.config import PipelineError
from pipeline.delivery import Delivery
from pipeline.provenance import environment_tags
from pipeline.stores import TrackingStore, open_tracking, store_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Experiment

__all__ = ["Tracker", "TrackingStore", "open_tracking"]

logger = logging.getLogger(__name__)

LONGEST_PARAM, PARAMS_PER_CALL, METRICS_PER_CALL = 6000, 100, 1000  # MLflow's limits
PARENT_TAG, FOLDER_TAG = "mlflow.parentRunId", "run_folder"
EPOCH_METRIC = "epoch"  # written last in an epoch's batch: its steps are the epochs logged
TIME = "time"  # of an epoch's metrics: when it ended, in Unix seconds

# Seconds that the end of a run waits for a store: one that is stopped may soon be killed.
PATIENCE, SHORT_PATIENCE = 45.0, 3.0


class Tracker:
    """One MLflow run, open for writing. Make it with `Tracker.start` or `Tracker.resume`.

    As a context manager it closes the run in the state in which the block ends.
    """

    def __init__(
        self,
        store: TrackingStore,
        run_id: str,
        begun: int,
        logged_epochs: set[int],
        tell: Callable[[str], None],
    ) -> None:
        self.store = store
        self.run_id = run_id
        self._begun = begun  # in Unix milliseconds
        self._logged_epochs = logged_epochs
        self._delivery = Delivery(store.uri, tell)
        self._tell = tell
        self._gave_up = False

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    @classmethod
    def start(
        cls,
        store: TrackingStore,
        experiment_name: str,
        run_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        parent: str | None = None,
        tell: Callable[[str], None] = logger.warning,
    ) -> Tracker:
        """Begin a run.

        Args:
            params: the resolved settings under dotted keys; values are written as text, and
                one that is too long for MLflow goes whole into `long_params.json`.
            tags: the caller's, such as the data's fingerprint, beside `environment_tags()`.
            parent: id of the run that this one is a part of, below which MLflow shows it.
            tell: gets a line when the store goes away, is back, or refuses something; also from
                another thread.

        Raises:
            PipelineError: the store does not take the run, or its folder was moved.
        """
        from mlflow.entities import Param

        texts = {key: str(value) for key, value in params.items()}
        too_long = {key: text for key, text in texts.items() if len(text) > LONGEST_PARAM}
        rows = [Param(key, text[:LONGEST_PARAM]) for key, text in texts.items()]
        with store_errors(f"cannot start a run in {store.uri}"):
            experiment_id = _experiment_id(store, experiment_name)
            _delete_unrecorded(store, experiment_id, run_name, tags)
            all_tags = environment_tags() | dict(tags)
            if parent is not None:
                all_tags[PARENT_TAG] = parent
            run = store.client.create_run(experiment_id, run_name=run_name, tags=all_tags)
            run_id = run.info.run_id
            for first in range(0, len(rows), PARAMS_PER_CALL):
                batch = rows[first : first + PARAMS_PER_CALL]
                store.client.log_batch(run_id, params=batch, synchronous=True)
            if too_long:
                store.client.log_dict(run_id, too_long, "long_params.json")
        return cls(store, run_id, run.info.start_time, set(), tell)

    @classmethod
    def resume(
        cls, store: TrackingStore, run_id: str, tell: Callable[[str], None] = logger.warning
    ) -> Tracker:
        """Continue a run; epochs that it already holds will not be logged again.

        Args:
            tell: as of `start`.

        Raises:
            PipelineError: the store does not have that run, or its folder was moved.
        """
        from mlflow.exceptions import MlflowException

        with store_errors(f"cannot continue run {run_id} in {store.uri}"):
            try:
                run = store.client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise PipelineError(
                    f"cannot continue run {run_id}, which is not in {store.uri}; set tracking.uri "
                    "as it was when the run began"
                ) from None
            _refuse_moved(store, store.client.get_experiment(run.info.experiment_id))
            store.client.update_run(run_id, status="RUNNING")
            history = store.client.get_metric_history(run_id, EPOCH_METRIC)
        logged_epochs = {metric.step for metric in history}
        return cls(store, run_id, run.info.start_time, logged_epochs, tell)

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write an epoch's metrics in one call; an epoch that is already there is left alone.

        Characters that MLflow does not take in a name become underscores. Where the metrics have
        a `time`, when the epoch ended, that is the time of their rows.
        """
        if epoch in self._logged_epochs:
            return
        self._logged_epochs.add(epoch)
        rows = {name: value for name, value in metrics.items() if name not in (EPOCH_METRIC, TIME)}
        milliseconds = int(metrics.get(TIME, time.time()) * 1000)
        self._log(epoch, rows | {EPOCH_METRIC: epoch}, epoch, milliseconds)

    def log_result(self, metrics: Mapping[str, float]) -> None:
        """Write metrics of the run as a whole, which belong to no epoch.

        The time of their rows is that at which the run began, which no resume changes.
        """
        self._log("result", metrics, 0, self._begun)

    def _log(
        self, what: str | int, metrics: Mapping[str, float], step: int, milliseconds: int
    ) -> None:
        from mlflow.entities import Metric

        # Fixed rows with a fixed time: sent twice after a lost answer, they are stored once.
        rows = [
            Metric(re.sub(r"[^\w./: -]", "_", name), float(value), milliseconds, step)
            for name, value in metrics.items()
        ]

        def send() -> None:
            for first in range(0, len(rows), METRICS_PER_CALL):
                batch = rows[first : first + METRICS_PER_CALL]
                self.store.client.log_batch(self.run_id, metrics=batch, synchronous=True)

        self._delivery.add(what, send)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Keep a matplotlib figure as `figures/<name>.png`."""
        file = f"figures/{name}.png"
        self._delivery.add(file, lambda: self.store.client.log_figure(self.run_id, figure, file))

    def log_text(self, file: str, text: str) -> None:
        """Keep `text` as the artifact `file`."""
        self._delivery.add(file, lambda: self.store.client.log_text(self.run_id, text, file))

    def log_dict(self, file: str, content: Mapping[str, object]) -> None:
        """Keep `content` as the artifact `file`, whose ending (.json, .yaml) is its format."""
        frozen = dict(content)
        self._delivery.add(file, lambda: self.store.client.log_dict(self.run_id, frozen, file))

    def catch_up(self) -> None:
        """Wait until the store has all that was logged so far.

        Raises:
            PipelineError: it does not come back, or has refused something.
        """
        missing = self._delivery.settle(PATIENCE)
        if missing:
            self._gave_up = True
            raise PipelineError(self._incomplete(missing))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the run.

        Raises:
            PipelineError: a finished run lacks something that the store refused, or that waits
                for it to come back; of a run that was stopped, this is only said.
        """
        try:
            if self._gave_up:
                return
            set_terminated = self.store.client.set_terminated
            self._delivery.add("status", lambda: set_terminated(self.run_id, status))
            if status == "FINISHED":
                self.catch_up()
                return
            missing = self._delivery.settle(SHORT_PATIENCE)
            if missing:
                self._tell(self._incomplete(missing))
        finally:
            self._delivery.close()

    def _incomplete(self, missing: str) -> str:
        return f"run {self.run_id} is not complete in {self.store.uri}: it lacks {missing}"


def _delete_unrecorded(
    store: TrackingStore, experiment_id: str, run_name: str, tags: Mapping[str, str]
) -> None:
    """Delete the run of this folder that a process began, but was killed before it noted it."""
    if FOLDER_TAG not in tags:
        return
    for run in store.client.search_runs([experiment_id], f"attributes.run_name = '{run_name}'"):
        if run.data.tags.get(FOLDER_TAG) == tags[FOLDER_TAG]:
            store.client.delete_run(run.info.run_id)


def _experiment_id(store: TrackingStore, name: str) -> str:
    """The id of the experiment called `name`, created if missing."""
    from mlflow.exceptions import MlflowException

    experiment = store.client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return store.client.create_experiment(name, store.artifact_location)
        except MlflowException:
            experiment = store.client.get_experiment_by_name(name)
            if experiment is None:  # else another driver was faster
                raise
    _refuse_moved(store, experiment)
    return experiment.experiment_id


def _refuse_moved(store: TrackingStore, experiment: Experiment) -> None:
    """MLflow keeps absolute paths: in a moved or copied folder it would write to the old one."""
    kept, expected = experiment.artifact_location, store.artifact_location
    if expected is not None and kept != expected:
        raise PipelineError(
            f"experiment {experiment.name} of {store.uri} keeps its files in {kept}, not in "
            f"{expected}: the folder of runs was moved or copied; put it back in its old place, "
            "or set tracking.runs to a new folder"
        )
