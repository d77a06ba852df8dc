"""The event board: how what the workers have to say reaches the driver.

A module of its own, free of torch, because a process is started for it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

#: An event is plain data with a ``kind``: ``workers`` (who trains from now on), ``phase``,
#: ``note``, ``resumed``, ``step``, ``epoch``, ``evaluation`` from rank 0; ``restart`` from the
#: controller; ``failed`` from any worker.
Event = dict[str, Any]


class EventBoard:
    """Ray actor that carries the workers' events to the driver, in order."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._posted = asyncio.Event()

    async def post(self, event: Event) -> None:
        self._events.append(event)
        self._posted.set()

    async def take(self, patience: float) -> list[Event]:
        """The events since the last call, waiting up to ``patience`` seconds for one.

        A busy poll would take cycles from the training that it watches.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._posted.wait(), patience)
        self._posted.clear()
        events, self._events = self._events, []
        return events
