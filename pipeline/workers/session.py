"""The Ray session that a run works in: started on this machine, or the one of a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

from pipeline.config import PipelineError
from pipeline.failures import first_line
from pipeline.workers.board import EventBoard, Worker
from pipeline.workers.placement import Cluster, Machine
from pipeline.workers.watchdog import kill_worker

#: Seconds between two looks at the workers. Ray's own default of 2 s is paid by every epoch,
#: because a report waits for the next look.
_POLL_INTERVAL = "0.2"

#: Seconds that Ray waits for room before it counts the machines again. With its own default of
#: 60 s an elastic training waits a minute for a machine that it has just lost.
_PLACEMENT_PATIENCE = "5"

#: What Ray puts before the name of a GPU type, to count it like a resource.
_TYPE = "accelerator_type:"

#: Seconds that the process on the machine of a worker may take to kill it.
_KILL_SECONDS = 30.0

#: Workers that can wait on a board at the same time.
_LISTENERS = 10_000

_ENVIRONMENT = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": _POLL_INTERVAL,
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _PLACEMENT_PATIENCE,
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

#: Of a session on this machine alone, which nobody takes away: one process fewer per start.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@contextlib.contextmanager
def ray_session(cores: int = 1) -> Iterator[Any]:
    """A Ray session, quiet; a cluster named by RAY_ADDRESS is joined, otherwise one is started.

    Args:
        cores: that Ray shall see on this machine at least, whether it has them or not.
    """
    address = os.environ.get("RAY_ADDRESS")
    wanted = _ENVIRONMENT if address else _ENVIRONMENT | _LOCAL_ENVIRONMENT
    os.environ.update({key: os.environ.get(key, value) for key, value in wanted.items()})
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not address:
        cores = max(os.cpu_count() or 1, cores)
        options |= {"address": "local", "num_cpus": cores, "include_dashboard": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _sheltered():
            ray.init(**options)
    except Exception as error:
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise PipelineError(f"cannot start {where}: {first_line(error)}") from None
    # Ray takes the signal for itself, prints a stack and exits at once.
    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _sheltered() -> Iterator[None]:
    """Within it, processes are started that live until the driver ends them, or is killed.

    A terminal that is closed signals all of them at once, as SLURM does when it ends a job, but
    the workers have to save their state first. For Ctrl-C, Ray itself does this.
    """
    # Ray needs some seconds more to end processes that do not heed the signal.
    blocked = {signal.SIGTERM} if "SLURM_JOB_ID" in os.environ else set()
    on_hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        signal.signal(signal.SIGHUP, on_hang_up)


def cluster(ray: Any) -> Cluster:
    """The machines of the Ray session, as Ray counts them."""
    from ray._private.state import state

    machines = []
    for node in ray.nodes():
        given = node["Resources"]
        cores, gpus = int(given.get("CPU", 0)), int(given.get("GPU", 0))
        names = sorted(key.removeprefix(_TYPE) for key in given if key.startswith(_TYPE))
        if node["Alive"] and (cores or gpus):
            types, name = frozenset(names), " ".join(names) or "GPU"
            machines.append(Machine(cores, gpus, types, name if gpus else ""))
    address = os.environ.get("RAY_ADDRESS")
    return Cluster(
        tuple(machines),
        name=f"the Ray cluster at {address}" if address else "this machine",
        is_local=not address,
        # Ray has no public word for it, and its trainer asks the same.
        grows=state.get_max_resources_from_cluster_config() is not None,
    )


def event_board(ray: Any) -> Any:
    """A board on this machine, so that it is not lost with another one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, max_concurrency=_LISTENERS)(EventBoard)
    return board.options(scheduling_strategy=here).remote()


def kill(ray: Any, worker: Worker) -> bool:
    """Kill a worker, whatever state it is in; False where its machine does not answer."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(kill_worker).options(scheduling_strategy=there)
    try:
        ray.get(task.remote(worker.pid), timeout=_KILL_SECONDS)
    except ray.exceptions.RayError:
        return False
    return True
