"""Who hangs, by what each worker says of itself; and a thread that says it in time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from pipeline.workers.board import Beat, Worker
from pipeline.workers.watchdog import SILENCE, Watchdog, find_hang, idleness, kill_worker, limit

WORKERS = [Worker(rank, 100 + rank, f"node{rank}", f"10.0.0.{rank}") for rank in range(3)]
IN_TIME = Beat(0, 100, "computing", step=57, count=115, seconds=1.0, usual=0.3, limit=36.0)


def beats(*changes: dict) -> list[tuple[Beat, float]]:
    """Of ranks 0, 1, ... with what differs from a beat in time, and how old each is."""
    rows = []
    for rank, change in enumerate(changes):
        age = change.pop("age", 1.0)
        rows.append((replace(IN_TIME, rank=rank, pid=100 + rank, **change), age))
    return rows


def culprits(rows: list[tuple[Beat, float]]) -> list[int]:
    hang = find_hang(WORKERS, rows)
    return [] if hang is None else [worker.rank for worker in hang.workers]


@pytest.mark.parametrize(
    ("usual", "longest", "expected"),
    [(None, 300.0, 300.0), (0.3, 300.0, 36.0), (60.0, 300.0, 300.0), (0.0, 10.0, 10.0)],
)
def test_a_step_may_take_thirty_seconds_and_twenty_times_as_long_as_usual(usual, longest, expected):
    assert limit(usual, longest) == pytest.approx(expected)
    assert limit(usual, 1e6, stall=90.0) == limit(usual, 1e6) + (0 if usual is None else 90)


def test_workers_in_time_do_not_hang():
    assert culprits(beats({}, {"seconds": 34.0}, {"seconds": 20.0, "age": 15.0})) == []


def test_the_worker_that_is_behind_hangs_and_those_that_wait_for_it_do_not():
    late = {"seconds": 40.0}
    behind = {**late, "doing": "reading images", "count": 114}
    assert culprits(beats(late, behind, late)) == [1]
    assert culprits(beats(late, late, {**late, "step": 56, "count": 300})) == [2]


def test_of_equally_far_workers_the_one_that_waits_for_no_other_hangs():
    late, waiting = {"seconds": 40.0}, {"seconds": 40.0, "waiting": True}
    assert culprits(beats(waiting, waiting, late)) == [2]
    assert culprits(beats(late, late, late)) == [0, 1, 2]


def test_a_silent_worker_hangs_however_far_it_has_come():
    late = {"seconds": 40.0}
    silent = {"seconds": 1.0, "age": 40.0, "step": 58}
    assert culprits(beats(late, late, silent)) == [2]
    assert culprits(beats(late, late)) == [2], "it has never said a word"


def test_a_silent_worker_is_given_the_time_that_what_it_does_may_take():
    saving = {"seconds": 5.0, "age": SILENCE + 30, "limit": 300.0, "usual": None}
    assert culprits(beats({"seconds": 40.0}, saving, {"seconds": 40.0})) == []


def test_a_worker_that_froze_before_it_could_say_at_which_step_is_not_given_that_time():
    starting = {"seconds": 1.0, "age": 40.0, "limit": 300.0, "usual": None, "step": 0}
    assert culprits(beats({"seconds": 40.0}, starting, {"seconds": 40.0})) == [1]


def test_storage_may_stall_but_a_worker_that_does_not_say_so_is_frozen():
    late, reading = {"seconds": 40.0}, {"doing": "reading images", "count": 0, "limit": 126.0}
    assert culprits(beats(late, {**reading, "seconds": 40.0}, late)) == []
    assert culprits(beats(late, {**reading, "seconds": 127.0}, late)) == [1]
    assert culprits(beats(late, {**reading, "seconds": 1.0, "age": 40.0}, late)) == [1]


def test_one_that_is_behind_and_within_its_limit_is_waited_for():
    late = {"seconds": 40.0, "step": 58, "count": 120}
    saving = {"doing": "saving", "seconds": 45.0, "limit": 300.0, "usual": None}
    assert culprits(beats(late, saving, late)) == []


def test_what_a_former_worker_of_the_rank_said_does_not_count():
    rows = beats({"seconds": 40.0}, {"seconds": 40.0}, {"seconds": 40.0, "step": 3})
    rows[2] = (replace(rows[2][0], pid=7), 1.0)
    assert culprits(rows) == [2], "the new one has not said a word"
    assert culprits([rows[2]]) == [], "nothing is known of the others"


def test_the_line_names_worker_process_machine_step_and_usual_time():
    rows = beats({"seconds": 40.0}, {"seconds": 33.0, "count": 114, "doing": "reading images"})
    rows[1] = (replace(rows[1][0], seconds=39.0), 1.0)
    hang = find_hang(WORKERS[:2], rows)
    assert hang is not None
    assert hang.text == (
        "worker 1 (process 101 on 10.0.0.1) hangs: nothing for 40 s at step 57, reading images; "
        "a step usually takes 0.3 s"
    )
    assert idleness(replace(IN_TIME, usual=0.004)).endswith("a step usually takes 4 ms")
    assert idleness(replace(IN_TIME, usual=None)) == "nothing for 1 s at step 57, computing"


def test_the_watchdog_says_for_how_long_and_where_a_training_hangs(monkeypatch):
    monkeypatch.setattr("pipeline.workers.watchdog.INTERVAL", 0.05)
    said: list[Beat] = []
    released = threading.Event()

    def hang_here() -> None:
        released.wait(5)

    watchdog = Watchdog(1, 0.2, said.append)
    watchdog.begin("reading images", 7, None)
    threading.Timer(0.6, released.set).start()
    hang_here()
    watchdog.begin("computing", 7, None)
    time.sleep(0.12)
    watchdog.close()
    late = [beat for beat in said if beat.stacks]
    assert late and all(beat.seconds > 0.2 and beat.doing == "reading images" for beat in late)
    assert "in hang_here" in late[0].stacks and "MainThread" in late[0].stacks
    assert not late[0].waiting
    assert (said[-1].doing, said[-1].step, said[-1].stacks) == ("computing", 7, "")
    assert said[-1].count > late[-1].count
    number = len(said)
    time.sleep(0.12)
    assert len(said) == number, "it says no more once it is closed"


def test_a_process_is_killed_as_a_worker_only_if_it_is_one():
    program = "import time; print('ready', flush=True); time.sleep(60)"
    processes = [
        subprocess.Popen([sys.executable, "-c", program, name], stdout=subprocess.PIPE)
        for name in ("another", "ray::RayTrainWorker")
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        kill_worker(process.pid)
    other, worker = processes
    assert worker.wait(5) == -9
    assert other.poll() is None
    other.kill()
    other.wait()
    kill_worker(other.pid)  # which is gone
