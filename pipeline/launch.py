"""Run the training loop: in this process, or as a Ray Train worker group with restarts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep import DataError
from pipeline import inputs
from pipeline.checkpoints.store import run_checkpoints
from pipeline.config import Experiment, PipelineError, Tracking
from pipeline.context import RayTrainContext, WatchedContext, Wish
from pipeline.failures import (
    TrainingError,
    as_event,
    first_line,
    is_lost_worker,
    ray_failure,
    training_error,
)
from pipeline.loop import train
from pipeline.stopping import STOPPING, StopRequest
from pipeline.weights import NO_SOURCES, Sources
from pipeline.workers.board import Event, News
from pipeline.workers.group_observer import group_observer
from pipeline.workers.placement import WorkerGroup, check_address, check_shares, plan, this_machine
from pipeline.workers.session import cluster, event_board, kill, ray_session
from pipeline.workers.supervisor import Supervisor

if TYPE_CHECKING:
    from data_prep import Dataset, Manifest

#: Seconds between two thoughts of adding or giving back workers, where their number may change.
_RESIZE_INTERVAL = 60.0

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
    with ray_session() as ray:
        return plan(scaling, cluster(ray))


def check_scaling(experiment: Experiment) -> None:
    """Refuse workers that are not to be had, or that cannot share the global batch."""
    check_shares(experiment.train, planned_workers(experiment))


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
        KeyboardInterrupt: when it was stopped; its state is saved.
    """
    try:
        with StopRequest(lambda: tell({"kind": "note", "text": STOPPING})) as stop:
            with WatchedContext(tell, stop, experiment.scaling.timeout) as context:
                context.event("workers", **context.describe_workers())
                store = run_checkpoints(experiment, manifest, sources, folder)
                train(experiment, manifest, store, context, sources)
            stop.finish()
    except Exception as error:
        raise training_error(as_event(error), folder) from None


def on_cluster(experiment: Experiment) -> bool:
    """Whether the run joins a Ray cluster, which may have more machines than this one."""
    return experiment.scaling.launcher == "ray" and bool(os.environ.get("RAY_ADDRESS"))


def for_workers(experiment: Experiment) -> Experiment:
    """The experiment as other processes get it: with absolute folders, without tracking.

    Only the driver tracks, and its address may hold a password, which Ray may spill to a disk.
    """
    experiment = inputs.with_absolute_folders(experiment)
    return experiment.model_copy(update={"tracking": Tracking()})


def prepare_on_nodes(
    experiment: Experiment, dataset: Dataset, progress: Callable[[str, int, int], None]
) -> Manifest:
    """Prepare the data once on each machine of the cluster, at the same path on all of them.

    Raises:
        DataError: when a machine cannot, or has other images than the others.
        TrainingError: when a machine is lost meanwhile.
    """
    experiment = for_workers(experiment)
    with ray_session() as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        board = event_board(ray)
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
            for event in ray.get(board.take.remote(0.0)).events:
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
    experiment, manifest, sources = (config[key] for key in ("experiment", "manifest", "sources"))
    with RayTrainContext(config["board"], experiment.scaling.timeout) as context:
        try:
            workers = context.describe_workers()
            context.event("workers", **workers)
            if experiment.scaling.nodes not in (None, workers["machines"]):
                asked = f"not {experiment.scaling.nodes} as asked"
                text = f"Ray put the workers on {workers['machines']} machines, {asked}"
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
        TrainingError: when training failed for good; the full trace is in a file in ``folder``.
        KeyboardInterrupt: when it was stopped; its state is saved.
    """
    planned = planned_workers(experiment)
    experiment = for_workers(experiment)
    with ray_session(planned.least * planned.reserved_cores) as ray:
        group = plan(experiment.scaling, cluster(ray))
        board = event_board(ray)
        config = {
            "experiment": experiment,
            "manifest": manifest,
            "sources": sources,
            "folder": folder,
            "board": board,
            "threads": group.threads,
        }
        supervisor = Supervisor(
            experiment.scaling.max_failures,
            group.least,
            folder,
            tell,
            kill=lambda worker: kill(ray, worker),
            room=lambda: _room(ray, experiment),
        )
        fit = _Fit(_trainer(config, group))
        fit.start()
        with StopRequest(lambda: tell({"kind": "note", "text": STOPPING})) as stop:
            asked, running = False, True
            while running:
                running = fit.is_alive()
                supervisor.take(_news(ray, board, _PATIENCE if running else 0.0))
                if stop.requested and not supervisor.is_training:
                    break  # all that can be saved is safe, and Ray may take its time
                if stop.requested and not asked:
                    asked = True
                    board.wish.remote(int(Wish.STOP), ("stopped",))
            stop.finish()
    if fit.error is not None:
        raise ray_failure(fit.error, folder)


def _news(ray: Any, board: Any, patience: float) -> News:
    try:
        return ray.get(board.take.remote(patience))
    except ray.exceptions.RayError as error:
        raise TrainingError(f"the Ray cluster is lost: {first_line(error)}", True) from None


def _room(ray: Any, experiment: Experiment) -> int:
    """Workers that the cluster can hold now."""
    try:
        return plan(experiment.scaling, cluster(ray)).room
    except PipelineError:  # it cannot hold any of them as they are wanted
        return 0


class _Fit(threading.Thread):
    """Ray's ``fit`` beside the driver's main thread; its error stays in ``error``."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # for the main thread to raise
            self.error = error


def _trainer(config: dict[str, Any], group: WorkerGroup) -> Any:
    """Ray's trainer of this group; ``config`` is what each worker gets."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

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
        # The driver counts: failures that a new checkpoint lies between do not add up.
        "failure_config": FailureConfig(max_failures=-1),
        "callbacks": [group_observer(config["board"])],
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
