"""Which workers a run gets: how many, with what, on how many machines.

Plain data, so that a run is refused before Ray has started anything for it.
"""

from __future__ import annotations

import itertools
import os
import socket
from dataclasses import dataclass

import torch

from pipeline.config import PipelineError, Recipe, Scaling
from pipeline.context import hardware

#: Workers where neither the user nor a GPU says how many.
_CPU_WORKERS = 2


@dataclass(frozen=True)
class Machine:
    """What one machine can give.

    Attributes:
        cores: CPU cores.
        gpus: how many.
        gpu_types: names of their type that ``scaling.gpu`` may use.
        gpu_name: of their type, for a line of output.
    """

    cores: int
    gpus: int = 0
    gpu_types: frozenset[str] = frozenset()
    gpu_name: str = ""


@dataclass(frozen=True)
class Cluster:
    """The machines that a run may use.

    Attributes:
        name: for a line of output.
        is_local: whether it is this machine alone, on which a core may serve several workers.
        grows: whether an autoscaler adds machines that are asked for.
    """

    machines: tuple[Machine, ...]
    name: str = "this machine"
    is_local: bool = True
    grows: bool = False


def this_machine() -> Cluster:
    """What torch sees here."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return Cluster((Machine(os.cpu_count() or 1),))
    name = torch.cuda.get_device_name()
    # Ray's type of an NVIDIA A100-SXM4-80GB is A100: some of its words.
    words = name.replace(" ", "-").split("-")
    ends = itertools.combinations(range(len(words) + 1), 2)
    types = frozenset("-".join(words[first:last]) for first, last in ends)
    return Cluster((Machine(os.cpu_count() or 1, gpus, types, name),))


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of a run, as Ray is asked for them.

    Attributes:
        least: fewest workers to train with.
        most: most of them; above ``least`` where Ray chooses.
        gpu_name: type of the GPU that each one has; None without GPUs.
        threads: of each worker, for computation on the CPU.
        reserved_cores: that nothing else in the cluster may use, for each worker.
        strategy: how Ray places them on machines.
        room: workers that the cluster can hold now.
    """

    least: int
    most: int
    gpu_name: str | None
    threads: int
    reserved_cores: int = 1
    strategy: str = "PACK"
    room: int = 1

    @property
    def description(self) -> str:
        """For a line of output."""
        if self.least == self.most:
            return hardware([self.gpu_name] * self.most)
        return f"{self.least} to {hardware([self.gpu_name] * self.most)}"


def plan(scaling: Scaling, cluster: Cluster) -> WorkerGroup:
    """The workers that the settings mean on this cluster.

    Raises:
        PipelineError: when the cluster cannot give them.
    """
    machines = _wanted(scaling, cluster)
    on_gpus = scaling.gpu is not None or any(machine.gpus for machine in machines)
    rooms = sorted((_room(scaling, machine, on_gpus) for machine in machines), reverse=True)
    workers = scaling.workers or _default_workers(scaling, cluster, rooms if on_gpus else None)
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    _check_nodes(scaling, cluster, len(machines), most)
    _check_room(scaling, cluster, rooms, least, on_gpus)
    names = dict.fromkeys(machine.gpu_name for machine in machines)
    return WorkerGroup(
        least=least,
        most=most,
        gpu_name=(scaling.gpu or "/".join(names)) if on_gpus else None,
        threads=_threads(scaling, machines, on_gpus),
        reserved_cores=scaling.cores or 1,
        strategy=_strategy(scaling.nodes, most),
        room=sum(rooms),
    )


def check_address(address: str) -> None:
    """Refuse a Ray address that does not answer; Ray itself would try for minutes.

    Args:
        address: host and port; a word of Ray's, as ``auto``, is left to Ray.
    """
    if address.startswith("ray://"):
        raise PipelineError(
            f"RAY_ADDRESS={address} is for Ray clients, which cannot train; give the address of "
            "the cluster itself, as head:6379, from one of its machines"
        )
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); "
            "correct it, or unset it to start Ray on this machine"
        ) from None


def check_shares(recipe: Recipe, group: WorkerGroup) -> None:
    """Refuse a recipe that the workers cannot compute, or could only compute wrongly.

    Raises:
        PipelineError: when a worker would have a single image for batch norm at a time, or
            ``sync_batchnorm`` has no GPUs.
    """
    batch, parts = recipe.batch_size, recipe.accumulation
    if batch // group.most // parts < 2:
        of_parts = f" in train.accumulation={parts} parts" if parts > 1 else ""
        raise PipelineError(
            f"train.batch_size={batch} for {group.most} workers{of_parts} leaves fewer than two "
            f"images at a time, too few for batch norm; take at least {2 * group.most * parts}"
        )
    if recipe.sync_batchnorm and group.most > 1 and group.gpu_name is None:
        raise PipelineError(
            f"train.sync_batchnorm=true needs GPUs for {group.most} workers; leave it at false to "
            "train on the CPU"
        )


