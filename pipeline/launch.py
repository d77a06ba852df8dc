"""Run the training loop: in this process, or as a Ray Train worker group with restarts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep import DataError
from pipeline import inputs
from pipeline.board import Event, EventBoard
from pipeline.checkpoint import run_checkpoints
from pipeline.config import Experiment, PipelineError
from pipeline.context import RayTrainContext, TrainContext
from pipeline.failures import (
    TrainingError,
    as_event,
    cause,
    first_line,
    is_lost_worker,
    ray_failure,
    training_error,
)
from pipeline.loop import train
from pipeline.placement import (
    Cluster,
    Machine,
    WorkerGroup,
    check_address,
    check_shares,
    plan,
    this_machine,
)
from pipeline.weights import NO_SOURCES, Sources

if TYPE_CHECKING:
    from data_prep import Dataset, Manifest

#: Seconds between two looks at the workers. Ray's own default of 2 s is paid by every epoch,
#: because a report waits for the next look.
_POLL_INTERVAL = "0.2"

#: Seconds between two thoughts of adding or giving back workers, where their number may change.
_RESIZE_INTERVAL = 60.0

#: Seconds that Ray waits for room before it counts the machines again. With its own default of
#: 60 s an elastic training waits a minute for a machine that it has just lost.
_PLACEMENT_PATIENCE = "20"

#: What Ray puts before the name of a GPU type, to count it like a resource.
_TYPE = "accelerator_type:"

#: Seconds that the driver waits for an event before it looks whether the training has ended.
_PATIENCE = 0.5

#: For glibc in the workers: one heap that keeps freed memory. Otherwise each step hands its
#: activations back to the system and faults them in again, a fifth of the time of LeNet5 on the
#: CPU; one heap, because those of threads (Ray trains in one) shrink whatever the threshold.
_WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

_ENVIRONMENT = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": _POLL_INTERVAL,
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _PLACEMENT_PATIENCE,
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def planned_workers(experiment: Experiment) -> WorkerGroup:
    """The workers that the run will ask for, on this machine or on the cluster.

    Raises:
        PipelineError: when this machine, or the cluster, cannot give them.
    """
    scaling = experiment.scaling
    if scaling.launcher == "local":
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return WorkerGroup(1, 1, gpu, torch.get_num_threads())
    if not on_cluster(experiment):
        return plan(scaling, this_machine())
    check_address(os.environ["RAY_ADDRESS"])
    with _ray_session() as ray:
        return plan(scaling, _cluster(ray))


def check_scaling(experiment: Experiment) -> None:
    """Refuse workers that are not to be had, or that cannot share the global batch."""
    check_shares(experiment.train, planned_workers(experiment))


def _cluster(ray: Any) -> Cluster:
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


def train_locally(
    experiment: Experiment,
    manifest: Manifest,
    folder: Path,
    tell: Callable[[Event], None],
    sources: Sources = NO_SOURCES,
) -> None:
    """Train in this process, on one device, without Ray.

    Args:
        sources: weights from elsewhere that the experiment names.

    Raises:
        TrainingError: when training failed.
    """
    try:
        context = TrainContext(tell)
        context.event("workers", **context.describe_workers())
        store = run_checkpoints(experiment, manifest, sources, folder)
        train(experiment, manifest, store, context, sources)
    except Exception as error:
        raise training_error(as_event(error), folder) from None


def on_cluster(experiment: Experiment) -> bool:
    """Whether the run joins a Ray cluster, which may have more machines than this one."""
    return experiment.scaling.launcher == "ray" and bool(os.environ.get("RAY_ADDRESS"))


def prepare_on_nodes(
    experiment: Experiment, dataset: Dataset, progress: Callable[[str, int, int], None]
) -> Manifest:
    """Prepare the data once on each machine of the cluster, at the same path on all of them.

    Raises:
        DataError: when a machine cannot, or has other images than the others.
        TrainingError: when a machine is lost meanwhile.
    """
    experiment = inputs.with_absolute_folders(experiment)
    with _ray_session() as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        board = _event_board(ray)
        nodes = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        ]
        task = ray.remote(num_cpus=1, max_retries=0)(_prepare_node)
        running = []
        for node in nodes:
            affinity = NodeAffinitySchedulingStrategy(node, soft=False)
            pinned = task.options(scheduling_strategy=affinity)
            running.append(pinned.remote(experiment, dataset, board))
        manifests: list[Manifest] = []
        while running:
            finished, running = ray.wait(running, timeout=_PATIENCE)
            for event in ray.get(board.take.remote(0.0)):
                stage = f"{event['stage']}, {len(manifests)} of {len(nodes)} machines ready"
                progress(stage, event["done"], event["total"])
            manifests += [_prepared(ray, reference) for reference in finished]
    _check_alike(manifests)
    return replace(manifests[0], reused=all(manifest.reused for manifest in manifests))


def _check_alike(manifests: list[Manifest]) -> None:
    if len({(manifest.fingerprint, manifest.folder) for manifest in manifests}) > 1:
        raise DataError(
            f"the machines of the cluster prepared different images in {manifests[0].folder}; give "
            "all of them the same raw files, copied with their times, and the same versions, or "
            "set data.location=shared"
        )


def _prepare_node(experiment: Experiment, dataset: Dataset, board: Any) -> Manifest:
    """What each machine runs."""

    def progress(stage: str, done: int, total: int) -> None:
        board.post.remote({"kind": "prepare", "stage": stage, "done": done, "total": total})

    return inputs.prepare(experiment, dataset, progress)


def _prepared(ray: Any, reference: Any) -> Manifest:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from None
        raise TrainingError(
            f"a machine cannot prepare the data: {first_line(error.cause)}"
        ) from None
    except ray.exceptions.RayError as error:
        raise TrainingError(f"a machine was lost during preparation: {first_line(error)}") from None


def _train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    # Otherwise one thread, which is what Ray makes of a reserved core.
    torch.set_num_threads(config["threads"])
    context = RayTrainContext(config["board"])
    experiment, manifest, sources = (config[key] for key in ("experiment", "manifest", "sources"))
    try:
        workers = context.describe_workers()
        context.event("workers", **workers)
        if experiment.scaling.nodes not in (None, workers["machines"]):
            text = f"Ray put the workers on {workers['machines']} machines, not as many as asked"
            context.event("note", text=text)
        store = run_checkpoints(experiment, manifest, sources, config["folder"])
        train(experiment, manifest, store, context, sources)
    except Exception as error:
        # A restart helps against a lost worker; an error of the program it would only repeat.
        if not is_lost_worker(error):
            context.fail(as_event(error))
        raise
    context.flush()


def train_on_ray(
    experiment: Experiment,
    manifest: Manifest,
    folder: Path,
    tell: Callable[[Event], None],
    sources: Sources = NO_SOURCES,
) -> None:
    """Train as a Ray Train worker group; a lost worker restarts it from the last checkpoint.

    The driver's main thread stays free for the display and for signals: ``fit`` runs in a
    thread beside it, because in the main thread Ray takes the interrupt signal for itself.

    Raises:
        TrainingError: when training failed for good; the full trace is in ``folder/error.txt``.
    """
    planned = planned_workers(experiment)
    with _ray_session(planned.least * planned.reserved_cores) as ray:
        group = plan(experiment.scaling, _cluster(ray))
        if group.room < group.least:
            text = (
                f"the cluster has room for {group.room} of {group.least} workers; "
                "waiting until it has more"
            )
            tell({"kind": "note", "text": text})
        board = _event_board(ray)
        config = {
            "experiment": experiment,
            "manifest": manifest,
            "sources": sources,
            "folder": folder,
            "board": board,
            "threads": group.threads,
        }
        trainer = _trainer(config, group)
        outcome: list[BaseException | None] = []

        def fit() -> None:
            try:
                trainer.fit()
                outcome.append(None)
            except BaseException as error:  # handed to the main thread below
                outcome.append(error)

        thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
        thread.start()
        running = True
        while running:
            running = thread.is_alive()
            try:
                events = ray.get(board.take.remote(_PATIENCE if running else 0.0))
            except ray.exceptions.RayError as error:
                raise TrainingError(f"the Ray cluster is lost: {first_line(error)}", True) from None
            for event in events:
                if event["kind"] == "failed":
                    raise training_error(event, folder)
                tell(event)
    if outcome[0] is not None:
        raise ray_failure(outcome[0], folder)


def _event_board(ray: Any) -> Any:
    """A board on this machine, so that it is not lost with another one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(EventBoard).options(scheduling_strategy=here).remote()


