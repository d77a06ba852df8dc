"""What the tests of stores and of the tracker share: reading back, without MLflow."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import PipelineError

REPOSITORY = Path(__file__).parents[3]


def rows(runs: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(runs / "mlflow.db")) as connection:
        return connection.execute(query).fetchall()


def one_line(error: pytest.ExceptionInfo[PipelineError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
