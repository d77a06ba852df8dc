"""From prepared files to batches on a device: the same batches whatever reads them, and where."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from data_prep.augment import CentralCrop, Geometry, Indices, Resolution, View, epoch_order
from data_prep.datasets import DataError, Normalization, named_normalization, one_line_for_os_errors
from data_prep.manifest import Manifest
from data_prep.reading.readers import Cache, Images, Look, PillowReader, SplitReader, choose_cache

Batch = tuple[torch.Tensor, torch.Tensor]

BACKENDS = ("ffcv", "torch")


@dataclass(frozen=True)
class Reading:
    """What reads the images, and how; the batches are the same.

    Attributes:
        backend: ``ffcv``, or ``torch`` for machines without FFCV. The images are the same to the
            bit where nothing is resized; resized ones may differ by one level.
        threads: that decode; None: all cores of the machine but one, shared by its GPUs, for a
            GPU, and 1 where the same cores train.
        cache: ``page`` or ``process``, see ``readers.open_file``; ``auto`` decides by the sizes of
            file and memory.
    """

    backend: str = "ffcv"
    threads: int | None = None
    cache: Literal["auto", "page", "process"] = "auto"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            valid = ", ".join(BACKENDS)
            raise DataError(f"unknown data backend {self.backend!r}: valid are {valid}")


def open_split(
    manifest: Manifest, split: str, batch_size: int, reading: Reading, device: torch.device
) -> SplitReader:
    """Open the file of a split.

    Raises:
        DataError: for an unknown split, and when the file is missing, is not as it was written,
            or cannot be read.
    """
    if split not in manifest.files:
        raise DataError(f"unknown split {split!r}: valid are {', '.join(manifest.files)}")
    threads = reading.threads
    if threads is None:
        threads = 1 if device.type == "cpu" else _threads_beside_gpus()
    with one_line_for_os_errors(f"cannot read the {split} split", manifest.folder):
        file = manifest.files[split]
        index = file.open_index(manifest.folder)
        cache: Cache = choose_cache(file.bytes) if reading.cache == "auto" else reading.cache
        if reading.backend == "torch":
            return PillowReader(index, batch_size, threads, cache)
        from data_prep.reading.ffcv_reader import FFCVReader

        return FFCVReader(index, batch_size, threads, cache)


def _threads_beside_gpus() -> int:
    """Cores of this machine for each of its GPUs, but one for the training itself."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(1, torch.cuda.device_count()) - 1)


