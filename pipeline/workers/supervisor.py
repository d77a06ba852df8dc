"""What the driver makes of a training that runs elsewhere: it restarts, waits, or has failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.failures import TrainingError, keep_trace, training_error
from pipeline.workers.board import SAVES, Beat, Event, News, Worker
from pipeline.workers.watchdog import Hang, find_hang

#: Seconds between two looks at who hangs; two in a row have to see the same.
_LOOK_INTERVAL = 2.0

#: Seconds in which Ray has to notice that a worker was killed.
_KILL_PATIENCE = 60.0

#: Seconds without workers before the user is told, and how much longer each time after that.
_FIRST_WAIT = 10.0
_LONGER = 3.0

#: Seconds that workers may take to start where there is room for them.
_USUAL_START = 60.0


class Supervisor:
    """Follows a training by what is on its board; in the driver.

    Args:
        max_failures: restarts in a row that bring no new checkpoint.
        least: fewest workers to train with.
        folder: of the run, for traces.
        tell: receives the events that are for the user and the tracker.
        kill: ends a worker that hangs; False where its machine does not answer.
        room: workers that the cluster can hold now.
    """

    def __init__(
        self,
        max_failures: int,
        least: int,
        folder: Path,
        tell: Callable[[Event], None],
        kill: Callable[[Worker], bool],
        room: Callable[[], int],
    ) -> None:
        self._max_failures, self._least, self._folder = max_failures, least, folder
        self._tell, self._kill, self._room = tell, kill, room
        self._workers: list[Worker] = []
        self._failures = 0
        self._has_stopped = False
        self._hang: Hang | None = None  # which was seen once
        self._killed: Hang | None = None
        self._looked = self._killed_at = self._without_workers_since = time.monotonic()
        self._next_note = _FIRST_WAIT

    @property
    def is_training(self) -> bool:
        """Whether there are workers, whose state is not yet safe."""
        return bool(self._workers) and not self._has_stopped

    def take(self, news: News) -> None:
        """Act on what is new.

        Raises:
            TrainingError: when the training has failed for good.
        """
        for event in news.events:
            self._take(event)
        now = time.monotonic()
        if not self._workers:
            self._note_waiting(now - self._without_workers_since)
        elif now - self._looked > _LOOK_INTERVAL:
            self._looked = now
            self._look(news.beats, now)

    def _take(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "failed":
            raise training_error(event, self._folder)
        if kind == "failure":
            self._on_failure(event)
            return
        if kind == "group":
            self._follow(event["workers"])
            return
        if kind in SAVES:
            self._failures = 0
        self._has_stopped |= kind == "stopped"
        self._tell(event)

    def _follow(self, workers: list[Worker]) -> None:
        """Watch a new group of workers, or wait for one."""
        self._workers, self._hang, self._killed, self._has_stopped = workers, None, None, False
        self._without_workers_since, self._next_note = time.monotonic(), _FIRST_WAIT

    def _on_failure(self, event: Event) -> None:
        """Let Ray start the workers anew, as long as that brings the training forward."""
        text, trace, killed = event["text"], event["trace"], self._killed
        if killed is not None and {worker.pid for worker in killed.workers} & {*event["pids"]}:
            text, trace = killed.text, f"{killed.text}\n\n{killed.trace}\n\n{trace}"
        self._follow([])
        self._failures += not event["preempted"]
        if self._failures > self._max_failures:
            raise self._final(text, trace)
        path = keep_trace(trace, self._folder)
        self._say("restart", text=text, trace=None if path is None else str(path))

    def _final(self, text: str, trace: str) -> TrainingError:
        if self._failures > 1:
            text += (
                f", failure {self._failures} without a new checkpoint "
                f"(scaling.max_failures={self._max_failures})"
            )
        return training_error({"text": text, "trace": trace}, self._folder, transient=True)

    def _look(self, beats: list[tuple[Beat, float]], now: float) -> None:
        """Kill the workers that hang, so that Ray starts all of them anew."""
        if self._killed is not None:
            if now - self._killed_at > _KILL_PATIENCE:
                raise self._final(self._killed.text, self._killed.trace)
            return
        before, self._hang = self._hang, find_hang(self._workers, beats)
        if self._hang is None or before is None or self._hang.workers != before.workers:
            return
        self._killed, self._killed_at = self._hang, now
        for worker in self._hang.workers:
            if not self._kill(worker):
                text = f"{self._hang.text}; its machine does not answer either"
                raise training_error(
                    {"text": text, "trace": self._hang.trace}, self._folder, transient=True
                )

    def _note_waiting(self, seconds: float) -> None:
        """Say now and then for what the training waits."""
        if seconds < self._next_note:
            return
        self._next_note *= _LONGER
        room = self._room()
        if room < self._least:
            text = f"waiting for {self._least} workers; the cluster has room for {room}"
        elif seconds > _USUAL_START:
            text = f"waiting for Ray to start the workers, for {seconds:.0f} s now"
        else:
            return
        self._say("note", text=text)

    def _say(self, kind: str, **content: Any) -> None:
        self._tell({"kind": kind, "time": time.time(), **content})
