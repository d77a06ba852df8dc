"""The reader that trains: FFCV's pipeline around a decoder of our own.

FFCV gives the thread that reads ahead, the ring of buffers and the pipeline; what makes the images
is in ``data_prep.reading.kernels``. What FFCV does not do by itself is put right in
``_epoch_type``: report an exception of its thread, end when an epoch is left early, leave torch's
thread count alone.
"""

from __future__ import annotations

import functools
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from data_prep.augment import Indices
from data_prep.beton import JPG, Index, checksum_keys
from data_prep.datasets import DataError
from data_prep.reading.readers import (
    Bytes,
    Cache,
    Images,
    Look,
    checked_geometry,
    damage,
    open_file,
)

if TYPE_CHECKING:
    from ffcv.loader.epoch_iterator import EpochIterator

#: Seconds until a batch that does not come is an error.
BATCH_TIMEOUT = 120.0

_JOIN_TIMEOUT = 5.0

#: Held while something that concerns all of numba, or all epochs of a reader, is changed.
_NUMBA = threading.RLock()

#: Batches that are made before they are asked for.
_BATCHES_AHEAD = 3


@contextmanager
def ffcv_without_compiler() -> Iterator[None]:
    """Import FFCV and build its pipelines in here: seconds faster, with no trace left in torch.

    FFCV sets torch's thread count for the whole process at import; it is put back. Its import
    compiles a numba dictionary (3 s) and each pipeline its glue (1 s and more); our decoder brings
    its own compiled code, so numba is told not to compile.
    """
    import numba

    config: Any = numba.config
    with _NUMBA:
        threads, disabled = torch.get_num_threads(), config.DISABLE_JIT
        config.DISABLE_JIT = True
        try:
            yield
        finally:
            config.DISABLE_JIT = disabled
            torch.set_num_threads(threads)


class FFCVReader:
    """A split read by FFCV's pipeline, with a decoder of our own, in a thread that reads ahead."""

    def __init__(self, index: Index, batch_size: int, threads: int, cache: Cache) -> None:
        try:
            with _NUMBA:
                from data_prep.reading import kernels
        except (ImportError, OSError, AttributeError) as error:
            raise DataError(f"FFCV cannot be used ({error}): set data.backend=torch") from None
        self._decoder = _BatchDecoder(index, threads, cache, kernels)
        self._pipeline, self._operation = _build_pipeline(batch_size, self._decoder)
        self.index = index

    def read(self, order: Indices, look: Look) -> Generator[Images]:
        with _NUMBA:  # an epoch asks the one operation how much memory it needs
            self._operation.size = look.size
            pipeline = SimpleNamespace(**vars(self._pipeline), memory_manager=_LookCarrier(look))
            started = _epoch_type()(pipeline, order)
        with closing(started) as epoch:
            for (images,) in epoch:
                yield images


class _Recycler:
    """Arrays for finished batches; one that nobody holds any more is given out again.

    New memory for each batch would be handed back to the system and faulted in again, which costs
    a fifth of the time of decoding.
    """

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[np.floating]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> npt.NDArray[np.floating]:
        """An array of this shape and type, with anything in it."""
        fitting = [a for a in self._arrays if a.shape == shape and a.dtype == dtype]
        while fitting:
            array = fitting.pop()
            # Held by the list, by the name here, and by the call: a tensor would be one more.
            if sys.getrefcount(array) == 3:
                return array
        array = np.empty(shape, dtype=dtype)
        # The youngest: who keeps the first batches of an epoch keeps them for long.
        self._arrays = [*self._arrays[-(_BATCHES_AHEAD + 1) :], array]
        return array


