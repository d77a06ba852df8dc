"""The event board: how the workers and the driver of a training reach each other.

A module of its own, free of torch, because a process is started for it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

#: An event is plain data with a ``kind``: ``workers`` (who trains from now on), ``phase``,
#: ``note``, ``resumed``, ``step``, ``checkpoint``, ``epoch``, ``stopped``, ``evaluation`` from
#: rank 0; ``group`` (which processes train; none between two groups), ``failure`` and ``note``
#: from Ray's controller; ``failed`` from any worker.
Event = dict[str, Any]

#: Kinds of events after which the state of the training is safe.
SAVES = ("checkpoint", "epoch", "stopped")


@dataclass(frozen=True)
class Worker:
    """A process of the group that trains.

    Attributes:
        rank: in the group, from 0.
        pid: on its machine.
        node: Ray's name of the machine.
        address: of the machine.
    """

    rank: int
    pid: int
    node: str
    address: str

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.address})"


@dataclass(frozen=True)
class Beat:
    """What a worker says of itself every few seconds.

    Attributes:
        rank: in its group.
        pid: of its process.
        doing: what it is at, in a word or two.
        step: optimizer step of the training, from 0.
        count: how many things it has begun at this step, in which the ranks are nearly alike.
        seconds: since it began this one.
        usual: seconds that a step takes; None where nobody knows.
        limit: seconds after which it hangs.
        waiting: whether it waits for other ranks, as far as its stack tells.
        stacks: where all of its threads are; empty within the limit.
    """

    rank: int
    pid: int
    doing: str
    step: int
    count: int
    seconds: float
    usual: float | None
    limit: float
    waiting: bool = False
    stacks: str = ""


@dataclass(frozen=True)
class News:
    """What is on the board.

    Attributes:
        events: since the last look, in order.
        beats: the last one of each rank, and its age in seconds.
    """

    events: list[Event]
    beats: list[tuple[Beat, float]]


class EventBoard:
    """Ray actor: events go to the driver, in order, and its wishes to the workers."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._posted = asyncio.Event()
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._wish = 0
        self._granted_by: tuple[str, ...] = ()
        self._wishes = 0
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    async def post(self, event: Event) -> None:
        self._events.append(event)
        self._posted.set()
        async with self._changed:
            self._counts[event["kind"]] += 1
            if event["kind"] in self._granted_by:
                self._wish, self._granted_by = 0, ()
            self._changed.notify_all()

    async def take(self, patience: float) -> News:
        """What is new since the last call, waiting up to ``patience`` seconds for an event.

        A busy poll would take cycles from the training that it watches.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._posted.wait(), patience)
        self._posted.clear()
        events, self._events = self._events, []
        now = time.monotonic()
        return News(events, [(beat, now - arrived) for beat, arrived in self._beats.values()])

    async def beat(self, beat: Beat) -> None:
        self._beats[beat.rank] = (beat, time.monotonic())

    async def wish(self, wish: int, granted_by: tuple[str, ...]) -> int:
        """Ask the training for something, until an event says that it was done.

        Args:
            wish: a ``Wish``; a stronger one that is not granted yet holds.
            granted_by: kinds of such an event.

        Returns:
            The number of the wish, from 1.
        """
        async with self._changed:
            if wish >= self._wish:
                self._wish, self._granted_by = wish, granted_by
            self._wishes += 1
            self._changed.notify_all()
            return self._wishes

    async def forget(self, number: int) -> None:
        """Ask for it no longer, unless there is another wish by now."""
        if self._wishes == number:
            self._wish, self._granted_by = 0, ()

    async def wished(self, known: int) -> tuple[int, int]:
        """Wait for a wish after the one of the number ``known``; its number, and the wish."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._wish and self._wishes > known)
            return self._wishes, self._wish

    async def wait_for(self, kind: str, patience: float) -> bool:
        """Whether an event of this kind comes within ``patience`` seconds from now."""
        before = self._counts[kind]
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._counts[kind] > before), patience
                )
        return self._counts[kind] > before
