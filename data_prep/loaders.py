"""From prepared files to batches on a device: the same batches from every backend and rank count.

The one place where FFCV reads. What it does not do by itself (see ``_beton_epoch``): report an
exception of its thread, end when an epoch is left early, leave torch's thread count alone.
"""

from __future__ import annotations

import functools
import queue
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from data_prep.augment import Augmentation, epoch_order
from data_prep.datasets import DataError, one_line_for_os_errors
from data_prep.manifest import Manifest

if TYPE_CHECKING:
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader.epoch_iterator import EpochIterator

Images = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

#: Seconds until a batch that does not come is an error.
BATCH_TIMEOUT = 120.0

_JOIN_TIMEOUT = 5.0


class SplitReader(Protocol):
    """Random access to the images of one prepared split."""

    labels: npt.NDArray[np.int64]

    def read(self, order: Indices) -> Generator[Images]:
        """Images of ``order``, uint8 (batch, H, W, C), batch by batch; the last may be short.

        An array is valid until the next one is asked for. Close the generator to end early.
        """
        ...


class ArrayReader:
    """A split kept as two ``.npy`` files, mapped into memory."""

    def __init__(self, images: Path, labels: Path, batch_size: int) -> None:
        self._images = np.load(images, mmap_mode="r")
        self.labels = np.load(labels)
        if len(self._images) != len(self.labels):
            raise DataError(
                f"{images} has {len(self._images)} images for {len(self.labels)} labels"
            )
        self._batch_size = batch_size

    def read(self, order: Indices) -> Generator[Images]:
        for start in range(0, len(order), self._batch_size):
            yield self._images[order[start : start + self._batch_size]]


class BetonReader:
    """A split kept as a ``.beton`` file, read ahead by FFCV's loader thread."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self._loader = _open_beton(path, batch_size)
        self.labels = self._loader.reader.metadata["f1"].astype(np.int64)

    def read(self, order: Indices) -> Generator[Images]:
        with closing(_beton_epoch()(self._loader, order.astype(np.uint64))) as epoch:
            for (images,) in epoch:
                yield images


@contextmanager
def ffcv_without_compiler() -> Iterator[None]:
    """Import FFCV and build its loaders in here: seconds faster, with no trace left in torch.

    FFCV sets torch's thread count for the whole process at import and in each loader; it is put
    back. Its import compiles a numba dictionary (3 s), and each loader compiles its decoders
    (1 s); images of one size need neither, so numba is told not to compile. A data set that needs
    FFCV's own JPEG decoders has to import FFCV outside.
    """
    try:
        import numba
    except ImportError as error:
        raise DataError(f"FFCV cannot be used ({error}): set data.backend=torch") from None

    config: Any = numba.config
    threads, disabled = torch.get_num_threads(), config.DISABLE_JIT
    config.DISABLE_JIT = True
    try:
        yield
    except ImportError as error:
        raise DataError(f"FFCV cannot be used ({error}): set data.backend=torch") from None
    finally:
        config.DISABLE_JIT = disabled
        torch.set_num_threads(threads)


def _open_beton(path: Path, batch_size: int) -> FFCVLoader:
    with ffcv_without_compiler():
        from ffcv.fields.ndarray import NDArrayDecoder
        from ffcv.loader import Loader as FFCVLoader
        from ffcv.pipeline import PipelineSpec

        class RowDecoder(NDArrayDecoder):
            """FFCV's array decoder, a batch at a time instead of compiled and row by row."""

            def generate_code(self) -> Callable[..., Images]:
                def decode(
                    indices: npt.NDArray[np.uint64],
                    destination: Images,
                    pointers: npt.NDArray[np.uint64],
                    storage: tuple[Images, ...],
                ) -> Images:
                    flat = destination.reshape(len(indices), -1)
                    windows = np.lib.stride_tricks.sliding_window_view(
                        np.asarray(storage[0]), flat.shape[1]
                    )
                    flat[:] = windows[pointers[indices]]
                    return destination

                return decode

        return FFCVLoader(
            str(path),
            batch_size,
            num_workers=1,
            seed=0,
            pipelines={"image": PipelineSpec("image", decoder=RowDecoder()), "label": None},
        )


@functools.cache
def _beton_epoch() -> type[EpochIterator]:
    """FFCV's epoch thread, made to end, and to say why it ended."""
    with ffcv_without_compiler():
        from ffcv.loader.epoch_iterator import EpochIterator

    class BetonEpoch(EpochIterator):
        def run(self) -> None:
            # FFCV's own loop sets torch's thread count, dies silently, and blocks for good at
            # its last batch when nobody takes it.
            slots = self.loader.batches_ahead + 2
            try:
                for number, indices in enumerate(self.iter_ixes):
                    images = self.run_pipeline(number, indices, number % slots, None)
                    if not self._offer(images):
                        return
            except BaseException as error:  # raised again in the consumer
                self._offer(error)
            else:
                self._offer(None)

        def _offer(self, item: tuple[Images] | BaseException | None) -> bool:
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def __next__(self) -> tuple[Images]:
            deadline = time.monotonic() + BATCH_TIMEOUT
            while True:
                try:
                    item = self.output_queue.get(timeout=1.0)
                    break
                except queue.Empty:
                    if not self.is_alive() and self.output_queue.empty():
                        raise DataError("the loader thread is gone") from None
                    if time.monotonic() > deadline:
                        raise DataError(f"no batch came in {BATCH_TIMEOUT:g} s") from None
            if item is None:
                raise StopIteration
            if isinstance(item, BaseException):
                raise DataError(f"{type(item).__name__}: {item}") from item
            return item

        def close(self) -> None:
            self.terminate_event.set()
            # A thread that hangs inside a read cannot be ended; being a daemon it keeps nobody.
            self.join(timeout=_JOIN_TIMEOUT)

    return BetonEpoch


