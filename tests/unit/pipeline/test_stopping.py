from __future__ import annotations

import signal
import threading
import time

import pytest

from pipeline import stopping
from pipeline.stopping import StopRequest


class Ended(Exception):
    pass


def wait_for_the(wishes: list[str]) -> None:
    """A thread tells of it."""
    deadline = time.monotonic() + 10
    while not wishes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert wishes == ["wish"]


@pytest.fixture(autouse=True)
def handlers():
    """As the command line has them: each signal that ends a run raises."""

    def end(number, frame):
        raise Ended(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_a_wish_and_ends_nothing_until_it_is_said():
    told = []
    with StopRequest(lambda: told.append("wish")) as stop:
        assert not stop.requested
        stop.finish()
        signal.raise_signal(signal.SIGTERM)
        wait_for_the(told)
        with pytest.raises(Ended, match=str(int(signal.SIGTERM))):
            stop.finish()


def test_a_second_interrupt_ends_at_once():
    with StopRequest(lambda: None) as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


def test_the_signals_of_a_terminal_that_is_closed_are_one_wish():
    told = []
    with StopRequest(lambda: told.append("wish")):
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        wait_for_the(told)


def test_when_the_time_is_over_the_signal_ends_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    started = time.monotonic()
    with pytest.raises(Ended), StopRequest(lambda: None):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(20)
    assert time.monotonic() - started < 10


def test_afterwards_signals_mean_what_they_meant_before():
    with StopRequest(lambda: None):
        pass
    with pytest.raises(Ended):
        signal.raise_signal(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(lambda: None) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def elsewhere():
        with StopRequest(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
