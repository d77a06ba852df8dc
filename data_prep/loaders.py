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
from data_prep.datasets import (
    VALIDATION,
    DataError,
    Normalization,
    named_normalization,
    one_line_for_os_errors,
)
from data_prep.manifest import Manifest
from data_prep.reading.readers import Cache, Images, Look, PillowReader, SplitReader, choose_cache
from data_prep.reading.samples import rank_share, samples_of

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
    known = (*manifest.files, VALIDATION)
    if split not in known:
        raise DataError(f"unknown split {split!r}: valid are {', '.join(known)}")
    threads = reading.threads
    if threads is None:
        threads = 1 if device.type == "cpu" else _threads_beside_gpus()
    with one_line_for_os_errors(f"cannot read the {split} split", manifest.folder):
        file = manifest.files["train" if split == VALIDATION else split]
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
    full is left out. Where the ranks do not divide B, the first ones have an image more. In
    evaluation each image comes exactly once over all ranks, in order; ranks may then have
    different numbers of images and steps.

    Attributes:
        images_per_step: of this rank; in evaluation, its last batch may have fewer.
        steps_per_epoch: batches of this rank in an epoch.
    """

    def __init__(
        self,
        reader: SplitReader,
        samples: Indices,
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
        self._reader, self._samples = reader, samples
        self._batch_size = batch_size
        self._training = training
        self._view, self._resolution = view, resolution
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mean, self._std = (torch.tensor(values, device=device) for values in normalization)
        share = rank_share(batch_size, rank, world_size)
        self.images_per_step = share.stop - share.start
        self.steps_per_epoch = -(-len(self._order(0)) // self.images_per_step)

    def _order(self, epoch: int) -> Indices:
        """Sample indices of this rank in the order of its batches."""
        samples, batch_size = self._samples, self._batch_size
        if not self._training:
            return samples[rank_share(len(samples), self._rank, self._world_size)]
        shuffled = samples[epoch_order(len(samples), self._seed, epoch)]
        batches = shuffled[: len(samples) // batch_size * batch_size].reshape(-1, batch_size)
        return batches[:, rank_share(batch_size, self._rank, self._world_size)].ravel()

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
        order = self._order(epoch)[start_step * self.images_per_step :]
        # All labels of the epoch at once: 8 bytes an image, and no step copies its own.
        labels = torch.from_numpy(self._reader.index.labels[order]).to(self._device)
        done = 0
        with (
            closing(self._read(order, epoch, start_step)) as arrays,
            closing(self._delivered(arrays)) as batches,
        ):
            for images in batches:
                yield images, labels[done : done + len(images)]
                done += len(images)

    def _read(self, order: Indices, epoch: int, start_step: int) -> Generator[Images]:
        """What the reader gives; its errors name the step."""

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
            with closing(self._reader.read(order, look)) as arrays:
                for images in arrays:
                    yield images
                    step += 1
        except DataError as error:
            raise DataError(f"epoch {epoch + 1}, step {step}: {error}") from error.__cause__
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"epoch {epoch + 1}, step {step}: {what}") from error

    def _delivered(self, arrays: Iterator[Images]) -> Generator[torch.Tensor]:
        """Images on the device, (N, C, H, W), normalized; to a GPU, copied one batch ahead."""
        if self._copy_stream is None:
            for images in arrays:
                yield _channels_first(torch.from_numpy(images))  # the reader has normalized them
            return
        ready: _Copy | None = None
        for images in arrays:
            copy = _Copy(images, self._device, self._copy_stream)
            try:
                if ready is not None:
                    yield self._normalized(ready.take())
            finally:
                # Then the reader may use the buffer again. This waits for the copy alone, which
                # began before the trainer queued its last step and runs beside the computation:
                # it is over by now, while the GPU still has that step to do.
                copy.wait()
            ready = copy
        if ready is not None:
            yield self._normalized(ready.take())

    def _normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = self._mean.view(-1, 1, 1), self._std.view(-1, 1, 1)
        return (_channels_first(pixels) / 255).sub_(mean).div_(std)


class _Copy:
    """Images on their way to a GPU, on a stream of their own beside the computation.

    FFCV's buffers are page-locked: to start the copy is all that the processor has to do. Others
    are first copied into such memory, while this process waits.
    """

    def __init__(self, images: Images, device: torch.device, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            self._pixels = torch.from_numpy(images).to(device, non_blocking=True)
            self._done = stream.record_event()

    def take(self) -> torch.Tensor:
        """The images, (N, H, W, C), for the current stream, where what follows waits for them."""
        computation = torch.cuda.current_stream(self._pixels.device)
        computation.wait_event(self._done)
        self._pixels.record_stream(computation)
        return self._pixels

    def wait(self) -> None:
        """Until the copy is done; not for any computation."""
        self._done.synchronize()


def _channels_first(pixels: torch.Tensor) -> torch.Tensor:
    """A view, (N, C, H, W), of (N, H, W, C); that of one channel is contiguous."""
    count, height, width, channels = pixels.shape
    return pixels.view(count, 1, height, width) if channels == 1 else pixels.permute(0, 3, 1, 2)


def make_loader(
    manifest: Manifest,
    split: str,
    *,
    batch_size: int,
    training: bool,
    held_out: int = 0,
    view: View | None = None,
    resolution: Resolution | None = None,
    normalize: str = "dataset",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    reading: Reading | None = None,
) -> Loader:
    """A loader whose batches, see ``Loader``, depend on ``seed``, epoch and step alone.

    Args:
        manifest: of the prepared data set.
        split: ``train``, ``test``, or ``validation``: the training images that are held out.
        batch_size: images per step over all ranks, at least one for each.
        training: shuffled and in full batches, or each image once.
        held_out: images that ``train`` leaves to ``validation``, see ``held_out_samples``.
        view: how images are cut and changed; by default the whole image, unchanged.
        resolution: height and width by epoch; by default the data set's image size.
        normalize: name of the normalization, see ``named_normalization``.
        seed: of order and augmentation, any whole number (only its last 64 bits count).
        rank: of this process, from 0.
        world_size: number of processes.
        device: where batches are needed.
        reading: what reads the files, and how.

    Raises:
        DataError: when the rank is none of ``world_size``, the batch is smaller than that or
            larger than the split, or the files are not as they were written.
    """
    device = torch.device(device)
    _check_place(batch_size, rank, world_size, device)
    share = rank_share(batch_size, rank, world_size)
    reader = open_split(manifest, split, share.stop - share.start, reading or Reading(), device)
    samples = samples_of(split, reader.index.labels, held_out, manifest.dataset)
    if training and batch_size > len(samples):
        raise DataError(
            f"a batch of {batch_size} images is more than the {len(samples)} of the "
            f"{split} split of {manifest.dataset}"
        )
    return Loader(
        reader,
        samples,
        batch_size=batch_size,
        training=training,
        view=view or CentralCrop(),
        resolution=resolution or Resolution.constant(manifest.image_size),
        normalization=named_normalization(normalize, manifest.normalization),
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def _check_place(batch_size: int, rank: int, world_size: int, device: torch.device) -> None:
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}: ranks go from 0 to {world_size} - 1")
    if batch_size < world_size:
        raise DataError(
            f"a batch of {batch_size} images cannot be shared by {world_size} ranks: "
            f"take {world_size} or more"
        )
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"no batches for a device of type {device.type!r}: take cpu or cuda")
