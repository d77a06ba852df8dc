"""Where MLflow keeps runs: an SQLite file or a server, checked before anything depends on it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.config import PipelineError
from pipeline.sections import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Read by MLflow at import or per request; a value that the user has set wins. Few retries: what
# is not delivered is kept and sent again, and MLflow's own seven retries last for minutes.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what it logs as an error it also raises
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",  # which could run code
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
SET_TRACKING = "set tracking.uri (or MLFLOW_TRACKING_URI)"
OPEN_WAIT = 3.0  # seconds for a locked database to become free, for a server to answer
CONNECTION_FAILURES = {  # in the text of an exception, for MLflow passes on no type
    "Connection refused": "nothing listens there",
    "Connection reset": "the connection broke",
    "Failed to resolve": "there is no such host",
    "timed out": "no answer in time",
}


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
    if re.match("https?://", address) and _is_server_address(address):
        return _open_server(address)
    shown = without_credentials(address) if "://" in address else address.rpartition("@")[2]
    raise PipelineError(
        f"{shown!r} is no place for MLflow to keep runs; {SET_TRACKING} to "
        "sqlite:///path/to/mlflow.db or http://host:port"
    )


def _is_server_address(address: str) -> bool:
    """Whether there is a host in it, and no port or a number that a port can have."""
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def reason(error: Exception) -> str:
    """One line on an exception whose text may be a page of SQL, HTML or nested failures."""
    text = str(error).strip()
    for sign, meaning in CONNECTION_FAILURES.items():
        if sign in text:
            return meaning
    if text.startswith("The following failures"):  # of downloads; the last line is of a file
        text = text.splitlines()[-1]
    without_passwords = re.sub(r"(?<=://)[^\s/]*@", "", text)
    return without_passwords.split("\n", 1)[0][:200] or type(error).__name__


def is_away(error: Exception) -> bool:
    """Whether a store could not be asked, or not answer: the same call may later succeed."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, OSError):
        # Of an artifact: from requests, with the server's response, or of the file system.
        status = getattr(getattr(error, "response", None), "status_code", 500)
    else:
        return False
    too_early = (408, 429)
    return not 400 <= status < 500 or status in too_early


class NotRegisteredError(PipelineError):
    """The registry has no such model, or no version of it under that alias."""


@contextlib.contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn what MLflow raises into a PipelineError that begins with `doing`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise PipelineError(f"{doing}: {reason(error)}") from error


def _import_mlflow_client() -> type[MlflowClient]:
    """MLflow's client class, imported late (over a second) and kept quiet."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # announces each retry
    from mlflow import MlflowClient

    return MlflowClient


def _open_database(path: Path) -> TrackingStore:
    if "%" in str(path) or "?" in str(path):
        raise PipelineError(
            f"{path} has a % or a ?, which MLflow's database cannot have in its path; set "
            "tracking.runs (or tracking.uri) to a path without"
        )
    artifacts = path.parent / "artifacts"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path.parent / f".{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _create_database(path)
        _check_database(path)
        artifacts.mkdir(exist_ok=True)
    except OSError as error:
        raise PipelineError(
            f"cannot keep runs in {path.parent}: {error.strerror} ({error.filename}); choose a "
            f"folder that you may write to, or {SET_TRACKING}"
        ) from error
    _check_writable(artifacts)
    uri = f"sqlite:///{path}"
    return TrackingStore(uri, artifacts.as_uri(), _import_mlflow_client()(uri))


def _create_database(path: Path) -> None:
    """Build the schema beside `path` and move it there: a kill leaves no half-made schema."""
    client_class = _import_mlflow_client()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    partial = path.with_name(f"{path.name}.partial")
    for leftover in path.parent.glob(f"{partial.name}*"):  # with SQLite's journal
        leftover.unlink()
    try:
        client_class(f"sqlite:///{partial}").search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        raise PipelineError(
            f"cannot create the database {path}: {reason(error)}; mend that, or {SET_TRACKING}"
        ) from error
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
    _check_writable(path)
    _check_writable(path.parent)  # where SQLite keeps its journal


def _check_writable(path: Path) -> None:
    """SQLite opens a read-only database without a word, and fails at the first write."""
    if not os.access(path, os.W_OK, effective_ids=True):
        raise PipelineError(
            f"{path} is read-only; give yourself the right to write there, or {SET_TRACKING}"
        )


def _schema_revision() -> str | None:
    """The schema revision of the installed MLflow, from its migration scripts."""
    _import_mlflow_client()
    import mlflow.store
    from alembic.script import ScriptDirectory

    return ScriptDirectory(Path(mlflow.store.__path__[0], "db_migrations")).get_current_head()


def _open_server(uri: str) -> TrackingStore:
    parts = urlsplit(uri)
    shown = without_credentials(uri)
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
        raise PipelineError(f"no MLflow server at {shown}: {reason(error)}; {start}") from error
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
