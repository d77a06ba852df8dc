"""A training that is asked to stop: the first signal lets it save its state, the second does not.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

#: Seconds for the last checkpoint. Clusters kill what has not ended 30 s after the first signal.
GRACE = 25.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Turns the first signal that would end this process into a wish; for the main thread only.

    Usable as a context manager, within which the signals mean this. Outside the main thread, to
    which signals go, nothing changes.

    Args:
        told: called when the wish comes.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self._told = told
        self._handlers: dict[int, Any] = {}
        self._number: int | None = None
        self._deadline = float("inf")

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # What is ignored stays so, as nohup wants it.
                if callable(signal.getsignal(number)):
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    @property
    def requested(self) -> bool:
        return self._number is not None

    @property
    def overdue(self) -> bool:
        """Whether there is no more time to save anything."""
        return time.monotonic() > self._deadline

    def finish(self) -> None:
        """Do what the signal would have done at once: nothing without one."""
        if self._number is not None:
            number, self._number = self._number, None
            self._handlers[number](number, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            self._handlers[number](number, frame)
            return
        self._number = number
        self._deadline = time.monotonic() + GRACE
        self._told()
