"""What a run did, kept by MLflow: settings, one row of metrics per epoch, figures, files.

Only the driver process tracks: it is the single writer, it outlives restarted workers, and the
default SQLite file need not be reachable from other nodes. MLflow's global state (active run,
tracking URI) is never touched, so two runs in one process do not mix.

A store that goes away during training does not stop the training: what could not be delivered
is kept in order and sent before the next write; `Tracker.finish` says what is still missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pipeline.config import PipelineError
from pipeline.provenance import environment_tags

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# Read by MLflow at import or per request; a value that the user has set wins. Few retries: what
# is not delivered is kept and sent again, and MLflow's own seven retries last for minutes.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what it logs as an error it also raises
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
SET_TRACKING = "set tracking.uri (or MLFLOW_TRACKING_URI)"
OPEN_WAIT = 3.0  # seconds for a locked database to become free, for a server to answer
LONGEST_PARAM, PARAMS_PER_CALL, METRICS_PER_CALL = 6000, 100, 1000  # MLflow's limits
CONNECTION_FAILURES = {  # in the text of an exception, for MLflow passes on no type
    "Connection refused": "nothing listens there",
    "Connection reset": "the connection broke",
    "Failed to resolve": "there is no such host",
    "timed out": "no answer in time",
}
EPOCH_METRIC = "epoch"  # written last in an epoch's batch: its steps are the epochs logged


@dataclass(frozen=True)
class TrackingStore:
    """A checked place that keeps runs.

    Attributes:
        uri: `sqlite:////absolute/path.db` or `http(s)://host:port`, without credentials.
        artifact_location: file URI under which new experiments keep files; None where the
            server decides.
        client: MLflow's client for it, for tracking and for the model registry.
    """

    uri: str
    artifact_location: str | None
    client: MlflowClient


def open_tracking(uri: str | None, runs: Path) -> TrackingStore:
    """Open, and if need be create, the store that `uri` names; it takes seconds at most.

    Args:
        uri: the setting `tracking.uri`. None: the environment's MLFLOW_TRACKING_URI, else
            the SQLite file `mlflow.db` in `runs`, with files in `runs/artifacts`.
        runs: folder of all runs; created if missing.

    Raises:
        PipelineError: nothing or no MLflow server listens there, it asks for credentials, or
            the database is locked, not writable, of another program or of another MLflow.
    """
    default = f"sqlite:///{runs.resolve() / 'mlflow.db'}"
    address = uri or os.environ.get("MLFLOW_TRACKING_URI") or default
    if re.match("sqlite:///.+", address) and ":memory:" not in address:
        return _open_database(Path(address.removeprefix("sqlite:///")).resolve())
    if re.match("https?://.+", address):
        return _open_server(address)
    raise PipelineError(
        f"{address!r} is no place for MLflow to keep runs; {SET_TRACKING} to "
        "sqlite:///path/to/mlflow.db or http://host:port"
    )


def _import_mlflow_client() -> type[MlflowClient]:
    """MLflow's client class, imported late (over a second) and kept quiet."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # announces each retry
    from mlflow import MlflowClient

    return MlflowClient


def _reason(error: Exception) -> str:
    """One line on an exception whose text may be a page of SQL, HTML or nested failures."""
    text = str(error).strip()
    for sign, reason in CONNECTION_FAILURES.items():
        if sign in text:
            return reason
    return text.split("\n", 1)[0][:200] or type(error).__name__


