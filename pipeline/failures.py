"""What is said of a training that failed: one line for the user, the full trace in a file."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Mapping
from enum import IntEnum
from itertools import count
from pathlib import Path

from data_prep import DataError
from models.calls import ModelError
from pipeline.config import PipelineError
from pipeline.workers.board import Event, Worker


class TrainingError(PipelineError):
    """The training itself failed.

    Attributes:
        transient: whether the same training may well succeed when it is continued.
    """

    exit_code = 1

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class Kind(IntEnum):
    """How a worker fails, from what explains the others to what is explained by them."""

    PREEMPTED = 0  #: its machine was taken away, as announced
    MACHINE = 1  #: its machine is lost
    MEMORY = 2  #: Ray killed it, because memory ran out
    KILLED = 3  #: its process is gone
    ERROR = 4  #: it raised
    CONNECTION = 5  #: another worker is gone, or the network


#: Errors whose text is a line for the user; of any other the trace is kept in a file as well.
_EXPLAINED_ERRORS = (FloatingPointError, DataError, ModelError, PipelineError)

#: How Ray, torch and the collectives put it.
_SIGNS = {
    Kind.MACHINE: ("its node has died", "Owner's node has crashed", "node is dead"),
    Kind.MEMORY: ("running low on memory", "memory usage threshold"),
    Kind.KILLED: ("died unexpectedly", "actor died", "actor is dead"),
    Kind.CONNECTION: ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer"),
    Kind.ERROR: ("CUDA error",),
}

#: How torch says on the CPU that there is no more memory.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


def kind_of(error: BaseException) -> Kind:
    """How a worker failed, by what Ray or torch says of it."""
    error = innermost(error)
    if getattr(error, "preempted", False):
        return Kind.PREEMPTED
    for kind, signs in _SIGNS.items():
        if any(sign in str(error) for sign in signs):
            return kind
    return Kind.ERROR


def is_lost_worker(error: BaseException) -> bool:
    """Whether the process that ran the training is gone, rather than its program wrong."""
    return any(sign in str(error) for signs in _SIGNS.values() for sign in signs)


def innermost(error: BaseException) -> BaseException:
    """The error at the bottom of those that were raised from one another, or wrapped by Ray."""
    while True:
        wrapped = (getattr(error, name, None) for name in ("health_check_failure", "_base_exc"))
        cause = next(filter(None, wrapped), None) or error.__cause__
        if cause is None:
            return error
        error = cause


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def as_event(error: BaseException) -> Event:
    """An error as plain data: a line, and the trace where the line does not say it all."""
    is_explained = isinstance(error, _EXPLAINED_ERRORS)
    text = first_line(error) if is_explained else _cause(error)
    # A line made of a system error says it all, one made of another error hides where that was.
    if is_explained and isinstance(error.__cause__, (OSError, type(None))):
        return {"text": text, "trace": None, "transient": getattr(error, "transient", False)}
    return {"text": text, "trace": "".join(traceback.format_exception(error))}


def _cause(error: BaseException) -> str:
    """The innermost cause of an error in one line."""
    error = innermost(error)
    name, line = type(error).__name__, first_line(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or _says_no_memory(error):
        return f"out of memory ({line}); lower train.batch_size or raise train.accumulation"
    return f"{name}: {line}"


def _says_no_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def describe_failure(errors: Mapping[int, BaseException], workers: Mapping[int, Worker]) -> Event:
    """Why a group of workers ended, as an event: what began it, in a line, and all that was said.

    Args:
        errors: by rank.
        workers: by rank.
    """
    kinds = {rank: kind_of(error) for rank, error in errors.items()}
    root = min(kinds.values())
    ranks = [rank for rank, kind in sorted(kinds.items()) if kind == root]
    worker = workers[ranks[0]]
    who = str(worker) + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
    # The machine itself is the news where it is gone.
    where = f"the machine {worker.address}"
    lines = {
        Kind.PREEMPTED: f"{where} was taken away, and with it worker {worker.rank}",
        Kind.MACHINE: f"{where} is lost, and with it worker {worker.rank}",
        Kind.MEMORY: f"{who} was killed because its machine ran out of memory; lower "
        "train.batch_size or raise train.accumulation if it happens again",
        Kind.KILLED: f"{who} was killed or crashed",
        Kind.ERROR: f"{who}: {_cause(errors[ranks[0]])}",
        Kind.CONNECTION: f"the connections of {who} broke, though all workers live",
    }
    trace = "\n\n".join(
        f"{workers[rank]}\n{''.join(traceback.format_exception(error))}"
        for rank, error in sorted(errors.items())
    )
    return {
        "kind": "failure",
        "text": lines[root],
        "trace": trace,
        "pids": [workers[rank].pid for rank in ranks],
        "preempted": root is Kind.PREEMPTED,
    }


def keep_trace(trace: str, folder: Path) -> Path | None:
    """Write a trace to the first free ``failure-N.txt`` of the run folder, for its user only.

    None where that cannot be done: a full disk, say, is what is being reported.
    """
    with contextlib.suppress(OSError):
        for number in count(1):
            path = folder / f"failure-{number}.txt"
            with contextlib.suppress(FileExistsError):
                # A trace may hold secrets, as an address with a password.
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(file, "w") as stream:
                    stream.write(trace)
                return path
    return None


def training_error(description: Event, folder: Path, transient: bool = False) -> TrainingError:
    """The error that the user sees; a trace goes to a file in the run folder."""
    text, trace = description["text"], description["trace"]
    transient = transient or description.get("transient", False)
    if trace is None:
        return TrainingError(text, transient)
    path = keep_trace(trace, folder)
    where = f"; the full trace is in {path}" if path is not None else ""
    return TrainingError(f"training failed: {text}{where}", transient)


def ray_failure(error: BaseException, folder: Path) -> TrainingError:
    """What Ray Train itself gave up on; lost workers, of which it never tires, are not that."""
    failure = getattr(error, "controller_failure", None) or error
    description = as_event(failure)
    trace = description["trace"] or "".join(traceback.format_exception(error))
    return training_error(
        description | {"trace": trace}, folder, transient=is_lost_worker(innermost(failure))
    )