def _trainer(config: dict[str, Any], group: WorkerGroup) -> Any:
    """Ray's trainer of this group; ``config`` is what each worker gets."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class TellFailures(UserCallback):
        """Tell the driver why a worker group ended, before Ray starts the next one."""

        def __init__(self, restarts: int) -> None:
            self._restarts_left = restarts

        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            self._restarts_left -= 1
            if self._restarts_left < 0:
                return
            causes = {cause(error) for error in worker_exceptions.values()}
            config["board"].post.remote({"kind": "restart", "text": "; ".join(sorted(causes))})

    scaling, on_gpus = config["experiment"].scaling, group.gpu_name is not None
    # As mappings, because the annotations are those of the first version of Ray Train.
    scaling_options: dict[str, Any] = {
        "num_workers": group.most if group.least == group.most else (group.least, group.most),
        "elastic_resize_monitor_interval_s": _RESIZE_INTERVAL,
        "use_gpu": on_gpus,
        "resources_per_worker": {"CPU": group.reserved_cores} | ({"GPU": 1} if on_gpus else {}),
        "placement_strategy": group.strategy,
        "accelerator_type": scaling.gpu,
    }
    run_options: dict[str, Any] = {
        "name": "ray",
        "storage_path": str(config["folder"]),
        "failure_config": FailureConfig(max_failures=scaling.max_failures),
        "callbacks": [TellFailures(scaling.max_failures)],
        "worker_runtime_env": {"env_vars": _WORKER_ENVIRONMENT},
    }
    return TorchTrainer(
        _train_worker,
        train_loop_config=config,
        torch_config=TorchConfig(
            backend="nccl" if on_gpus else "gloo", timeout_s=int(scaling.timeout)
        ),
        scaling_config=ScalingConfig(**scaling_options),
        run_config=RunConfig(**run_options),
    )


@contextlib.contextmanager
def _ray_session(cores: int = 1) -> Iterator[Any]:
    """A Ray session, quiet; a cluster named by RAY_ADDRESS is joined, otherwise one is started.

    Args:
        cores: that Ray shall see on this machine at least, whether it has them or not.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    import ray

    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not address:
        cores = max(os.cpu_count() or 1, cores)
        options |= {"address": "local", "num_cpus": cores, "include_dashboard": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
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
