"""What the training loop knows of where it runs: rank, world, device, and whom to tell.

The loop is the same in this process and under Ray; only the context differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from pipeline.board import Event

#: Seconds that the last event of a worker may take to the driver's board.
_FLUSH_SECONDS = 30


class TrainContext:
    """One process on one device: the local form, and the base of the others.

    Args:
        tell: receives the events of the training, for the display and the tracker.
    """

    rank = 0
    world_size = 1

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def event(self, kind: str, **content: Any) -> None:
        """Tell the driver something; only rank 0 speaks."""
        if self.rank == 0:
            self._tell({"kind": kind, "time": time.time(), **content})

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: with gradients averaged over the ranks."""
        return model

    def sum_over_ranks(self, tensor: torch.Tensor) -> None:
        """Sum the tensor over all ranks, in place."""

    def minimum_over_ranks(self, tensor: torch.Tensor) -> int:
        """The smallest of the ranks' integers (a scalar tensor each)."""
        return int(tensor)

    def report(self, metrics: dict[str, float]) -> None:
        """Report the metrics of an epoch; every rank calls it."""

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        return number


class RayTrainContext(TrainContext):
    """A worker of a Ray Train group: one rank of a torch process group.

    Args:
        board: actor that carries events to the driver.
    """

    def __init__(self, board: ActorHandle) -> None:
        import ray.train
        import ray.train.torch

        super().__init__(tell=self._post)
        self._board = board
        self._last_post: ObjectRef | None = None
        worker = ray.train.get_context()
        self.rank = worker.get_world_rank()
        self.world_size = worker.get_world_size()
        self.device = ray.train.torch.get_device()
        self._ray_report = ray.train.report

    def _post(self, event: Event) -> None:
        self._last_post = self._board.post.remote(event)

    def fail(self, description: Event) -> None:
        """Tell the driver, from whichever rank, of an error that a restart would only repeat."""
        self._post({"kind": "failed", **description})
        self.flush()

    def flush(self) -> None:
        """Wait until what was told has arrived; with the process it would be lost on its way."""
        import ray

        if self._last_post is not None:
            ray.get(self._last_post, timeout=_FLUSH_SECONDS)

    def wrap(self, model: nn.Module) -> nn.Module:
        # Batch norm statistics are averaged once per epoch instead of broadcast in every step.
        return DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def sum_over_ranks(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    def minimum_over_ranks(self, tensor: torch.Tensor) -> int:
        smallest = tensor.clone()
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    def report(self, metrics: dict[str, float]) -> None:
        self._ray_report(metrics)

    def agree(self, number: int) -> int:
        shared = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)
