"""What a run did, kept by MLflow: settings, one row of metrics per epoch, figures, files.

Only the driver process tracks: it is the single writer, it outlives restarted workers, and the
default SQLite file need not be reachable from other nodes. MLflow's global state (active run,
tracking URI) is never touched, so two runs in one process do not mix.

A store that goes away during training does not stop the training: what could not be delivered
is kept in order and sent before the next write; `Tracker.finish` says what is still missing.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pipeline.config import PipelineError
from pipeline.provenance import environment_tags
from pipeline.stores import TrackingStore, open_tracking, reason, store_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Experiment

__all__ = ["Tracker", "TrackingStore", "open_tracking"]

logger = logging.getLogger(__name__)

LONGEST_PARAM, PARAMS_PER_CALL, METRICS_PER_CALL = 6000, 100, 1000  # MLflow's limits
PARENT_TAG = "mlflow.parentRunId"
EPOCH_METRIC = "epoch"  # written last in an epoch's batch: its steps are the epochs logged


class Tracker:
    """One MLflow run, open for writing. Make it with `Tracker.start` or `Tracker.resume`.

    As a context manager it closes the run in the state in which the block ends.
    """

    def __init__(self, store: TrackingStore, run_id: str, logged_epochs: set[int]) -> None:
        self.store = store
        self.run_id = run_id
        self._logged_epochs = logged_epochs
        self._waiting: deque[tuple[str, Callable[[], object]]] = deque()
        self._refused: list[str] = []

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
    ) -> Tracker:
        """Begin a run.

        Args:
            params: the resolved settings under dotted keys; values are written as text, and
                one that is too long for MLflow goes whole into `long_params.json`.
            tags: the caller's, such as the data's fingerprint, beside `environment_tags()`.
            parent: id of the run that this one is a part of, below which MLflow shows it.

        Raises:
            PipelineError: the store does not take the run, or its folder was moved.
        """
        from mlflow.entities import Param

        texts = {key: str(value) for key, value in params.items()}
        too_long = {key: text for key, text in texts.items() if len(text) > LONGEST_PARAM}
        rows = [Param(key, text[:LONGEST_PARAM]) for key, text in texts.items()]
        with store_errors(f"cannot start a run in {store.uri}"):
            experiment_id = _experiment_id(store, experiment_name)
            all_tags = environment_tags() | dict(tags)
            if parent is not None:
                all_tags[PARENT_TAG] = parent
            run = store.client.create_run(experiment_id, run_name=run_name, tags=all_tags)
            tracker = cls(store, run.info.run_id, set())
            for first in range(0, len(rows), PARAMS_PER_CALL):
                batch = rows[first : first + PARAMS_PER_CALL]
                store.client.log_batch(tracker.run_id, params=batch, synchronous=True)
            if too_long:
                store.client.log_dict(tracker.run_id, too_long, "long_params.json")
        return tracker

    @classmethod
    def resume(cls, store: TrackingStore, run_id: str) -> Tracker:
        """Continue a run; epochs that it already holds will not be logged again.

        Raises:
            PipelineError: the store does not have that run, or its folder was moved.
        """
        with store_errors(f"cannot continue run {run_id} in {store.uri}"):
            experiment_id = store.client.get_run(run_id).info.experiment_id
            _refuse_moved(store, store.client.get_experiment(experiment_id))
            store.client.update_run(run_id, status="RUNNING")
            history = store.client.get_metric_history(run_id, EPOCH_METRIC)
        return cls(store, run_id, {metric.step for metric in history})

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write an epoch's metrics in one call; an epoch that is already there is left alone.

        Characters that MLflow does not take in a name become underscores.
        """
        if epoch in self._logged_epochs:
            return
        self._logged_epochs.add(epoch)
        rows = {name: value for name, value in metrics.items() if name != EPOCH_METRIC}
        self._log(f"epoch {epoch}", rows | {EPOCH_METRIC: epoch}, epoch)

    def log_result(self, metrics: Mapping[str, float]) -> None:
        """Write metrics of the run as a whole, which belong to no epoch."""
        self._log("result", metrics, 0)

    def _log(self, what: str, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # Fixed rows with a fixed time: sent twice after a lost answer, they are stored once.
        rows = [
            Metric(re.sub(r"[^\w./: -]", "_", name), float(value), now, step)
            for name, value in metrics.items()
        ]

        def send() -> None:
            for first in range(0, len(rows), METRICS_PER_CALL):
                batch = rows[first : first + METRICS_PER_CALL]
                self.store.client.log_batch(self.run_id, metrics=batch, synchronous=True)

        self._deliver(what, send)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Keep a matplotlib figure as `figures/<name>.png`."""
        file = f"figures/{name}.png"
        self._deliver(file, lambda: self.store.client.log_figure(self.run_id, figure, file))

    def log_text(self, file: str, text: str) -> None:
        """Keep `text` as the artifact `file`."""
        self._deliver(file, lambda: self.store.client.log_text(self.run_id, text, file))

    def log_dict(self, file: str, content: Mapping[str, object]) -> None:
        """Keep `content` as the artifact `file`, whose ending (.json, .yaml) is its format."""
        frozen = dict(content)
        self._deliver(file, lambda: self.store.client.log_dict(self.run_id, frozen, file))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the run.

        Raises:
            PipelineError: a finished run lacks something that the store refused, or that waits
                for it to come back; of a run that failed, this is only a warning.
        """
        self._deliver("status", lambda: self.store.client.set_terminated(self.run_id, status))
        missing = self._refused + [what for what, _ in self._waiting]
        if missing:
            problem = f"{self.store.uri} lacks of run {self.run_id}: {', '.join(missing)}"
            if status == "FINISHED":
                raise PipelineError(problem)
            logger.warning(problem)

    def _deliver(self, what: str, call: Callable[[], object]) -> None:
        """Make `call` after those that still wait; on an outage keep it for the next time."""
        from mlflow.exceptions import MlflowException

        self._waiting.append((what, call))
        while self._waiting:
            what, call = self._waiting[0]
            try:
                call()
            except (MlflowException, OSError) as error:
                if not _is_refusal(error):
                    waiting = ", ".join(what for what, _ in self._waiting)
                    logger.warning(
                        "%s is away (%s); kept to send later: %s",
                        self.store.uri,
                        reason(error),
                        waiting,
                    )
                    return
                logger.warning("%s refuses %s: %s", self.store.uri, what, reason(error))
                self._refused.append(what)
            self._waiting.popleft()


def _is_refusal(error: Exception) -> bool:
    """Whether the call itself is wrong, so that repeating it is of no use."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    else:  # of an artifact: from requests, with the server's response, or of the file system
        status = getattr(getattr(error, "response", None), "status_code", 500)
    too_early = (408, 429)
    return 400 <= status < 500 and status not in too_early


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
