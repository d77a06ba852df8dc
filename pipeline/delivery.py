"""What a run has to tell its store: sent beside the training, in order, however long it takes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from pipeline.display import duration
from pipeline.stores import is_away, reason

#: Seconds between two tries while the store is away, and while the end of the run waits for it.
RETRY, HURRIED_RETRY = 30.0, 1.0

#: Seconds that the end of the run waits without a word.
SILENCE = 3.0


class Delivery:
    """Makes calls one after another in a thread of its own, so that nobody waits for the store.

    A call that finds the store away is made again, before those that follow it. One that the
    store refuses is given up and kept in `refused`.

    Args:
        where: the store, for people.
        tell: gets a line when the store goes away, is back, or refuses something.
    """

    def __init__(self, where: str, tell: Callable[[str], None]) -> None:
        self.where = where
        self.refused: list[str | int] = []
        self._tell = tell
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str | int, Callable[[], object]]] = deque()
        self._hurried = self._closed = False
        self._away_since: float | None = None
        self._last_answer = 0.0
        self._problem = ""
        self._late: list[str | int] = []  # what has been delivered since the store was away
        threading.Thread(target=self._run, name="tracking", daemon=True).start()

    def add(self, what: str | int, call: Callable[[], object]) -> None:
        """Make a call after those that still wait.

        Args:
            what: it delivers, for people; a number is an epoch.
        """
        with self._changed:
            self._waiting.append((what, call))
            self._changed.notify_all()

    def settle(self, patience: float) -> str:
        """Wait until all is delivered, but only for `patience` seconds in which nothing is.

        Returns:
            What is still missing, and why, in words; empty when nothing is.
        """
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._waiting, min(SILENCE, patience)):
                if patience > SILENCE:
                    waiting = in_words([what for what, _ in self._waiting])
                    self._tell(f"waiting up to {patience:.0f} s for {self.where} to take {waiting}")
                self._wait_while_it_moves(patience)
            self._hurried = False
            missing = self.refused + [what for what, _ in self._waiting]
            because = f" ({self._problem})" if self._waiting and self._problem else ""
        return f"{in_words(missing)}{because}" if missing else ""

    def close(self) -> None:
        """Make no more calls."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait_while_it_moves(self, patience: float) -> None:
        self._last_answer = time.monotonic()
        while self._waiting:
            left = self._last_answer + patience - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                what, call = self._waiting[0]
            problem: Exception | None = None
            try:
                call()
            except Exception as error:  # whatever it is, what comes after it shall be delivered
                problem = error
            with self._changed:
                if problem is not None and is_away(problem):
                    self._note_absence(problem)
                    self._changed.wait_for(lambda: self._closed or self._hurried, RETRY)
                    self._changed.wait_for(lambda: self._closed, HURRIED_RETRY)
                else:
                    self._waiting.popleft()
                    self._note_answer(what, problem)
                    self._changed.notify_all()

    def _note_absence(self, problem: Exception) -> None:
        self._problem = reason(problem)
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._tell(
                f"{self.where} is away ({self._problem}); the training goes on, and what there is "
                "to track is sent when it is back"
            )

    def _note_answer(self, what: str | int, problem: Exception | None) -> None:
        self._last_answer = time.monotonic()
        if problem is None:
            self._late.append(what)
        else:
            self.refused.append(what)
            self._tell(f"{self.where} refuses {in_words([what])}: {reason(problem)}")
        if self._waiting:
            return
        if self._away_since is not None:
            away = duration(time.monotonic() - self._away_since)
            self._tell(f"{self.where} is back after {away}: {in_words(self._late)} delivered")
        self._away_since, self._problem, self._late = None, "", []


def in_words(things: Sequence[str | int]) -> str:
    """What was delivered, or is missing; numbers are epochs."""
    epochs = [thing for thing in things if isinstance(thing, int)]
    words = [f"epoch {epoch}" for epoch in epochs]
    if len(epochs) > 2 and epochs == list(range(epochs[0], epochs[-1] + 1)):
        words = [f"epochs {epochs[0]} to {epochs[-1]}"]
    return ", ".join(words + [thing for thing in things if isinstance(thing, str)])