class Loader:
    """One rank's share of a split; ``make_loader`` makes it.

    In training, step ``s`` of an epoch has the samples ``p[s*B:(s+1)*B]`` of that epoch's
    permutation ``p``, of which each rank takes its contiguous share; a last batch that is not
    full is left out. In evaluation each image comes exactly once over all ranks, in order; ranks
    may then have different numbers of images and steps.

    Attributes:
        steps_per_epoch: batches of this rank in an epoch.
    """

    def __init__(
        self,
        reader: SplitReader,
        *,
        batch_size: int,
        training: bool,
        view: View,
        resolution: Resolution,
        normalization: Normalization,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._reader = reader
        self._share = batch_size // world_size
        self._training = training
        self._view, self._resolution = view, resolution
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mean, self._std = (torch.tensor(values, device=device) for values in normalization)
        self.steps_per_epoch = -(-len(self._order(0)) // self._share)

    def _order(self, epoch: int) -> Indices:
        """Sample indices of this rank in the order of its batches."""
        count = len(self._reader.index)
        if not self._training:
            first, last = (
                count * rank // self._world_size for rank in (self._rank, self._rank + 1)
            )
            return np.arange(first, last)
        shape = (-1, self._world_size, self._share)
        whole = count - count % (self._world_size * self._share)
        return epoch_order(count, self._seed, epoch)[:whole].reshape(shape)[:, self._rank].ravel()

    @contextmanager
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Iterator[Batch]]:
        """Iterate the batches of an epoch from ``start_step`` on; leaving early is allowed.

        A batch is images, (N, C, H, W) in torch's default type, normalized (one channel:
        contiguous; more: channels_last), and labels, int64 (N,), both on the loader's device.

        Args:
            epoch: counts from 0; so does ``start_step``.
            start_step: of the epoch, up to ``steps_per_epoch``.

        Raises:
            DataError: in the iteration, when reading fails or hangs, naming the step.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise DataError(
                f"start_step={start_step}: an epoch has {self.steps_per_epoch} steps from 0 on"
            )
        batches = self._batches(epoch, start_step)
        with closing(batches):
            yield batches

    def _batches(self, epoch: int, start_step: int) -> Generator[Batch]:
        order = self._order(epoch)[start_step * self._share :]

        def geometry(indices: Indices, shapes: npt.NDArray[np.int32]) -> Geometry:
            return self._view.geometry(indices, shapes, self._seed, epoch)

        on_cpu = self._device.type == "cpu"
        look = Look(
            geometry,
            edge=self._view.padding == "edge",
            size=self._resolution.at(epoch),
            mean=self._mean.numpy() if on_cpu else None,
            std=self._std.numpy() if on_cpu else None,
        )
        step = start_step
        try:
            with closing(self._reader.read(order, look)) as batches:
                for images in batches:
                    first = (step - start_step) * self._share
                    yield self._to_device(images, order[first : first + len(images)])
                    step += 1
        except DataError as error:
            raise DataError(f"epoch {epoch + 1}, step {step}: {error}") from error.__cause__
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"epoch {epoch + 1}, step {step}: {what}") from error

    def _to_device(self, images: Images, indices: Indices) -> Batch:
        count, height, width, channels = images.shape
        pixels, labels = torch.from_numpy(images), torch.from_numpy(self._reader.index.labels)
        targets = labels[torch.from_numpy(indices)]
        if self._copy_stream is not None:
            # Wait for this copy alone, not for the computation that is queued on the device: the
            # reader may reuse its buffer as soon as this returns.
            with torch.cuda.stream(self._copy_stream):
                pixels = pixels.to(self._device, non_blocking=True)
                targets = targets.to(self._device, non_blocking=True)
            self._copy_stream.synchronize()
            for tensor in (pixels, targets):
                tensor.record_stream(torch.cuda.current_stream(self._device))
        if channels == 1:
            pixels = pixels.view(count, 1, height, width)
        else:
            pixels = pixels.permute(0, 3, 1, 2)
        if self._copy_stream is None:
            return pixels, targets  # the reader has normalized them
        mean, std = self._mean.view(-1, 1, 1), self._std.view(-1, 1, 1)
        return (pixels / 255).sub_(mean).div_(std), targets


def make_loader(
    manifest: Manifest,
    split: str,
    *,
    batch_size: int,
    training: bool,
    view: View | None = None,
    resolution: Resolution | None = None,
    normalize: str = "dataset",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    reading: Reading | None = None,
) -> Loader:
    """A loader whose batches depend on ``seed``, epoch and step alone.

    See ``Loader`` for which samples are in which batch.

    Args:
        manifest: of the prepared data set.
        split: ``train`` or ``test``.
        batch_size: images per step over all ranks.
        training: shuffled and in full batches, or each image once.
        view: how images are cut and changed; by default the whole image, unchanged.
        resolution: height and width by epoch; by default the data set's image size.
        normalize: name of the normalization, see ``named_normalization``.
        seed: of order and augmentation, any whole number (only its last 64 bits count).
        rank: of this process, from 0.
        world_size: number of processes.
        device: where batches are needed.
        reading: what reads the files, and how.

    Raises:
        DataError: when the rank is none of ``world_size``, the batch cannot be shared evenly or is
            larger than the split, or when the files are not as they were written.
    """
    _check_shares(batch_size, rank, world_size)
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"no batches for a device of type {device.type!r}: take cpu or cuda")
    reader = open_split(manifest, split, batch_size // world_size, reading or Reading(), device)
    if training and batch_size > len(reader.index):
        raise DataError(
            f"a batch of {batch_size} images is more than the {len(reader.index)} of the "
            f"{split} split of {manifest.dataset}"
        )
    size = manifest.image_size
    return Loader(
        reader,
        batch_size=batch_size,
        training=training,
        view=view or CentralCrop(),
        resolution=resolution or Resolution(size, size, (0, 0)),
        normalization=named_normalization(normalize, manifest.normalization),
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def _check_shares(batch_size: int, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}: ranks go from 0 to {world_size} - 1")
    if batch_size < 1 or batch_size % world_size:
        raise DataError(
            f"a batch of {batch_size} images cannot be shared by {world_size} ranks: "
            f"take a multiple of {world_size}"
        )
