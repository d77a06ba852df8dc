"""The ground: `make help`, the lock, and a set-up that says in one line what it lacks.

The set-up is run for real in a copy of its files; its PATH holds only the commands named here, so
that whatever else this machine has is missing there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
COMMANDS = ["bash", "cat", "cut", "dirname", "env", "flock", "grep", "id", "mkdir", "rm"]
COMMANDS += ["sha256sum", "tail", "true"]
# Runs a command as somebody who is not root, but may still read a Python in root's home.
AS_NOBODY = [
    shutil.which("setpriv") or "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
]
AS_NOBODY += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]


def declared_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, development tools included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    return [Requirement(line) for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, with a folder `commands` that serves as its PATH."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    shutil.copytree(ROOT / "infra", tmp_path / "infra")
    (tmp_path / "commands").mkdir()
    for name in COMMANDS:
        add_command(tmp_path, name, Path(shutil.which(name) or f"no {name} on this machine"))
    return tmp_path


def add_command(checkout: Path, name: str, program: Path) -> None:
    (checkout / "commands" / name).symlink_to(program.resolve(strict=True))


def add_python(checkout: Path) -> None:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    add_command(checkout, name, Path(sys.base_prefix) / "bin" / name)


def add_compiler(checkout: Path) -> None:
    """Commands that answer as if every package that FFCV compiles against were installed."""
    for name in ("g++", "pkg-config"):
        add_command(checkout, name, checkout / "commands" / "true")


def run_setup(checkout: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Run `make setup` in the copy, cut off from the network."""
    closed_port = "http://127.0.0.1:9"
    environment = {
        "PATH": str(checkout / "commands"),
        "HOME": str(checkout),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": closed_port,
        "UV_INDEX_URL": closed_port,
        "UV_CACHE_DIR": str(checkout / "cache"),
    }
    return subprocess.run(
        [*prefix, shutil.which("make") or "make", "setup"],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def said_on_stderr(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if not line.startswith("make:")]


def test_help_lists_every_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets
    assert {"setup", "demo", "test", "test-all", "lint", "bench", "clean"} <= targets


@pytest.mark.skipif(
    not (ROOT / ".venv/setup-state").exists(), reason="the environment is not from `make setup`"
)
def test_second_setup_takes_less_than_two_seconds() -> None:
    started = time.monotonic()
    result = subprocess.run(["make", "setup"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert "nothing to do" in result.stdout
    assert time.monotonic() - started < 2


def test_lock_holds_exact_versions_and_nothing_else() -> None:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line


def test_lock_satisfies_every_declared_range() -> None:
    for requirement in declared_requirements():
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(Version(LOCK[name])), requirement


def test_setup_without_root_or_sudo_names_the_packages(checkout: Path) -> None:
    add_python(checkout)
    add_command(checkout, "apt-get", checkout / "commands" / "true")
    result = run_setup(checkout, *(AS_NOBODY if os.geteuid() == 0 else ()))
    assert result.returncode == 2
    (line,) = said_on_stderr(result)
    assert line == (
        "Set-up needs root or sudo once; ask the administrator for: "
        "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev"
    )
    assert result.stdout == ""
    assert not (checkout / ".venv").exists()


def test_setup_without_python_in_range_says_which_one(checkout: Path) -> None:
    old = checkout / "commands" / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the check of a Python 3.9 ends with
    old.chmod(0o755)
    result = run_setup(checkout)
    assert result.returncode == 2
    (line,) = said_on_stderr(result)
    assert "Python 3.11 or 3.12" in line


def test_setup_without_network_names_the_log(checkout: Path) -> None:
    add_python(checkout)
    add_compiler(checkout)
    result = run_setup(checkout)
    assert result.returncode == 2
    (line,) = said_on_stderr(result)
    assert "is there a network?" in line
    assert line.endswith(str(checkout / "setup.log"))
    assert "Connection refused" in (checkout / "setup.log").read_text()


def test_only_a_whole_environment_is_left_alone(checkout: Path) -> None:
    """Cut off from the network, a set-up succeeds only if it has nothing to do."""
    add_python(checkout)
    add_compiler(checkout)
    environment, lock = checkout / ".venv", checkout / "requirements.lock"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    lock.write_text("")
    complete = f"complete {hashlib.sha256(b'').hexdigest()}\n"
    state = environment / "setup-state"

    state.write_text(complete)
    assert run_setup(checkout).returncode == 0

    lock.write_text("numpy==2.0\n")  # not the lock that the environment was made from
    assert run_setup(checkout).returncode == 2
    state.write_text(f"complete {hashlib.sha256(lock.read_bytes()).hexdigest()}\n")
    assert run_setup(checkout).returncode == 2  # and numpy is not there

    lock.write_text("")
    state.write_text("installing\n")  # what a set-up that was killed leaves
    assert run_setup(checkout).returncode == 2
    state.write_text(complete)
    (environment / "bin/python").unlink()
    assert run_setup(checkout).returncode == 2
    assert state.read_text() == "installing\n"
