"""How fast images are read: this project's loader, FFCV's own, and torch's DataLoader.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/data_loading.py [FOLDER]

FOLDER holds photographs as ``train/<class>/`` and ``val/<class>/``; without it some are made up.
Each contestant lives in a process of its own, reads the same file and does the same work (random
window, mirror, or shift and mirror; normalized float32 batches in memory). They take turns, so
that a noisy machine is unfair to all alike; ratios are of medians over the turns. Cold starts run
from the start of the process to the first batch.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_prep
from data_prep import Manifest, augment
from data_prep.beton import read_index
from data_prep.datasets import Storage
from tests.pictures import write_class_folders

BATCH, ROUNDS = 64, 6
SMALL_BATCH, SMALL_IMAGES = 512, (10_240, 1_000)
CORES = os.cpu_count() or 1

Epoch = Callable[[int], Iterator[Any]]


@dataclass(frozen=True)
class Task:
    """What to read, and how: photographs are cut by random windows, small images are shifted."""

    folder: Path
    threads: int
    photographs: bool

    @property
    def batch(self) -> int:
        return BATCH if self.photographs else SMALL_BATCH

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.folder)

    @property
    def file(self) -> Path:
        return self.folder / self.manifest.files["train"].name


def our_loader(task: Task, backend: str = "ffcv") -> Epoch:
    view = data_prep.Augmentation(shift=4, flip=True)
    if task.photographs:
        view = data_prep.Augmentation(flip=True, crop_area=(0.08, 1.0))
    loader = data_prep.make_loader(
        task.manifest,
        "train",
        batch_size=task.batch,
        training=True,
        view=view,
        reading=data_prep.Reading(backend, task.threads),
    )

    def epoch(number: int) -> Iterator[Any]:
        with loader.epoch(number) as batches:
            yield from batches

    return epoch


def our_undetermined_loader(task: Task) -> Epoch:
    """Randomness of NumPy's generator instead of counting: what determinism costs."""
    generator = np.random.default_rng()

    def random_bits(draw: int, seed: int, epoch: int, indices: augment.Indices) -> augment.Bits:
        return generator.integers(0, 2**64, len(indices), dtype=np.uint64)

    augment.random_bits = random_bits
    return our_loader(task)


def our_pillow_loader(task: Task) -> Epoch:
    return our_loader(task, "torch")


def stock_ffcv(task: Task) -> Epoch:
    from ffcv.fields.ndarray import NDArrayDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        NormalizeImage,
        RandomHorizontalFlip,
        RandomTranslate,
        ToTensor,
        ToTorchImage,
    )

    manifest = task.manifest
    levels = [255 * np.array(values) for values in manifest.normalization]
    decoder: list[Any] = [NDArrayDecoder(), RandomHorizontalFlip(), RandomTranslate(4)]
    if task.photographs:
        size = (manifest.image_size, manifest.image_size)
        decoder = [RandomResizedCropRGBImageDecoder(size), RandomHorizontalFlip()]
    loader = Loader(
        str(task.file),
        task.batch,
        num_workers=task.threads,
        order=OrderOption.RANDOM,
        pipelines={
            "image": [*decoder, NormalizeImage(*levels, np.float32), ToTensor(), ToTorchImage()],
            "checksum": None,
        },
    )
    return lambda number: iter(loader)


class StoredImages(torch.utils.data.Dataset):
    """The same stored bytes for torch's DataLoader and torchvision's transforms."""

    def __init__(self, task: Task) -> None:
        from torchvision.transforms import v2

        self._path, self._index = task.file, read_index(task.file)
        self._file: BufferedReader | None = None  # each worker opens its own
        size = task.manifest.image_size
        cut: list[Any] = [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()]
        if task.photographs:
            cut = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        mean, std = task.manifest.normalization
        self._transform = v2.Compose([*cut, *to_float, v2.Normalize(list(mean), list(std))])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        index = self._index
        self._file = self._file or self._path.open("rb")
        self._file.seek(int(index.pointers[sample]))
        stored = self._file.read(int(index.sizes[sample]))
        if index.shape is None:
            image = Image.open(io.BytesIO(stored)).convert("RGB")
        else:
            image = Image.fromarray(np.frombuffer(stored, dtype=np.uint8).reshape(index.shape))
        return self._transform(image), int(index.labels[sample])


def torch_dataloader(task: Task) -> Epoch:
    loader = torch.utils.data.DataLoader(
        StoredImages(task),
        task.batch,
        shuffle=True,
        drop_last=True,
        num_workers=task.threads,
        persistent_workers=True,
    )
    return lambda number: iter(loader)


