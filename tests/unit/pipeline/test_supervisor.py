"""What the driver makes of the events of a training that runs elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.failures import TrainingError
from pipeline.workers import supervisor as supervisor_module
from pipeline.workers.board import Beat, Event, News, Worker
from pipeline.workers.supervisor import Supervisor

WORKERS = [Worker(rank, 100 + rank, "node", "10.0.0.1") for rank in range(2)]


class Driver:
    """A supervisor whose training is told what happens, and what comes of it."""

    def __init__(self, folder: Path, max_failures: int = 1, room: int = 2) -> None:
        self.told: list[Event] = []
        self.killed: list[int] = []
        self.reachable = True
        self.supervisor = Supervisor(
            max_failures, 2, folder, self.told.append, kill=self.kill, room=lambda: room
        )

    def kill(self, worker: Worker) -> bool:
        self.killed.append(worker.rank)
        return self.reachable

    def __call__(self, *events: Event, beats: tuple[Beat, ...] = ()) -> None:
        self.supervisor.take(News(list(events), [(beat, 0.0) for beat in beats]))

    def start(self) -> None:
        self({"kind": "group", "workers": WORKERS})

    def fail(self, rank: int = 1, preempted: bool = False) -> None:
        self.start()
        text = f"{WORKERS[rank]} was killed or crashed"
        event = {"kind": "failure", "text": text, "trace": "the trace", "pids": [100 + rank]}
        self(event | {"preempted": preempted})


@pytest.fixture
def driver(tmp_path) -> Driver:
    return Driver(tmp_path)


def test_each_failure_is_a_line_and_a_trace_that_only_its_user_can_read(driver, tmp_path):
    driver.fail()
    driver({"kind": "checkpoint", "epoch": 0, "done": 3})
    driver.fail()
    lines = [event for event in driver.told if event["kind"] == "restart"]
    assert [line["text"] for line in lines] == [f"{WORKERS[1]} was killed or crashed"] * 2
    for number, line in enumerate(lines, start=1):
        path = tmp_path / f"failure-{number}.txt"
        assert line["trace"] == str(path)
        assert path.read_text() == "the trace"
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("saved", ["checkpoint", "epoch"])
def test_a_new_checkpoint_begins_the_count_of_failures_anew(driver, saved):
    for _ in range(3):
        driver.fail()
        driver({"kind": saved, "epoch": 1, "done": 0})
    driver.fail()
    with pytest.raises(TrainingError, match="failure 2 without a new checkpoint"):
        driver.fail()


def test_too_many_failures_end_the_training_with_the_last_cause_and_an_offer_to_go_on(
    driver, tmp_path
):
    driver.fail()
    with pytest.raises(TrainingError) as caught:
        driver.fail(rank=0)
    assert str(caught.value) == (
        "training failed: worker 0 (process 100 on 10.0.0.1) was killed or crashed, failure 2 "
        "without a new checkpoint (scaling.max_failures=1); the full trace is in "
        f"{tmp_path}/failure-2.txt"
    )
    assert caught.value.transient


def test_machines_that_are_taken_away_are_no_failures(driver):
    for _ in range(5):
        driver.fail(preempted=True)


def test_a_training_that_has_saved_its_state_to_stop_need_not_be_waited_for(driver):
    assert not driver.supervisor.is_training
    driver.start()
    assert driver.supervisor.is_training
    driver({"kind": "stopped", "epoch": 1, "done": 5})
    assert not driver.supervisor.is_training
    assert driver.told[-1]["kind"] == "stopped"


def test_an_error_of_the_program_ends_the_training_at_once(driver):
    driver.start()
    with pytest.raises(TrainingError, match=r"^the loss was not finite$") as caught:
        driver({"kind": "failed", "text": "the loss was not finite", "trace": None})
    assert not caught.value.transient


def test_a_wait_for_machines_is_told_at_growing_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "_FIRST_WAIT", 0.05)
    driver = Driver(tmp_path, room=1)
    ends = time.monotonic() + 0.5
    while time.monotonic() < ends:
        driver()
        time.sleep(0.005)
    lines = [event["text"] for event in driver.told]
    assert lines == ["waiting for 2 workers; the cluster has room for 1"] * 3  # 0.05, 0.15, 0.45
    driver.start()
    time.sleep(0.05)
    driver()
    assert len(driver.told) == 3


def stuck(rank: int, count: int) -> Beat:
    return Beat(rank, 100 + rank, "computing", 5, count, 40.0, 0.3, 36.0, stacks="the stacks")


@pytest.fixture
def hanging(driver, monkeypatch) -> Driver:
    """A training of which rank 1 hangs."""
    monkeypatch.setattr(supervisor_module, "_LOOK_INTERVAL", 0.0)
    driver.start()
    return driver


def test_a_worker_that_hangs_twice_in_a_row_is_killed_and_its_failure_is_the_hang(
    hanging, tmp_path
):
    hanging(beats=(stuck(0, 9), stuck(1, 8)))
    assert hanging.killed == [], "it may have gone on meanwhile"
    hanging(beats=(stuck(0, 9), stuck(1, 8)))
    assert hanging.killed == [1]
    hanging(beats=(stuck(0, 9), stuck(1, 8)))
    assert hanging.killed == [1], "once is enough"
    event = {"kind": "failure", "text": "worker 1 was killed", "trace": "of the kill"}
    hanging(event | {"pids": [101], "preempted": False})
    (line,) = hanging.told
    assert line["text"].startswith("worker 1 (process 101 on 10.0.0.1) hangs: nothing for 40 s")
    trace = (tmp_path / "failure-1.txt").read_text()
    assert "the stacks" in trace and "of the kill" in trace


def test_a_worker_that_goes_on_in_time_is_left_alone(hanging):
    hanging(beats=(stuck(0, 9), stuck(1, 8)))
    hanging(beats=())
    hanging(beats=(stuck(0, 9), stuck(1, 8)))
    assert hanging.killed == []


def test_a_worker_that_hangs_out_of_reach_ends_the_training(hanging):
    hanging.reachable = False
    hanging(beats=(stuck(0, 9), stuck(1, 8)))
    with pytest.raises(TrainingError, match=r"hangs: .*; its machine does not answer") as caught:
        hanging(beats=(stuck(0, 9), stuck(1, 8)))
    assert caught.value.transient
