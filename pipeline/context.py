"""What the training loop knows of where it runs: rank, world, device, and whom to tell.

The loop is the same in this process and under Ray; only the context differs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.workers.board import Worker
from pipeline.workers.watchdog import Watchdog, idleness

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from pipeline.stopping import StopRequest
    from pipeline.workers.board import Beat, Event

#: Seconds that the last event of a worker may take to the driver's board.
_FLUSH_SECONDS = 30


class Wish(IntEnum):
    """What the driver, or a machine that will be taken away, asks of a training that runs."""

    NOTHING = 0
    CHECKPOINT = 1
    STOP = 2  #: after a checkpoint


def hardware(gpus: Iterable[str | None], machines: int = 1) -> str:
    """What a group of workers computes on, in words.

    Args:
        gpus: name of each worker's GPU; None for a worker on the CPU.
        machines: that the workers are on.
    """
    counts = Counter(gpus)
    where = f" on {machines} machines" if machines > 1 else ""
    if None in counts:
        count = counts.total()
        return f"{count} CPU worker{'s' if count > 1 else ''}{where}, gloo"
    return " + ".join(f"{count} x {name}" for name, count in counts.items()) + f"{where}, nccl"


class TrainContext:
    """One process on one device: the local form, and the base of the others.

    Usable as a context manager, within which those that have a watchdog are watched.

    Args:
        tell: receives the events of the training, for the display and the tracker.
        device: to train on; by default the first GPU, or the CPU without one.
        asked: what the training is asked for meanwhile, see ``wish``.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        tell: Callable[[Event], None],
        device: torch.device | None = None,
        asked: Callable[[], Wish] = lambda: Wish.NOTHING,
    ) -> None:
        self._tell = tell
        self._asked = asked
        self._watchdog: Watchdog | None = None
        first = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.device = device or first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._watchdog is not None:
            self._watchdog.close()

    def event(self, kind: str, **content: Any) -> None:
        """Tell the driver something; only rank 0 speaks."""
        if self.rank == 0:
            self._tell({"kind": kind, "time": time.time(), **content})

    def describe_workers(self) -> dict[str, Any]:
        """How many workers train, on how many machines, and their hardware in words."""
        return _description([("", self._gpu_name())])

    def _gpu_name(self) -> str | None:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def wrap(self, model: nn.Module, *, sync_batchnorm: bool = False) -> nn.Module:
        """The model as it is called in training: with gradients averaged over the ranks.

        Args:
            sync_batchnorm: whether batch norm sees the batches of all ranks; needs GPUs.
        """
        return model

    def no_sync(self, replica: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within it, gradients of a wrapped model add up on this rank alone."""
        return contextlib.nullcontext()

    def sum_over_ranks(self, tensor: torch.Tensor) -> None:
        """Sum the tensor over all ranks, in place."""

    def minima_over_ranks(self, numbers: torch.Tensor) -> list[int]:
        """The smallest of the ranks' integers, place by place, of int64 (n,) each."""
        return numbers.tolist()

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """The ranks' rows, (n,) each, as (world size, n), on every rank."""
        return row[None]

    def wish(self) -> Wish:
        """What this rank has been asked for since the last time; it never waits."""
        return self._asked()

    def beat(
        self,
        doing: str,
        step: int | None = None,
        usual: float | None = None,
        stall: float = 0.0,
    ) -> None:
        """Say that this rank is alive, so that one that hangs is noticed.

        Args:
            doing: what comes next, in a word or two.
            step: optimizer step of the training, from 0; None: still the one before.
            usual: seconds that this takes, as far as it is known.
            stall: seconds more that it may now and then take by right.
        """
        if self._watchdog is not None:
            self._watchdog.begin(doing, step, usual, stall)

    def report(self, metrics: dict[str, float]) -> None:
        """Report the metrics of an epoch; every rank calls it."""

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        return number


class ProcessGroupContext(TrainContext):
    """One rank of the torch process group that this process has joined.

    Args:
        tell: receives the events of rank 0.
        device: of this rank.
        machine: any name that ranks on the same machine have in common.
    """

    def __init__(
        self, tell: Callable[[Event], None], device: torch.device, machine: str = ""
    ) -> None:
        super().__init__(tell, device)
        self._machine = machine
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def describe_workers(self) -> dict[str, Any]:
        places: list[Any] = [None] * self.world_size
        dist.all_gather_object(places, (self._machine, self._gpu_name()))
        return _description(places)

    def wrap(self, model: nn.Module, *, sync_batchnorm: bool = False) -> nn.Module:
        if sync_batchnorm and self.world_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Batch norm statistics are averaged once per epoch instead of broadcast in every step.
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def no_sync(self, replica: nn.Module) -> contextlib.AbstractContextManager[None]:
        assert isinstance(replica, DistributedDataParallel)
        return replica.no_sync()

    def sum_over_ranks(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    def minima_over_ranks(self, numbers: torch.Tensor) -> list[int]:
        smallest = numbers.clone()
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return smallest.tolist()

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        rows = row.new_empty(self.world_size * len(row))
        if len(row):
            dist.all_gather_into_tensor(rows, row)
        return rows.view(self.world_size, len(row))

    def agree(self, number: int) -> int:
        shared = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)


class WatchedContext(TrainContext):
    """The local form, for a user who sits before it: one note says so when the training hangs.

    Args:
        tell: receives the events of the training.
        stop: what the training is asked for meanwhile.
        longest: seconds until the training hangs, at most.
    """

    def __init__(self, tell: Callable[[Event], None], stop: StopRequest, longest: float) -> None:
        super().__init__(tell, asked=lambda: Wish.STOP if stop.requested else Wish.NOTHING)
        self._has_said_so = False
        self._watchdog = Watchdog(0, longest, self._note)

    def _note(self, beat: Beat) -> None:
        if beat.seconds > beat.limit and not self._has_said_so:
            self._has_said_so = True
            self.event("note", text=f"the training hangs: {idleness(beat)}")


class RayTrainContext(ProcessGroupContext):
    """A worker of a Ray Train group, which is a rank of its process group.

    Args:
        board: actor that carries events to the driver, and its wishes here.
        longest: seconds until a worker hangs, at most.
    """

    def __init__(self, board: ActorHandle, longest: float) -> None:
        import ray
        import ray.train
        import ray.train.torch

        machine = ray.get_runtime_context().get_node_id()
        super().__init__(self._post, ray.train.torch.get_device(), machine)
        self._board: Any = board
        self._last_post: ObjectRef | None = None
        self._ray_report = ray.train.report
        self._next_wish: ObjectRef | None = self._board.wished.remote(0) if self.rank == 0 else None
        self._watchdog = Watchdog(self.rank, longest, self._board.beat.remote)

    def _post(self, event: Event) -> None:
        self._last_post = self._board.post.remote(event)

    def fail(self, description: Event) -> None:
        """Tell the driver, from whichever rank, of an error that a restart would only repeat."""
        import ray

        if description["trace"] is not None:
            address = ray.util.get_node_ip_address()
            worker = Worker(self.rank, os.getpid(), self._machine, address)
            description = description | {"text": f"{worker}: {description['text']}"}
        self._post({"kind": "failed", **description})
        self.flush()

    def flush(self) -> None:
        """Wait until what was told has arrived; with the process it would be lost on its way."""
        import ray

        if self._last_post is not None:
            ray.get(self._last_post, timeout=_FLUSH_SECONDS)

    def wish(self) -> Wish:
        """What the driver asks for; it asks rank 0, by answering a call that waits for it."""
        import ray

        if self._next_wish is None or not ray.wait([self._next_wish], timeout=0)[0]:
            return Wish.NOTHING
        number, wish = ray.get(self._next_wish)
        self._next_wish = self._board.wished.remote(number)
        return Wish(wish)

    def report(self, metrics: dict[str, float]) -> None:
        self._ray_report(metrics)


def _description(places: list[tuple[str, str | None]]) -> dict[str, Any]:
    """Of workers that are each on a machine and a GPU, or None."""
    from pipeline.workers.placement import hardware

    machines = len({machine for machine, _ in places})
    words = hardware([gpu for _, gpu in places], machines)
    return {"workers": len(places), "machines": machines, "hardware": words}
