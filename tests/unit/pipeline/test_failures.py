"""What is said of failures, of errors that were really raised."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from data_prep import DataError
from pipeline.failures import (
    Kind,
    as_event,
    describe_failure,
    is_lost_worker,
    keep_trace,
    kind_of,
    training_error,
)
from pipeline.workers.board import Worker

WORKERS = {rank: Worker(rank, 100 + rank, "node", f"10.0.0.{rank}") for rank in range(3)}

#: Two processes of a gloo group, of which one leaves in the middle of a sum.
PEERS = """
import os, sys, torch
import torch.distributed as dist
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
dist.all_reduce(torch.ones(1))
if rank == 1:
    os._exit(1)
try:
    dist.all_reduce(torch.ones(1))
except Exception as error:
    print(error)
"""

#: Actors that die in a real Ray session: by their own hand, and by Ray's for their memory.
DEATHS = """
import json, os, time, ray
import pipeline.failures as failures
ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
    _system_config={"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 200}
    if os.environ["MEMORY"] else {},
)

@ray.remote
class Actor:
    def leave(self):
        os._exit(1)
    def stay(self):
        hoard = bytearray(1 << 28)
        time.sleep(30)

actor = Actor.remote()
try:
    ray.get(actor.stay.remote() if os.environ["MEMORY"] else actor.leave.remote())
except ray.exceptions.RayError as error:
    print(json.dumps([failures.kind_of(error).name, failures.is_lost_worker(error), str(error)]))
ray.shutdown()
"""


def raised(outer: Exception, inner: Exception | None = None) -> Exception:
    """The outer error as it is caught, made of the inner one where there is one."""
    with pytest.raises(type(outer)) as caught:
        try:
            raise inner or outer
        except Exception as error:
            if inner is None:
                raise
            raise outer from error
    return caught.value


def test_an_explained_error_is_its_line_and_leaves_no_trace(tmp_path):
    description = as_event(raised(DataError("train.beton is missing\n(look again)")))
    error = training_error(description, tmp_path)
    assert str(error) == "train.beton is missing"
    assert list(tmp_path.iterdir()) == []


def test_a_line_made_of_a_system_error_says_it_all(tmp_path):
    made = raised(DataError("cannot read x: No such file"), FileNotFoundError(2, "No such file"))
    assert str(training_error(as_event(made), tmp_path)) == "cannot read x: No such file"
    assert list(tmp_path.iterdir()) == []


def test_an_explained_error_made_of_an_unforeseen_one_keeps_the_trace_of_both(tmp_path):
    made = raised(DataError("epoch 2, step 7: KeyError: 'label'"), KeyError("label"))
    error = training_error(as_event(made), tmp_path)
    assert str(error).startswith("training failed: epoch 2, step 7: KeyError: 'label'; the full")
    trace = (tmp_path / "failure-1.txt").read_text()
    assert "KeyError: 'label'" in trace and "DataError: epoch 2, step 7" in trace
    assert "raise inner or outer" in trace


def test_an_unforeseen_error_is_its_innermost_cause_and_a_trace(tmp_path):
    made = raised(RuntimeError("a worker failed"), ZeroDivisionError("division by zero"))
    error = training_error(as_event(made), tmp_path)
    assert str(error).startswith("training failed: ZeroDivisionError: division by zero; the full")
    assert "RuntimeError: a worker failed" in (tmp_path / "failure-1.txt").read_text()


def test_traces_are_numbered_and_none_is_lost_where_the_folder_cannot_be_written(tmp_path):
    assert keep_trace("one", tmp_path) == tmp_path / "failure-1.txt"
    assert keep_trace("two", tmp_path) == tmp_path / "failure-2.txt"
    assert keep_trace("three", tmp_path / "missing") is None
    error = training_error({"text": "why", "trace": "all of it"}, tmp_path / "missing")
    assert str(error) == "training failed: why"


@pytest.mark.parametrize(
    "allocate",
    [lambda: bytearray(1 << 62), lambda: torch.empty(1 << 60), lambda: torch.ones(1 << 55)],
)
def test_memory_that_is_not_there_says_what_to_lower_and_is_not_tried_again(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    text = as_event(caught.value)["text"]
    assert text.startswith("out of memory (")
    assert text.endswith("; lower train.batch_size or raise train.accumulation")
    assert not is_lost_worker(caught.value)


def test_a_gpu_without_memory_is_told_as_such():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert as_event(error)["text"].startswith("out of memory (CUDA out of memory. Tried")
    assert not is_lost_worker(error)


@pytest.fixture(scope="module")
def broken_connection(tmp_path_factory) -> RuntimeError:
    """What gloo says in a process whose peer is gone."""
    folder = tmp_path_factory.mktemp("peers")
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", PEERS, str(folder), str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    text, _ = peers[0].communicate(timeout=60)
    peers[1].wait()
    return RuntimeError(text)


def test_a_broken_connection_is_not_the_cause_where_another_worker_failed(broken_connection):
    assert kind_of(broken_connection) is Kind.CONNECTION
    assert is_lost_worker(broken_connection)
    errors = {0: broken_connection, 1: RuntimeError("actor died"), 2: broken_connection}
    event = describe_failure(errors, WORKERS)
    assert event["text"] == "worker 1 (process 101 on 10.0.0.1) was killed or crashed"
    assert event["pids"] == [101] and not event["preempted"]
    assert "Connection closed by peer" in event["trace"] or "/gloo/" in event["trace"]
    alone = describe_failure({0: broken_connection, 2: broken_connection}, WORKERS)
    assert alone["text"].startswith("the connections of worker 0 (process 100 on 10.0.0.0) and 1")


def test_a_lost_machine_is_the_cause_of_the_workers_lost_with_it():
    lost = RuntimeError("The actor died because its node has died. Node Id: 5c")
    event = describe_failure({1: RuntimeError("actor died"), 2: lost}, WORKERS)
    assert event["text"] == "the machine 10.0.0.2 is lost, and with it worker 2"


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "kind"), [("", "KILLED"), ("1", "MEMORY")])
def test_what_ray_says_of_a_dead_actor_is_understood(memory, kind, monkeypatch):
    monkeypatch.setenv("MEMORY", memory)
    done = subprocess.run(
        [sys.executable, "-c", DEATHS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # Ray prints lines of its own.
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith('["')]
    found, lost, text = json.loads(answer)
    assert (found, lost) == (kind, True), text
