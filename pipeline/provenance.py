"""On what a run was made: code, packages, machine; as tags for the tracker and the model card."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import platform
import subprocess
from pathlib import Path

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
    MLflow's pages show as the source version) and `git.dirty` only in a git checkout.
    """
    tags = {
        "mlflow.user": getpass.getuser(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(_git("status", "--porcelain"))).lower()
    return tags


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
