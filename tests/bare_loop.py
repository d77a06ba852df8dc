"""The training loop that one would write by hand, and well, to compare the pipeline with.

It has the same network, optimizer, precision and batch; the images are normalized in the memory of
the device, channels last, the optimizer is fused, and nothing waits for the device within an epoch.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import models
from data_prep import Manifest
from pipeline import inputs
from pipeline.config import Experiment
from pipeline.loop import build_model, channels_last
from pipeline.settings import override


@dataclass(frozen=True)
class Task:
    """What is trained, on which prepared images."""

    experiment: Experiment
    manifest: Manifest

    @property
    def images(self) -> int:
        """Images of an epoch: those that fill its batches."""
        count, batch = self.manifest.counts["train"], self.experiment.train.batch_size
        return count - count % batch

    def with_settings(self, *settings: str) -> Task:
        return replace(self, experiment=override(self.experiment, settings))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images_in_memory(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """All training images as the network sees them, float32 (N, C, H, W), and labels, int64."""
    options: dict[str, Any] = {"training": False, "device": device()}
    loader = inputs.make_loader(task.experiment, task.manifest, "train", **options)
    count, channels = task.manifest.counts["train"], task.manifest.channels
    size = inputs.image_size(task.experiment.train, task.manifest)
    layout = torch.channels_last if channels > 1 else torch.contiguous_format
    images = torch.empty(count, channels, size, size, device=device(), memory_format=layout)
    labels = torch.empty(count, dtype=torch.int64, device=device())
    done = 0
    with loader.epoch(0) as batches:
        for batch, targets in batches:
            images[done : done + len(batch)] = batch
            labels[done : done + len(batch)] = targets
            done += len(batch)
    return images, labels


def bare_epochs(
    task: Task, images: torch.Tensor, labels: torch.Tensor, rank: int = 0, processes: int = 1
) -> Iterator[float]:
    """Train for ever; after each epoch, its images per second over all processes.

    Raises:
        FloatingPointError: at the end of an epoch whose last loss is not finite.
    """
    recipe = task.experiment.train
    model = channels_last(build_model(task.experiment, task.manifest).to(device()))
    finish = models.after_step(model)
    replica: nn.Module = model
    if processes > 1:
        replica = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    if recipe.compile == "model":
        replica.compile()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    half = recipe.precision == "bfloat16"
    while True:
        started = time.perf_counter()
        order = torch.randperm(len(images), device=images.device)[: task.images]
        for batch in order.view(-1, processes, recipe.batch_size // processes)[:, rank]:
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
                logits = replica(images[batch])  # as channels last as all of them
                loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            finish()
        if not torch.isfinite(loss):  # waits for the device
            raise FloatingPointError("the loss of the bare loop is not finite")
        if processes > 1:
            dist.barrier()
        yield task.images / (time.perf_counter() - started)


def distributed_bare_epochs(task: Task, processes: int, epochs: int) -> list[float]:
    """Images per second of each epoch of the bare loop in several processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    running = [
        context.Process(target=_process, args=(task, epochs, rank, processes, port, theirs))
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    theirs.close()  # so that nobody waits for processes that have failed
    with closing(ours):
        speeds = ours.recv()
    for process in running:
        process.join()
    return speeds


def _process(
    task: Task, epochs: int, rank: int, processes: int, port: int, connection: Connection
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=processes)
    images, labels = images_in_memory(task)
    training = bare_epochs(task, images, labels, rank, processes)
    speeds = [next(training) for _ in range(epochs)]
    if rank == 0:
        connection.send(speeds)
    dist.destroy_process_group()