CONTESTANTS: dict[str, Callable[[Task], Epoch]] = {
    "this loader": our_loader,
    "stock FFCV": stock_ffcv,
    "this loader, not determined": our_undetermined_loader,
    "torch DataLoader": torch_dataloader,
    "this loader, backend=torch": our_pillow_loader,
}


def serve(name: str, task: Task, connection: Connection) -> None:
    """Read an epoch whenever asked; answer with images per second."""
    torch.set_num_threads(1)
    epoch = CONTESTANTS[name](task)
    while (number := connection.recv()) is not None:
        images, started = 0, time.perf_counter()
        for batch in epoch(number):
            images += len(batch[0])
        connection.send(images / (time.perf_counter() - started))


def race(task: Task, names: list[str], rounds: int) -> dict[str, float]:
    """Median images per second of each contestant; the first epoch of each is not counted."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name in names:
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, task, theirs)).start()
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        # Nobody always comes after the same one: some leave a machine slower than others.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            connection = connections[name]
            connection.send(number)
            speed = connection.recv()
            if number:
                speeds[name].append(speed)
    for connection in connections.values():
        connection.send(None)
    return {name: statistics.median(values) for name, values in speeds.items()}


def cold_start(name: str, task: Task, cache: Path) -> float:
    """Seconds from the start of a process to its first batch."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.');"
        "from tests.benchmarks.data_loading import CONTESTANTS, Task;"
        f"task = Task(Path({str(task.folder)!r}), {task.threads}, {task.photographs});"
        f"next(iter(CONTESTANTS[{name!r}](task)(0)))"
    )
    started = time.perf_counter()
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    return time.perf_counter() - started


def counted(count: int, what: str) -> str:
    """``1 thread`` or ``2 threads``."""
    return f"{count} {what}{'s' if count > 1 else ''}"


def report(title: str, speeds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Print the speeds with the ratio of the first one to each; return them under the title."""
    print(f"\n{title}")
    first = next(iter(speeds.values()))
    for name, speed in speeds.items():
        print(f"  {name:<30}{speed:>9,.0f} img/s   the first is {first / speed:5.2f}x", flush=True)
    return {title: speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--record", type=Path, help="JSON file to add to, docs/loading.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        raw = arguments.folder or write_class_folders(folder / "raw", train=400, scale=8)
        kept = {}
        for kind in ("jpg", "raw"):
            storage = Storage(side=400, format=kind)
            kept[kind] = data_prep.prepare("folder", raw=raw, prepared=folder, storage=storage)
        small = data_prep.prepare("cifar10", prepared=folder, synthetic=SMALL_IMAGES)
        names = list(CONTESTANTS)
        record: dict[str, dict[str, float]] = {}
        for threads in sorted({1, CORES}):
            task = Task(kept["jpg"].folder, threads, True)
            images = f"reading {kept['jpg'].counts['train']:,} JPEGs of at most 400 px"
            record |= report(
                f"{images}, {counted(threads, 'thread')}", race(task, names, arguments.rounds)
            )
            task = Task(small.folder, threads, False)
            images = f"reading {SMALL_IMAGES[0]:,} images of 32 px"
            speeds = race(task, names[:4], arguments.rounds)
            record |= report(f"{images}, {counted(threads, 'thread')}", speeds)
        speeds = {
            f"stored as {kind}": race(
                Task(manifest.folder, CORES, True), names[:1], arguments.rounds
            )["this loader"]
            for kind, manifest in kept.items()
        }
        record |= report(f"the same photographs by this loader, {counted(CORES, 'thread')}", speeds)
        for kind, manifest in kept.items():
            print(f"  {kind}: {manifest.bytes / sum(manifest.counts.values()):,.0f} bytes an image")
        print("\nfrom the start of a process to its first batch")
        task = Task(kept["jpg"].folder, 1, True)
        for name in ("this loader", "stock FFCV", "torch DataLoader"):
            first, second = (cold_start(name, task, folder / "cache") for _ in range(2))
            print(f"  {name:<30}{first:5.1f} s, the second time {second:.1f} s")
            record[f"cold start of {name}"] = {"first": first, "second": second}
    if arguments.record:
        known = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
        known = {title: speeds for title, speeds in known.items() if "writing" in title}
        arguments.record.write_text(json.dumps(record | known, indent=1) + "\n")


if __name__ == "__main__":
    main()
