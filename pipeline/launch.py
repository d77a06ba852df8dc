"""Run the training loop: in this process, or as a Ray Train worker group with restarts."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import DataError
from pipeline import inputs
from pipeline.board import Event, EventBoard
from pipeline.checkpoint import CheckpointStore
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

if TYPE_CHECKING:
    from data_prep import Dataset, Manifest

#: Seconds between two looks at the workers. Ray's own default of 2 s is paid by every epoch,
#: because a report waits for the next look.
_POLL_INTERVAL = "0.2"

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
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def device_description(workers: int) -> str:
    """Where ``workers`` processes run, for a line of output."""
    import torch

    if torch.cuda.is_available():
        return f"{workers} x {torch.cuda.get_device_name()}, nccl"
    return f"{workers} CPU worker{'s' if workers > 1 else ''}, gloo"


def worker_count(experiment: Experiment) -> int:
    """Workers of the run: as set, or one per GPU of this machine, or two without a GPU."""
    import torch

    if experiment.scaling.launcher == "local":
        return 1
    return experiment.scaling.workers or torch.cuda.device_count() or 2


def check_scaling(experiment: Experiment) -> None:
    """Refuse workers that this machine does not have, or that cannot share the global batch."""
    import torch

    workers, batch = worker_count(experiment), experiment.train.batch_size
    gpus = torch.cuda.device_count()
    if experiment.scaling.launcher == "ray":
        _check_address()
    if gpus and workers > gpus and "RAY_ADDRESS" not in os.environ:
        raise PipelineError(
            f"scaling.workers={workers} is more than the {gpus} GPUs of this machine; "
            "set RAY_ADDRESS to train on a cluster"
        )
    if batch % workers:
        raise PipelineError(
            f"train.batch_size={batch} cannot be shared by {workers} workers; "
            f"take a multiple of {workers}"
        )
    if batch // workers < 2:
        raise PipelineError(
            f"train.batch_size={batch} leaves {workers} workers one image each, too few for "
            f"batch norm; take at least {2 * workers}"
        )


def _check_address() -> None:
    """Refuse a Ray address that does not answer; Ray itself would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); "
            "correct it, or unset it to start Ray on this machine"
        ) from None


def train_locally(
    experiment: Experiment, manifest: Manifest, folder: Path, tell: Callable[[Event], None]
) -> None:
    """Train in this process, on one device, without Ray.

    Raises:
        TrainingError: when training failed.
    """
    try:
        store = checkpoint_store(experiment, manifest, folder)
        train(experiment, manifest, store, TrainContext(tell))
    except Exception as error:
        raise training_error(as_event(error), folder) from None


def run_identity(experiment: Experiment, manifest: Manifest) -> str:
    """Hash of the experiment, the images and their normalization."""
    return experiment.identity(f"{manifest.fingerprint} {manifest.mean} {manifest.std}")


def on_cluster(experiment: Experiment) -> bool:
    """Whether the run joins a Ray cluster, which may have more machines than this one."""
    return experiment.scaling.launcher == "ray" and "RAY_ADDRESS" in os.environ


def prepare_on_nodes(
    experiment: Experiment, dataset: Dataset, progress: Callable[[str, int, int], None]
) -> Manifest:
    """Prepare the data once on each machine of the cluster, at the same path on all of them.

    Raises:
        DataError: when a machine cannot, or has other images than the others.
        TrainingError: when a machine is lost meanwhile.
    """
    experiment = inputs.with_absolute_folders(experiment)
    with _ray_session(1) as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        board = ray.remote(num_cpus=0)(EventBoard).remote()
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


def checkpoint_store(experiment: Experiment, manifest: Manifest, folder: Path) -> CheckpointStore:
    """The checkpoints of the run in this folder."""
    return CheckpointStore(
        folder / "checkpoints",
        run_identity(experiment, manifest),
        experiment.tracking.keep_checkpoints,
    )


def _train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    context = RayTrainContext(config["board"])
    experiment, manifest = config["experiment"], config["manifest"]
    try:
        store = checkpoint_store(experiment, manifest, config["folder"])
        train(experiment, manifest, store, context)
    except Exception as error:
        # A restart helps against a lost worker; an error of the program it would only repeat.
        if not is_lost_worker(error):
            context.fail(as_event(error))
        raise
    context.flush()


def train_on_ray(
    experiment: Experiment, manifest: Manifest, folder: Path, tell: Callable[[Event], None]
) -> None:
    """Train as a Ray Train worker group; a lost worker restarts it from the last checkpoint.

    The driver's main thread stays free for the display and for signals: ``fit`` runs in a
    thread beside it, because in the main thread Ray takes the interrupt signal for itself.

    Raises:
        TrainingError: when training failed for good; the full trace is in ``folder/error.txt``.
    """
    workers = worker_count(experiment)
    with _ray_session(workers) as ray:
        cores = ray.cluster_resources().get("CPU", 0)
        if cores < workers:
            text = (
                f"the cluster has {cores:g} CPUs for {workers} workers; waiting until it has more"
            )
            tell({"kind": "note", "text": text})
        board = ray.remote(num_cpus=0)(EventBoard).remote()
        trainer = _trainer(experiment, manifest, folder, board, workers)
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


def _trainer(
    experiment: Experiment, manifest: Manifest, folder: Path, board: Any, workers: int
) -> Any:
    import torch
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
            board.post.remote({"kind": "restart", "text": "; ".join(sorted(causes))})

    gpu = torch.cuda.is_available()
    # As a mapping, because the annotations are those of the RunConfig of Ray's first version.
    run_options: dict[str, Any] = {
        "name": "ray",
        "storage_path": str(folder),
        "failure_config": FailureConfig(max_failures=experiment.scaling.max_failures),
        "callbacks": [TellFailures(experiment.scaling.max_failures)],
        "worker_runtime_env": {"env_vars": _WORKER_ENVIRONMENT},
    }
    return TorchTrainer(
        _train_worker,
        train_loop_config={
            "experiment": experiment,
            "manifest": manifest,
            "folder": folder,
            "board": board,
        },
        torch_config=TorchConfig(
            backend="nccl" if gpu else "gloo", timeout_s=int(experiment.scaling.timeout)
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(**run_options),
    )


@contextlib.contextmanager
def _ray_session(workers: int) -> Iterator[Any]:
    """A Ray session, quiet; a cluster named by RAY_ADDRESS is joined, otherwise one is started."""
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    import ray

    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not address:
        cores = max(os.cpu_count() or 1, workers)
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
