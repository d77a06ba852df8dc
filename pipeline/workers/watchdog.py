"""A worker that hangs is noticed: each says what it is at, and the driver sees who stays behind.

A thread beside the training looks at the clock, because a training that hangs cannot. What one
rank waits for in vain, the others soon wait for as well, so it takes the words of all of them to
find the one that hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.workers.board import Beat, Worker

#: Seconds between two words of a worker.
INTERVAL = 2.0

#: A process that has not said a word for so many seconds is stopped, or cannot be reached.
SILENCE = 5 * INTERVAL

#: A step may take so many seconds, and so many times as long as it usually does.
_SLACK = 30.0
_TIMES = 20.0


def limit(usual: float | None, longest: float, stall: float = 0.0) -> float:
    """Seconds after which what usually takes ``usual`` seconds, and may stall, hangs."""
    return longest if usual is None else min(longest, _SLACK + _TIMES * usual + stall)


@dataclass(frozen=True)
class _Doing:
    """What the training has begun, and when, by the monotonic clock."""

    what: str
    step: int
    usual: float | None
    stall: float
    count: int
    since: float


class Watchdog:
    """Thread that says every two seconds what this process is at, and for how long.

    Args:
        rank: of this process.
        longest: seconds until a worker hangs, where nobody knows how long a step takes.
        tell: receives each word, in the watchdog's thread.
    """

    def __init__(self, rank: int, longest: float, tell: Callable[[Beat], None]) -> None:
        self._rank, self._longest, self._tell = rank, longest, tell
        self._training_thread = threading.get_ident()
        self._doing = _Doing("starting", 0, None, 0.0, 0, time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self, what: str, step: int | None, usual: float | None, stall: float = 0.0) -> None:
        """Note what the training begins now; see ``TrainContext.beat``."""
        before = self._doing
        if step is None or step == before.step:
            step, count = before.step, before.count + 1
        else:
            count = 0
        self._doing = _Doing(what, step, usual, stall, count, time.monotonic())

    def close(self) -> None:
        """Say no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        woken = looked = time.monotonic()
        while not self._ended.wait(INTERVAL):
            now = time.monotonic()
            if now - looked > SILENCE:
                woken = now  # the whole process was stopped, and has the right to go on
            looked = now
            self._tell(self._beat(self._doing, woken))

    def _beat(self, doing: _Doing, woken: float) -> Beat:
        seconds = time.monotonic() - max(doing.since, woken)
        most = limit(doing.usual, self._longest, doing.stall)
        waiting, stacks = self._stacks() if seconds > most else (False, "")
        return Beat(
            rank=self._rank,
            pid=os.getpid(),
            doing=doing.what,
            step=doing.step,
            count=doing.count,
            seconds=seconds,
            usual=doing.usual,
            limit=most,
            waiting=waiting,
            stacks=stacks,
        )

    def _stacks(self) -> tuple[bool, str]:
        """Whether the training waits for other ranks, and where every thread is."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        waiting, parts = False, []
        for thread, frame in sys._current_frames().items():
            stack = traceback.extract_stack(frame)
            if thread == self._training_thread:
                waiting = any("torch/distributed/" in entry.filename for entry in stack)
            parts.append(f"thread {names.get(thread, thread)}:\n{''.join(stack.format())}")
        return waiting, "\n".join(parts)


@dataclass(frozen=True)
class Hang:
    """Workers that hang.

    Attributes:
        workers: which.
        text: what there is to say of it, in a line.
        trace: where all workers are.
    """

    workers: tuple[Worker, ...]
    text: str
    trace: str


def find_hang(workers: Sequence[Worker], beats: Sequence[tuple[Beat, float]]) -> Hang | None:
    """The workers for which the others wait, once one has been at it for too long.

    Those that are silent; otherwise those that are behind, and of several that are equally far
    those that do not just wait for others.

    Args:
        workers: all of them.
        beats: last word of each rank, and its age in seconds; those of former workers too.
    """
    by_rank = {worker.rank: worker for worker in workers}
    last = {
        beat.rank: (beat, age)
        for beat, age in beats
        if beat.rank in by_rank and beat.pid == by_rank[beat.rank].pid
    }
    late = {rank for rank, (beat, age) in last.items() if beat.seconds + age > _patience(beat, age)}
    if not late:
        return None
    silent = {rank for rank in by_rank if rank not in last or last[rank][1] > SILENCE}
    culprits = silent or _behind([beat for beat, _ in last.values()])
    # One that may be at it for a while longer is waited for by right. But ranks are at most a step
    # apart: where the others are further, its last word is old, and it froze in a later step.
    farthest = max(beat.step for beat, _ in last.values())
    recent = {rank for rank, (beat, _) in last.items() if beat.step >= farthest - 1}
    culprits -= recent - late
    if not culprits:
        return None
    found = tuple(by_rank[rank] for rank in sorted(culprits))
    trace = "\n".join(
        f"{by_rank[rank]}: {beat.doing}, step {beat.step}, {beat.seconds:.0f} s\n{beat.stacks}"
        for rank, (beat, _) in sorted(last.items())
    )
    return Hang(found, _line(found, last), trace)


def _patience(beat: Beat, age: float) -> float:
    """Seconds that it may take; one that is silent is not stalled, for then it would say so."""
    return limit(beat.usual, beat.limit) if age > SILENCE else beat.limit


def _behind(beats: Sequence[Beat]) -> set[int]:
    """Ranks that have come least far."""
    least = min((beat.step, beat.count) for beat in beats)
    equal = [beat for beat in beats if (beat.step, beat.count) == least]
    busy = [beat for beat in equal if not beat.waiting]
    return {beat.rank for beat in busy or equal}


def _line(found: tuple[Worker, ...], last: dict[int, tuple[Beat, float]]) -> str:
    first = found[0]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    if first.rank not in last:
        return f"{first}{others} has not begun to train"
    beat, age = last[first.rank]
    said = "does not answer" if age > SILENCE else "hangs"
    return f"{first}{others} {said}: {idleness(beat, age)}"


def idleness(beat: Beat, age: float = 0.0) -> str:
    """In words, for how long nothing has come of what a worker was at, and how long it takes.

    Args:
        age: of the worker's word, in seconds.
    """
    usual = f"; a step usually takes {_seconds(beat.usual)}" if beat.usual is not None else ""
    return f"nothing for {beat.seconds + age:.0f} s at step {beat.step}, {beat.doing}{usual}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def kill_worker(pid: int) -> None:
    """Kill a training worker of this machine, but no process that has its number by now."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
