"""What the pipeline costs: images per second of an epoch under Ray and FFCV against a bare loop.

The bare loop is what one would write by hand: the same tensors in memory, the same network,
optimizer and number of processes, DDP over gloo, and nothing else. Both sides run in turn, so
that a noisy machine disturbs them alike; the first epoch of each turn is left out.

    python tests/benchmarks/pipeline_overhead.py
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from rich.console import Console
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import data_prep
import models
from pipeline.display import Display
from pipeline.experiments import load_experiment
from pipeline.loop import channels_last
from pipeline.stages import run

EXPERIMENT = "mnist_lenet5_ternary"
IMAGES = (12_800, 128)
BATCH = 128
EPOCHS = 3
TURNS = 3
WORKERS = 2


def bare_epochs(prepared: Path) -> list[float]:
    """Images per second of each epoch of the bare loop, over all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "rates.pt")
        processes.spawn(_bare_worker, (port, prepared, result), nprocs=WORKERS)
        return torch.load(result, weights_only=True)


def _bare_worker(rank: int, port: int, prepared: Path, result: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    images, labels = _tensors(prepared)
    model = models.create_model("lenet5", "ternary", num_classes=10, in_channels=1, image_size=28)
    model = channels_last(model)
    replica = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    rates = []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        dist.barrier()
        started = time.perf_counter()
        for batch in order.view(-1, WORKERS, BATCH // WORKERS)[:, rank]:
            loss = F.cross_entropy(replica(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dist.barrier()
        rates.append(len(images) / (time.perf_counter() - started))
    if rank == 0:
        torch.save(rates, result)
    dist.barrier()
    dist.destroy_process_group()


def _tensors(prepared: Path) -> tuple[torch.Tensor, torch.Tensor]:
    manifest = _prepare(prepared)
    loader = data_prep.make_loader(manifest, "train", batch_size=IMAGES[0], training=False)
    with loader.epoch(0) as batches:
        return next(batches)


def _prepare(prepared: Path) -> data_prep.Manifest:
    return data_prep.prepare("mnist", prepared=prepared, synthetic=IMAGES)


def pipeline_epochs(prepared: Path, folder: Path) -> list[float]:
    """Images per second of each epoch of the whole stack, as it reports them."""
    experiment = load_experiment(
        EXPERIMENT,
        [
            f"train.epochs={EPOCHS}",
            f"train.batch_size={BATCH}",
            "train.shift=0",
            f"data.synthetic=[{IMAGES[0]},{IMAGES[1]}]",
            f"data.prepared={prepared}",
            f"scaling.workers={WORKERS}",
            "tracking.enabled=false",
            f"tracking.runs={folder}",
        ],
    )
    result = run(experiment, display=Display(Console(quiet=True)))
    return [epoch["images_per_second"] for epoch in result.history]


def main() -> None:
    bare: list[float] = []
    pipeline: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch, "prepared")
        _prepare(prepared)
        for turn in range(TURNS):
            bare += bare_epochs(prepared)[1:]
            pipeline += pipeline_epochs(prepared, Path(scratch, str(turn)))[1:]
    console = Console()
    console.print(f"{EXPERIMENT}, {WORKERS} workers, batch {BATCH}, {len(bare)} epochs each")
    for name, rates in (("bare torch loop, tensors in memory", bare), ("Ray + FFCV", pipeline)):
        console.print(
            f"  {name:<36} median {statistics.median(rates):7,.0f} img/s, best {max(rates):7,.0f}"
        )
    console.print(
        f"  ratio of medians {statistics.median(pipeline) / statistics.median(bare):.3f}, "
        f"of the best {max(pipeline) / max(bare):.3f}"
    )


if __name__ == "__main__":
    main()
