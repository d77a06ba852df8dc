"""A training that is asked to stop: the first signal lets it save its state first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

#: Seconds for the last checkpoint. Clusters kill what has not ended 30 s after the first signal.
GRACE = 25.0

#: What the user is told then.
STOPPING = "stopping: the state is being saved; Ctrl-C once more ends at once"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Turns a signal that would end this process into a wish, while there is time for it.

    As a context manager, within which signals mean this; outside the main thread, which they go
    to, nothing changes. A second Ctrl-C ends the process at once. Other signals may come twice, as
    from a terminal that is closed, and mean no more than once.

    Args:
        told: called when the wish comes.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self._told = told
        self._handlers: dict[int, Any] = {}
        self._number: int | None = None
        self._timer: threading.Timer | None = None
        self._overdue = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # What is ignored stays so, as nohup wants it.
                if callable(signal.getsignal(number)):
                    self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self._number is not None

    def finish(self) -> None:
        """Do what the signal would have done at once; without one, nothing."""
        if self._number is not None:
            self._handlers[self._number](self._number, None)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number = number
            self._timer = threading.Timer(GRACE, self._insist)
            self._timer.daemon = True
            self._timer.start()
            # Not here, where the main thread may be in the middle of writing a line.
            threading.Thread(target=self._told, daemon=True).start()
        elif self._overdue or number == signal.SIGINT:
            self.finish()

    def _insist(self) -> None:
        """Wake the main thread, whatever it waits for."""
        assert self._number is not None
        self._overdue = True
        os.kill(os.getpid(), self._number)
