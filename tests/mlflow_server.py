"""A real `mlflow server`, to be killed, frozen, and started again on the same database."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen


class Server:
    """`mlflow server` on a folder of runs, with its own process group."""

    def __init__(self, runs: Path, folder: Path) -> None:
        with closing(socket.socket()) as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.command = [
            *(sys.executable, "-m", "mlflow", "server", "--port", str(self.port)),
            *("--workers", "1", "--serve-artifacts", "--artifacts-destination", str(folder)),
            *("--backend-store-uri", f"sqlite:///{runs / 'mlflow.db'}"),
        ]

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=5) as response:
                    assert response.read() == b"OK"
                    return
            except URLError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()
        while self.listens():  # its workers may die a moment after it
            time.sleep(0.05)

    def listens(self) -> bool:
        with closing(socket.socket()) as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, path: str, /, **query: str) -> bytes:
        with urlopen(f"{self.uri}{path}?{urlencode(query)}", timeout=20) as response:
            return bytes(response.read())

    def metric(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row of a metric, from the server's own interface."""
        path = "/api/2.0/mlflow/metrics/get-history"
        answer = json.loads(self.get(path, run_id=run_id, metric_key=name))
        return [(int(row.get("step", 0)), row["value"]) for row in answer.get("metrics", [])]
