from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.locks import exclusive


def start(code: str, place: Path) -> subprocess.Popen[str]:
    program = f"""
import sys, time
from pathlib import Path
from data_prep.locks import exclusive
place = Path({str(place)!r})
{code}
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def nothing() -> None:
    """Wait in silence."""


def test_three_processes_go_one_after_the_other_and_leave_no_file(tmp_path: Path) -> None:
    number = tmp_path / "number"
    number.write_text("0")
    # The lock file comes and goes a hundred times; a lost turn would lose a count.
    code = """
for _ in range(100):
    with exclusive(place / "lock", lambda: None):
        count = int((place / "number").read_text())
        time.sleep(0.001)
        (place / "number").write_text(str(count + 1))
"""
    processes = [start(code, tmp_path) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert errors == ["", "", ""] and number.read_text() == "300"
    assert list(tmp_path.iterdir()) == [number]


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    code = """
with exclusive(place / "lock", lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = start(code, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"

    def give_up() -> None:
        raise BlockingIOError

    with pytest.raises(BlockingIOError), exclusive(tmp_path / "lock", give_up):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock", give_up):
        assert (tmp_path / "lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError), exclusive(tmp_path / "lock", nothing):
        raise ValueError
    with exclusive(tmp_path / "lock", nothing):
        pass
    assert list(tmp_path.iterdir()) == []
