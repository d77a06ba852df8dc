"""On what a run was made: code, packages, machine; as tags for the tracker and the model card."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
REPORTED_PACKAGES = (
    "torch",
    "torchvision",
    "ray",
    "mlflow",
    "ffcv",
    "numba",
    "numpy",
    "opencv-python",
    "pydantic",
    "scikit-learn",
)


def environment_tags() -> dict[str, str]:
    """Tags of this process's environment, all text.

    `version.<package>` is there for what is installed; `mlflow.source.git.commit` (the name that
    MLflow's pages show as the source version) and `git.dirty` only in a git checkout of this
    project, not in a copy inside another repository.
    """
    tags = {
        "mlflow.user": _user(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    if _git("rev-parse", "--show-toplevel") != str(PROJECT):
        return tags
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    if commit is not None and changes is not None:
        tags["git.dirty"] = str(bool(changes)).lower()
    return tags


def _user() -> str:
    """The user's name; the number of one that has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return str(os.getuid())


def _git(*arguments: str) -> str | None:
    """What git says about this project's folder; None where it fails or is missing."""
    command = ["git", "-C", str(PROJECT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