def _wanted(scaling: Scaling, cluster: Cluster) -> list[Machine]:
    """The machines that workers may be on: with GPUs of the type, with GPUs, or any."""
    with_gpus = [machine for machine in cluster.machines if machine.gpus]
    if scaling.gpu is None:
        return with_gpus or list(cluster.machines)
    of_type = [machine for machine in with_gpus if scaling.gpu in machine.gpu_types]
    if not of_type and not cluster.grows:
        names = ", ".join(dict.fromkeys(machine.gpu_name for machine in with_gpus))
        raise PipelineError(f"scaling.gpu={scaling.gpu}: {cluster.name} has {names or 'no GPUs'}")
    return of_type


def _room(scaling: Scaling, machine: Machine, on_gpus: bool) -> int:
    """Workers that the machine can hold."""
    by_cores = machine.cores // (scaling.cores or 1)
    if not on_gpus:
        return by_cores
    return min(machine.gpus, by_cores) if scaling.cores else machine.gpus


def _default_workers(scaling: Scaling, cluster: Cluster, gpu_rooms: list[int] | None) -> int:
    """One for each GPU of the machines that take part, or two without a GPU."""
    if gpu_rooms is None:
        return max(_CPU_WORKERS, scaling.nodes or 1)
    if not gpu_rooms:
        raise PipelineError(
            f"{cluster.name} has no {scaling.gpu} yet to count; set scaling.workers to a number"
        )
    if scaling.nodes is None:
        return max(1, sum(gpu_rooms))
    taken = gpu_rooms[: scaling.nodes]
    return max(1, scaling.nodes * taken[-1])


def _check_nodes(scaling: Scaling, cluster: Cluster, machines: int, workers: int) -> None:
    nodes = scaling.nodes
    if nodes is None:
        return
    if isinstance(scaling.workers, tuple):
        raise PipelineError(
            f"scaling.nodes={nodes} needs a fixed number of workers; with "
            f"scaling.workers={scaling.workers[0]}..{scaling.workers[1]} Ray chooses the machines"
        )
    if cluster.is_local and nodes > 1:
        raise PipelineError(
            f"scaling.nodes={nodes}: there is this machine alone; set RAY_ADDRESS to train on a "
            "cluster"
        )
    if nodes > workers:
        raise PipelineError(
            f"scaling.nodes={nodes} is more than the {workers} workers; "
            f"take scaling.workers={nodes} or more"
        )
    if nodes > machines and not cluster.grows:
        raise PipelineError(
            f"scaling.nodes={nodes} machines are more than the {machines} of {cluster.name} that "
            "workers can be on"
        )


def _check_room(
    scaling: Scaling, cluster: Cluster, rooms: list[int], workers: int, on_gpus: bool
) -> None:
    """Refuse workers for which there is no room, where none can be expected to come."""
    if cluster.grows or (cluster.is_local and not on_gpus and scaling.cores is None):
        return
    if not any(rooms) and scaling.cores is not None:
        cores = max((machine.cores for machine in cluster.machines), default=0)
        raise PipelineError(
            f"scaling.cores={scaling.cores} is more than the {cores} CPU cores of "
            f"{'this machine' if cluster.is_local else f'any machine of {cluster.name}'}"
        )
    of_each = f", with scaling.cores={scaling.cores} each" if scaling.cores else ""
    if cluster.is_local and workers > rooms[0]:
        what = "GPUs" if on_gpus and not scaling.cores else "that fit on this machine"
        of_machine = " of this machine" if what == "GPUs" else ""
        raise PipelineError(
            f"scaling.workers={workers} is more than the {rooms[0]} {what}{of_machine}{of_each}; "
            "set RAY_ADDRESS to train on a cluster"
        )
    if scaling.nodes is not None and workers > sum(rooms[: scaling.nodes]):
        raise PipelineError(
            f"scaling.workers={workers} do not fit on scaling.nodes={scaling.nodes} of "
            f"{cluster.name}, which can hold {sum(rooms[: scaling.nodes])}{of_each}"
        )


def _threads(scaling: Scaling, machines: list[Machine], on_gpus: bool) -> int:
    """As set, or one, or with GPUs the cores of the machine over its GPUs."""
    if scaling.cores is not None:
        return scaling.cores
    if not on_gpus:
        return 1
    return max(1, min((machine.cores // machine.gpus for machine in machines), default=1))


def _strategy(nodes: int | None, workers: int) -> str:
    """Ray's name for how workers lie on machines."""
    if nodes is None:
        return "PACK"
    if nodes == 1:
        return "STRICT_PACK"
    return "STRICT_SPREAD" if nodes == workers else "SPREAD"