def _open_database(path: Path) -> TrackingStore:
    artifacts = path.parent / "artifacts"
    try:
        artifacts.mkdir(parents=True, exist_ok=True)
        with (path.parent / f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _create_database(path)
    except OSError as error:
        raise PipelineError(
            f"cannot keep runs in {path.parent}: {error.strerror} ({error.filename}); choose a "
            f"folder that you may write to, or {SET_TRACKING}"
        ) from error
    _check_database(path)
    uri = f"sqlite:///{path}"
    return TrackingStore(uri, artifacts.as_uri(), _import_mlflow_client()(uri))


def _create_database(path: Path) -> None:
    """Build the schema beside `path` and move it there: a kill leaves no half-made schema."""
    partial = path.with_name(f"{path.name}.partial")
    for leftover in path.parent.glob(f"{partial.name}*"):  # with SQLite's journal
        leftover.unlink()
    _import_mlflow_client()(f"sqlite:///{partial}").search_experiments(max_results=1)
    partial.replace(path)


def _check_database(path: Path) -> None:
    """Refuse a file that MLflow would wait for, migrate unasked or fail on with a traceback."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=OPEN_WAIT)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT 1 FROM experiments LIMIT 1")
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError as error:
        problem = f"cannot be used as a database ({error})"
        if "locked" in str(error):
            problem = f"has been locked by another process for {OPEN_WAIT:.0f} s"
        elif "no such table" in str(error):
            problem = "is the database of another program, not of MLflow"
        raise PipelineError(f"{path} {problem}; mend that, or {SET_TRACKING}") from error
    expected = _schema_revision()
    if revision != expected:
        raise PipelineError(
            f"{path} has the schema of another MLflow version ({revision}, this one needs "
            f"{expected}); back it up and run: mlflow db upgrade sqlite:///{path}"
        )


def _schema_revision() -> str | None:
    """The schema revision of the installed MLflow, from its migration scripts."""
    _import_mlflow_client()
    import mlflow.store
    from alembic.script import ScriptDirectory

    return ScriptDirectory(Path(mlflow.store.__path__[0], "db_migrations")).get_current_head()


def _open_server(uri: str) -> TrackingStore:
    parts = urlsplit(uri)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # no password
    client_class = _import_mlflow_client()
    # MLflow's own request, so that its credentials, certificates and proxies apply here too.
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    start = f"start one (mlflow server --port {parts.port or 5000}) or {SET_TRACKING}"
    try:
        response = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            params={"max_results": 1},
            max_retries=0,
            timeout=OPEN_WAIT,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise PipelineError(f"no MLflow server at {shown}: {_reason(error)}; {start}") from error
    status, media_type = response.status_code, response.headers.get("Content-Type", "")
    if status in (401, 403):
        raise PipelineError(
            f"{shown} refuses access ({status} {response.text[:80].strip()!r}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if status != 200 or not media_type.startswith("application/json"):
        raise PipelineError(
            f"what listens at {shown} is no working MLflow server (it answers with {status} "
            f"{media_type}); the port may be in use by another program; {start}"
        )
    return TrackingStore(shown, None, client_class(uri))


class Tracker:
    """One MLflow run, open for writing. Make it with `Tracker.start` or `Tracker.resume`."""

    def __init__(self, store: TrackingStore, run_id: str, logged_epochs: set[int]) -> None:
        self.store = store
        self.run_id = run_id
        self._logged_epochs = logged_epochs
        self._waiting: deque[tuple[str, Callable[[], object]]] = deque()
        self._refused: list[str] = []

    @classmethod
    def start(
        cls,
        store: TrackingStore,
        experiment_name: str,
        run_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
    ) -> Tracker:
        """Begin a run.

        Args:
            params: the resolved settings under dotted keys; values are written as text, and
                one that is too long for MLflow goes whole into `long_params.json`.
            tags: the caller's, such as the data's fingerprint, beside `environment_tags()`.

        Raises:
            PipelineError: the store does not take the run.
        """
        from mlflow.entities import Param

        texts = {key: str(value) for key, value in params.items()}
        too_long = {key: text for key, text in texts.items() if len(text) > LONGEST_PARAM}
        rows = [Param(key, text[:LONGEST_PARAM]) for key, text in texts.items()]
        with store_errors(f"cannot start a run in {store.uri}"):
            experiment_id = _experiment_id(store, experiment_name)
            all_tags = environment_tags() | dict(tags)
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
            PipelineError: the store does not have that run.
        """
        with store_errors(f"cannot continue run {run_id} in {store.uri}"):
            store.client.update_run(run_id, status="RUNNING")
            history = store.client.get_metric_history(run_id, EPOCH_METRIC)
        return cls(store, run_id, {metric.step for metric in history})

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write an epoch's metrics in one call; an epoch that is already there is left alone.

        Characters that MLflow does not take in a name become underscores.
        """
        from mlflow.entities import Metric

        if epoch in self._logged_epochs:
            return
        self._logged_epochs.add(epoch)
        now = int(time.time() * 1000)
        # Fixed rows with a fixed time: sent twice after a lost answer, they are stored once.
        rows = [
            Metric(re.sub(r"[^\w./: -]", "_", name), float(value), now, epoch)
            for name, value in metrics.items()
            if name != EPOCH_METRIC
        ]
        rows.append(Metric(EPOCH_METRIC, float(epoch), now, epoch))

        def send() -> None:
            for first in range(0, len(rows), METRICS_PER_CALL):
                batch = rows[first : first + METRICS_PER_CALL]
                self.store.client.log_batch(self.run_id, metrics=batch, synchronous=True)

        self._deliver(f"epoch {epoch}", send)

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

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Keep the file at `path` under its own name, in `folder` of the run's artifacts."""
        self._deliver(
            path.name, lambda: self.store.client.log_artifact(self.run_id, str(path), folder)
        )

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags, or replace those of the same name."""
        from mlflow.entities import RunTag

        rows = [RunTag(key, value) for key, value in tags.items()]
        self._deliver(
            "tags", lambda: self.store.client.log_batch(self.run_id, tags=rows, synchronous=True)
        )

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
                        _reason(error),
                        waiting,
                    )
                    return
                logger.warning("%s refuses %s: %s", self.store.uri, what, _reason(error))
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
    return isinstance(error, FileNotFoundError) or (400 <= status < 500 and status not in too_early)


@contextlib.contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn what MLflow raises into a PipelineError that begins with `doing`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise PipelineError(f"{doing}: {_reason(error)}") from error


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
    return experiment.experiment_id