class _BatchDecoder:
    """From sample indices to finished images, in compiled code on several threads."""

    def __init__(self, index: Index, threads: int, cache: Cache, kernels: Any) -> None:
        self._kernels = kernels
        self._problems = {
            kernels.UNREADABLE: "cannot be read",
            kernels.DAMAGED: "is damaged: its checksum is wrong",
            kernels.NO_IMAGE: "is no image",
        }
        self.index = index
        self._threads = threads
        self._file = open_file(index.path, cache)
        # One more pair than the largest image fills: it may end within a pair.
        largest = int(index.sizes.max()) if len(index) else 0
        self._keys = checksum_keys(2 * (largest // 8 + 1))
        self._pool = ThreadPool(threads) if threads > 1 else None
        self._buffers = threading.local()
        self._recycler = _Recycler()

    def __call__(self, indices: Indices, images: Bytes, look: Look) -> Images:
        """Decode samples into ``images``, uint8 (N, H, W, C); normalized ones are new."""
        index = self.index
        windows, moves = checked_geometry(look, index, indices)
        shapes = np.stack([index.heights[indices], index.widths[indices]], axis=1)
        verdicts = np.zeros(len(indices), dtype=np.uint8)
        result: Images = images
        if look.mean is not None and look.std is not None:
            result = self._recycler.take(images.shape, look.mean.dtype)
            mean, std = np.tile(look.mean, look.size), np.tile(look.std, look.size)

        def decode(share: slice) -> None:
            chosen = indices[share]
            self._kernels.decode(
                self._kernels.decompressor(),
                self._file.fileno(),
                self._keys,
                (
                    index.pointers[chosen],
                    index.sizes[chosen],
                    shapes[share],
                    index.modes[chosen],
                    index.checksums[chosen],
                ),
                windows[share],
                moves[share],
                look.edge,
                self._thread_buffers(look.size),
                images[share],
                verdicts[share],
            )
            if look.mean is not None:
                self._kernels.normalize(images[share], mean, std, result[share])

        edges = np.linspace(0, len(indices), self._threads + 1).astype(int).tolist()
        shares = [slice(*ends) for ends in itertools.pairwise(edges) if ends[0] < ends[1]]
        list((self._pool.map if self._pool else map)(decode, shares))
        if verdicts.any():
            number = int(np.flatnonzero(verdicts)[0])
            raise damage(index, int(indices[number]), self._problems[verdicts[number]])
        return result

    def _thread_buffers(self, size: int) -> tuple[Bytes, Bytes, Bytes]:
        """Room for stored bytes, decoded pixels and one image of the result, of this thread."""
        index = self.index
        kept = getattr(self._buffers, "kept", None)
        if kept is None or len(kept[2]) != size:
            is_jpg = index.modes == JPG
            pixels = index.heights.astype(np.int64) * index.widths * index.channels
            self._buffers.kept = kept = (
                np.empty(int(index.sizes.max()), dtype=np.uint8),
                np.empty(int((pixels * is_jpg).max()), dtype=np.uint8),
                np.empty((size, size, index.channels), dtype=np.uint8),
            )
        return kept


class _LookCarrier:
    """FFCV's memory manager, whose state reaches the decoder: it carries the look of an epoch.

    The decoder reads the file by itself, so there is no memory to manage.
    """

    def __init__(self, look: Look) -> None:
        self.state = look

    def schedule_epoch(self, batches: Sequence[Any]) -> _LookCarrier:
        return self

    def start_batch(self, batch: int) -> None:
        """Nothing to load."""

    def __enter__(self) -> _LookCarrier:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to free."""


def _build_pipeline(batch_size: int, decode: _BatchDecoder) -> tuple[SimpleNamespace, Any]:
    """What FFCV's epoch iterator takes from a loader, and the operation that decodes.

    FFCV's own loader would also walk through all samples in Python to sort them by pages.
    """
    with ffcv_without_compiler():
        from ffcv.pipeline import PipelineSpec
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.graph import Graph
        from ffcv.pipeline.operation import Operation
        from ffcv.pipeline.state import State
        from ffcv.reader import Reader

        class Decoder(Operation):
            """FFCV's view of the decoder: how large an image is, and what makes a batch."""

            size = 1

            def declare_state_and_memory(self, previous: State) -> tuple[State, AllocationQuery]:
                shape = (self.size, self.size, decode.index.channels)
                dtype = np.dtype("uint8")
                state = State(True, previous.device, shape, dtype)
                return state, AllocationQuery(shape, dtype)

            def generate_code(self) -> Callable[..., Images]:
                def decode_batch(
                    samples: Indices, images: Bytes, table: object, look: Look
                ) -> Images:
                    return decode(samples, images, look)

                return decode_batch

        operation = Decoder()
        reader = Reader(str(decode.index.path))
        fields = {name: number for number, name in enumerate(reader.handlers)}
        graph = Graph(
            {"image": PipelineSpec("image", decoder=operation)},
            reader.handlers,
            fields,
            reader.metadata,
            None,
        )
        code = graph.codegen_all(graph.collect_requirements()[1])
    pipeline = SimpleNamespace(
        reader=reader, graph=graph, code=code, batch_size=batch_size, batches_ahead=_BATCHES_AHEAD
    )
    return pipeline, operation


class _EndingThread:
    """What FFCV's epoch thread is to do otherwise: end, and say why it ended.

    FFCV's own loop sets torch's thread count, dies silently, and blocks for good at its last batch
    when nobody takes it.
    """

    loader: SimpleNamespace
    order: Indices
    iter_ixes: Iterator[Indices]
    output_queue: queue.Queue[Any]
    terminate_event: threading.Event
    run_pipeline: Callable[..., tuple[Images]]
    is_alive: Callable[[], bool]
    join: Callable[..., None]

    taken = 0

    def run(self) -> None:
        slots = self.loader.batches_ahead + 2
        try:
            for number, samples in enumerate(self.iter_ixes):
                images = self.run_pipeline(number, samples, number % slots, None)
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
                    first = self.order[self.taken * self.loader.batch_size]
                    raise DataError(
                        f"no batch came in {BATCH_TIMEOUT:g} s; its first sample is {first}"
                    ) from None
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        self.taken += 1
        return item

    def close(self) -> None:
        self.terminate_event.set()
        # A thread that hangs inside a read cannot be ended; being a daemon it keeps nobody.
        self.join(timeout=_JOIN_TIMEOUT)


@functools.cache
def _epoch_type() -> type[EpochIterator]:
    """FFCV's epoch thread with our ending."""
    with ffcv_without_compiler():
        from ffcv.loader import epoch_iterator

    # The copies to a GPU are ours; FFCV would make five streams on whichever is the current one.
    epoch_iterator.IS_CUDA = False

    class Epoch(_EndingThread, epoch_iterator.EpochIterator):
        """A thread that makes the batches of one epoch."""

    return Epoch
