"""Processes that share work, give its results in order, and never outlive the one that asked."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from data_prep.datasets import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

#: What a script needs, because a new process runs it once more, up to there.
MAIN_GUARD = 'a script has to call prepare() below `if __name__ == "__main__":`'


def is_starting() -> bool:
    """Whether this is a new process of a pool that runs its parent's script once more."""
    # The mark that multiprocessing itself sets, and refuses to start processes by.
    return getattr(multiprocessing.current_process(), "_inheriting", False)


class Workers:
    """A pool of processes; a context manager. With one process the work is done in this one.

    Args:
        processes: how many; they are started at the first task.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._has_worked = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results of ``function`` in the order of the tasks, a few of them worked on in advance.

        Args:
            function: of a module that is quick to import; it travels to the processes by name.
            tasks: are pickled, one by one; results too.

        Raises:
            DataError: when a process died.
        """
        if self._processes == 1:
            yield from map(function, tasks)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._submit(function, task))
                if len(waiting) > 2 * self._processes:
                    yield self._first(waiting)
            while waiting:
                yield self._first(waiting)
        except BrokenProcessPool:
            if not self._has_worked:
                raise DataError(
                    f"the worker processes did not start: {MAIN_GUARD}; or they were killed, for "
                    f"lack of memory: try fewer processes (now {self._processes})"
                ) from None
            raise DataError(
                "a worker process was killed, by hand or for lack of memory: try again, with fewer "
                f"processes if it happens again (now {self._processes})"
            ) from None

    def _first(self, waiting: deque[Future[Result]]) -> Result:
        result = waiting.popleft().result()
        self._has_worked = True
        return result

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        if self._pool is None:
            # Not fork: this process may have threads, of torch for one.
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(),),
            )
        with _interrupts_blocked():
            return self._pool.submit(function, task)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that are started in here never see Ctrl-C; their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int) -> None:
    """Set up a new process: it dies with its parent, and computes on one core."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before that
    import cv2

    cv2.setNumThreads(1)
