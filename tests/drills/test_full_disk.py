"""A disk that fills up while a training saves its state."""

from __future__ import annotations

import contextlib
import re

import pytest

from tests.command_line import BEGINNING, CommandLine, assert_equal_bit_for_bit

NAME = "digits_lenet5_ternary"

#: Checkpoints of 10 MB each, of which two stay and a third one is being written.
SETTINGS = (
    *("--experiment", NAME, "train.epochs=2", "train.batch_size=8", "data.synthetic=[800,64]"),
    *("checkpoint.steps=20", "tracking.enabled=false"),
)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray"])
@pytest.mark.parametrize("small_disk", [60_000], indirect=True)
def test_a_full_disk_is_one_line_and_with_room_again_the_run_goes_on(
    small_disk, tmp_path, prepared, launcher
):
    settings = (*SETTINGS, f"scaling.launcher={launcher}")
    undisturbed = CommandLine(tmp_path / "undisturbed", prepared)
    undisturbed.run(*settings)

    command_line = CommandLine(small_disk / "project", prepared)
    run = command_line.watch(*settings)
    command_line.wait_for_checkpoint(run, NAME, "epoch-0000-step-000020")
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    output = run.end(1)
    name = command_line.run_folder(NAME).name
    assert re.search(
        r"^error: .*checkpoint epoch-\S+ cannot be saved in .*: No space left on device; "
        rf"the last whole one is epoch-\S+; continue with: .* --resume {name}$",
        output.splitlines()[-1],
    ), output
    assert "restarting" not in output, "a full disk is still full after a restart"

    ballast.unlink()
    resumed = command_line.watch(*settings, "--resume", name)
    assert "continuing after step" in resumed.end(0, BEGINNING)
    assert_equal_bit_for_bit(command_line.weights(NAME, 2), undisturbed.weights(NAME, 2))
