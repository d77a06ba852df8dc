"""What is said of a training that failed: one line for the user, the full trace in a file."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

from data_prep import DataError
from models.calls import ModelError
from pipeline.board import Event
from pipeline.config import PipelineError


class TrainingError(PipelineError):
    """The training itself failed.

    Attributes:
        transient: whether the same training may well succeed when it is continued.
    """

    exit_code = 1

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


#: Errors whose text is a line for the user; of any other the trace is kept in a file as well.
_EXPLAINED_ERRORS = (FloatingPointError, DataError, ModelError, PipelineError)

#: How Ray, and the collectives of the surviving workers, put it.
_SIGNS_OF_A_LOST_WORKER = ("died unexpectedly", "actor died", "/gloo/", "NCCL", "CUDA error")


def is_lost_worker(error: BaseException) -> bool:
    """Whether the process that ran the training is gone, rather than its program wrong."""
    return any(sign in str(error) for sign in _SIGNS_OF_A_LOST_WORKER)


def cause(error: BaseException) -> str:
    """The innermost cause of a worker's failure in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if is_lost_worker(error):
        return "a worker process was killed or crashed"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def as_event(error: BaseException) -> Event:
    """An error as plain data: a line, and the trace where the line does not say it all."""
    is_explained = isinstance(error, _EXPLAINED_ERRORS)
    text = first_line(error) if is_explained else cause(error)
    # A line made of a system error says it all, one made of another error hides where that was.
    if is_explained and isinstance(error.__cause__, (OSError, type(None))):
        return {"text": text, "trace": None}
    return {"text": text, "trace": "".join(traceback.format_exception(error))}


def training_error(description: Event, folder: Path) -> TrainingError:
    """The error that the user sees; a trace goes to ``error.txt`` in the run folder."""
    if description["trace"] is None:
        return TrainingError(description["text"])
    trace = folder / "error.txt"
    with contextlib.suppress(OSError):  # a full disk, say, is what is being reported
        trace.write_text(description["trace"])
    return TrainingError(f"training failed: {description['text']}; the full trace is in {trace}")


def ray_failure(error: BaseException, folder: Path) -> TrainingError:
    """What Ray Train gave up on: more lost workers than ``scaling.max_failures``, or itself."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = [getattr(error, "controller_failure", None) or error, *failures.values()]
    description = as_event(inner[-1])
    failure = training_error(description | {"trace": description["trace"] or str(error)}, folder)
    failure.transient = is_lost_worker(inner[-1]) or "killed or crashed" in description["text"]
    return failure
