"""Ray clusters of several machines on this one, and programs that work with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

from tests.command_line import REPOSITORY


@contextmanager
def ray_cluster(*nodes: Mapping[str, Any]) -> Iterator[Cluster]:
    """A cluster of real Ray nodes; within it, RAY_ADDRESS names it.

    Args:
        nodes: what Ray shall count on each, the head first, as ``{"num_cpus": 1}``.
    """
    head, *others = nodes
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        for node in others:
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.shutdown()


def answer_of(program: str, *arguments: str, seconds: float = 250) -> Any:
    """What a Python program prints as JSON in its last line; it has to end well."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