def open_split(manifest: Manifest, split: str, batch_size: int) -> SplitReader:
    """Open the files of a split.

    Raises:
        DataError: for an unknown split, and when a file is missing or has another size than it
            was written with, or cannot be read.
    """
    if split not in manifest.files:
        raise DataError(f"unknown split {split!r}: valid are {', '.join(manifest.files)}")
    with one_line_for_os_errors(f"cannot read the {split} split", manifest.folder):
        paths = [file.check_size(manifest.folder) for file in manifest.files[split]]
        if manifest.backend == "ffcv":
            return BetonReader(paths[0], batch_size)
        return ArrayReader(paths[0], paths[1], batch_size)


Batch = tuple[torch.Tensor, torch.Tensor]


class Loader:
    """One rank's share of a split, see ``make_loader``.

    Attributes:
        steps_per_epoch: batches of this rank in an epoch.
    """

    def __init__(
        self,
        reader: SplitReader,
        *,
        batch_size: int,
        training: bool,
        augmentation: Augmentation | None,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self._reader = reader
        self._share = batch_size // world_size
        self._training = training
        self._augmentation = augmentation
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(std, device=device).view(-1, 1, 1)
        self._is_scaled = any(mean) or any(value != 1 for value in std)
        self.steps_per_epoch = -(-len(self._order(0)) // self._share)

    def _order(self, epoch: int) -> Indices:
        """Sample indices of this rank in the order of its batches."""
        count = len(self._reader.labels)
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

        A batch is images, float32 (N, C, H, W), normalized (one channel: contiguous; more:
        channels_last), and labels, int64 (N,), both on the loader's device.

        Raises:
            DataError: in the iteration, when reading fails or hangs, naming the step.
        """
        batches = self._batches(epoch, start_step)
        with closing(batches):
            yield batches

    def _batches(self, epoch: int, start_step: int) -> Generator[Batch]:
        order = self._order(epoch)[start_step * self._share :]
        step = start_step
        try:
            with closing(self._reader.read(order)) as batches:
                for images in batches:
                    first = (step - start_step) * self._share
                    yield self._to_device(images, order[first : first + len(images)], epoch)
                    step += 1
        except DataError as error:
            raise DataError(f"step {step} of epoch {epoch}: {error}") from error.__cause__

    def _to_device(self, images: Images, indices: Indices, epoch: int) -> Batch:
        if self._augmentation is not None:
            images = self._augmentation.apply(images, indices, self._seed, epoch)
        pixels, labels = self._copied(images, self._reader.labels[indices])
        # Torch's own division of uint8 makes float32: the batch never aliases the reader's buffer.
        scaled = pixels / 255
        if self._is_scaled:
            scaled = scaled.sub_(self._mean).div_(self._std)
        return scaled, labels

    def _copied(self, images: Images, labels: npt.NDArray[np.int64]) -> Batch:
        count, height, width, channels = images.shape
        pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
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
            return pixels.view(count, 1, height, width), targets
        return pixels.permute(0, 3, 1, 2), targets


def make_loader(
    manifest: Manifest,
    split: str,
    *,
    batch_size: int,
    training: bool,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Loader:
    """A loader whose batches depend on ``seed``, epoch and step alone.

    In training, step ``s`` of an epoch has the samples ``p[s*B:(s+1)*B]`` of that epoch's
    permutation ``p``, of which each rank takes its contiguous share; a last batch that is not
    full is left out. In evaluation each image comes exactly once over all ranks, in order; ranks
    may then have different numbers of images and steps.

    Args:
        manifest: of the prepared data set.
        split: ``train`` or ``test``.
        batch_size: images per step over all ranks.
        training: shuffled and in full batches, or each image once.
        augmentation: of the images before they travel to the device; none by default.
        seed: of order and augmentation, any whole number (only its last 64 bits count).
        rank: of this process, from 0.
        world_size: number of processes.
        device: where batches are needed.

    Raises:
        DataError: when the rank is none of ``world_size``, the batch cannot be shared evenly or is
            larger than the split, or when the files are not as they were written.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}: ranks go from 0 to {world_size} - 1")
    if batch_size < 1 or batch_size % world_size:
        raise DataError(
            f"a batch of {batch_size} images cannot be shared by {world_size} ranks: "
            f"take a multiple of {world_size}"
        )
    reader = open_split(manifest, split, batch_size // world_size)
    if training and batch_size > len(reader.labels):
        raise DataError(
            f"a batch of {batch_size} images is more than the {len(reader.labels)} of the "
            f"{split} split of {manifest.dataset}"
        )
    return Loader(
        reader,
        batch_size=batch_size,
        training=training,
        augmentation=augmentation,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        mean=manifest.mean,
        std=manifest.std,
    )
