"""Workers that hang, and workers whose memory runs out."""

from __future__ import annotations

import re
import time

import psutil
import pytest

from tests.command_line import (
    BEGINNING,
    PATIENCE,
    CommandLine,
    assert_equal_bit_for_bit,
    workers_of,
)

NAME = "digits_lenet5_ternary"
SETTINGS = (
    *("--experiment", NAME, "train.epochs=2", "train.batch_size=8", "data.synthetic=[800,64]"),
    *("checkpoint.steps=20", "tracking.enabled=false"),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prepared):
    command_line = CommandLine(tmp_path_factory.mktemp("undisturbed") / "project", prepared)
    command_line.run(*SETTINGS)
    return command_line.weights(NAME, 2)


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_and_replaced(command_line, undisturbed):
    run = command_line.watch(*SETTINGS)
    command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000040")
    frozen = workers_of(run.process.pid)[-1]
    frozen.suspend()
    began = time.monotonic()
    noticed = run.wait_for_line("restarting from the last checkpoint") - began
    resumed = run.wait_for_line("continuing after step") - began
    print(f"noticed after {noticed:.1f} s, restored after {resumed:.1f} s")
    output = run.end(0, BEGINNING)
    assert re.search(rf"worker \d \(process {frozen.pid} .*at step \d+.*usually takes", output)
    assert output.count("restarting") == 1
    assert_equal_bit_for_bit(command_line.weights(NAME, 2), undisturbed)


@pytest.mark.slow
def test_workers_that_ray_kills_for_memory_lose_nothing(command_line, undisturbed):
    """The memory is taken up here, beside the training, until Ray finds that it is too little.

    Ray may kill one worker, which is replaced, or its own controller too, which ends the run.
    """
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    total, used = get_system_memory(), get_used_memory()
    # The training itself takes some 4 GB.
    threshold = (used + min(7 << 30, 0.7 * (total - used))) / total
    run = command_line.watch(
        *SETTINGS,
        RAY_memory_usage_threshold=f"{threshold:.4f}",
        RAY_memory_monitor_refresh_ms="100",
    )
    command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000040")
    taken: list[bytes] = []

    deadline = time.monotonic() + PATIENCE
    while "memory" not in run.output:
        assert time.monotonic() < deadline, run.output
        if len(taken) < 128:
            taken.append(b"x" * (64 << 20))
    taken.clear()
    code = run.process.wait(BEGINNING)
    if code == 0:
        assert re.search(r"worker \d .*ran out of memory; .*restarting", run.output), run.output
    else:
        last = run.end(1).splitlines()[-1]
        assert re.search(r"^error: .*memory.*; continue with: .* --resume ", last), last
        command_line.run(*SETTINGS, "--resume")
    assert_equal_bit_for_bit(command_line.weights(NAME, 2), undisturbed)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_into_memory_is_one_line_and_is_not_tried_again(command_line):
    large = ("train.batch_size=2048", "data.synthetic=[2048,64]", "data.backend=torch")
    run = command_line.watch(*SETTINGS, *large)
    run.wait_for_line("opening the prepared data", BEGINNING)
    for worker in workers_of(run.process.pid):
        room = worker.memory_info().vms + (200 << 20)
        worker.rlimit(psutil.RLIMIT_AS, (room, room))
    output = run.end(1)
    problem = r"^error: training failed: worker .*: out of memory \(.*; lower train.batch_size or "
    assert re.search(problem, output, re.MULTILINE), output
    assert "restarting" not in output
