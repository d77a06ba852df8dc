"""Random access to the images of a prepared file, and the reader that needs no FFCV.

There are two readers with the same images: FFCV's (``data_prep.reading.ffcv_reader``), and the
one here, of Pillow and NumPy, for machines without FFCV. Each image's checksum is verified before
it is decoded, so damage is an error and never a wrong picture.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Generator
from io import BufferedReader
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_prep.augment import Geometry, Indices
from data_prep.beton import JPG, Index, checksum
from data_prep.datasets import DataError
from data_prep.reading.resampling import resize

Bytes = npt.NDArray[np.uint8]
Images = npt.NDArray[np.uint8] | npt.NDArray[np.floating]

Float = TypeVar("Float", bound=np.floating)

Cache = Literal["page", "process"]

_READ_AHEAD_BYTES = 1 << 20

#: A file may take this share of the memory before it is no longer left to the page cache.
_CACHED_SHARE = 0.6


class Look(NamedTuple):
    """How the images of an epoch are to be seen.

    Attributes:
        geometry: of samples, from their indices (N,) and stored heights and widths (N, 2).
        edge: what a shift uncovers repeats the border pixel instead of being black.
        size: height and width of the result in pixels.
        mean: (C,), subtracted from pixels scaled to [0, 1], in the type of the result; None leaves
            the images uint8.
        std: (C,), divides what the mean leaves.
    """

    geometry: Callable[[Indices, npt.NDArray[np.int32]], Geometry]
    edge: bool
    size: int
    mean: npt.NDArray[np.floating] | None
    std: npt.NDArray[np.floating] | None


class SplitReader(Protocol):
    """Random access to the images of one prepared split."""

    index: Index

    def read(self, order: Indices, look: Look) -> Generator[Images]:
        """Images of ``order``, (N, size, size, C), batch by batch; the last may be short.

        An array of uint8 is valid until the next one is asked for. Close the generator to end
        early.

        Raises:
            DataError: naming the sample, when one is damaged or cannot be read.
        """
        ...


def memory_bytes() -> int:
    """Memory that this machine, or the container that this process runs in, has in all."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of either version of cgroups
        limit = Path("/sys/fs/cgroup") / name
        text = limit.read_text().strip() if limit.is_file() else ""
        sizes += [int(text)] if text.isdigit() else []
    return min(sizes)


def choose_cache(file_bytes: int) -> Cache:
    """Where a file of that size is best kept while it is read, see ``open_file``."""
    return "page" if file_bytes <= _CACHED_SHARE * memory_bytes() else "process"


def open_file(path: Path, cache: Cache) -> BufferedReader:
    """Open a prepared file for reading at any place.

    Args:
        path: of the file.
        cache: ``page`` has the system read the file ahead from its beginning, instead of in random
            order when the first epoch asks, and keep it in memory, once for all processes.
            ``process`` reads each image into this process when it is needed and nothing around
            it, for files that do not fit.
    """
    file = path.open("rb")
    if cache == "process":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    else:
        threading.Thread(target=_read_ahead, args=(path,), daemon=True).start()
    return file


def _read_ahead(path: Path) -> None:
    with path.open("rb") as file:
        # The system reads no more than a few megabytes ahead for one request.
        for start in range(0, path.stat().st_size, _READ_AHEAD_BYTES):
            os.posix_fadvise(file.fileno(), start, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def checked_geometry(look: Look, index: Index, indices: Indices) -> Geometry:
    """The geometry of samples, as int32, which compiled code may take for addresses.

    Raises:
        DataError: naming the first sample whose window is not within its image, or would have to
            be resized though it is gray.
    """
    shapes = np.stack([index.heights[indices], index.widths[indices]], axis=1)
    windows, moves = look.geometry(indices, shapes)
    first, sizes = windows[:, :2], windows[:, 2:]
    wrong = (first < 0).any(1) | (sizes < 1).any(1) | (first + sizes > shapes).any(1)
    for number in np.flatnonzero(wrong)[:1]:
        height, width = shapes[number]
        raise DataError(
            f"sample {indices[number]}: the window {windows[number].tolist()} is not within its "
            f"{height}x{width} pixels"
        )
    if index.channels != 3 and (sizes != look.size).any():
        raise DataError(
            f"the gray images of {index.path} are not resized: take the whole image at its own size"
        )
    return Geometry(windows.astype(np.int32), moves.astype(np.int32))


def normalized(
    images: Bytes, mean: npt.NDArray[Float], std: npt.NDArray[Float]
) -> npt.NDArray[Float]:
    """Images, uint8 (..., C), scaled to [0, 1], less ``mean``, by ``std``, in their type."""
    return (images.astype(mean.dtype) / mean.dtype.type(255) - mean) / std


def damage(index: Index, sample: int, what: str) -> DataError:
    """The error that names a sample which is not as it was written."""
    return DataError(
        f"{index.path}: sample {sample} {what}; the file was changed after it was written, or the "
        f"disk fails: delete the folder {index.path.parent} and it is prepared anew"
    )


class PillowReader:
    """A split read with Pillow and NumPy: no FFCV, no compiler, and slower."""

    def __init__(self, index: Index, batch_size: int, threads: int, cache: Cache) -> None:
        self.index = index
        self._batch_size = batch_size
        self._file = open_file(index.path, cache)
        self._pool = ThreadPool(threads) if threads > 1 else None

    def read(self, order: Indices, look: Look) -> Generator[Images]:
        for start in range(0, len(order), self._batch_size):
            yield self._batch(order[start : start + self._batch_size], look)

    def _batch(self, indices: Indices, look: Look) -> Images:
        index = self.index
        windows, moves = checked_geometry(look, index, indices)
        images = np.empty((len(indices), look.size, look.size, index.channels), dtype=np.uint8)

        def make(number: int) -> None:
            pixels = self._decode(int(indices[number]))
            top, left, height, width = windows[number]
            window = pixels[top : top + height, left : left + width]
            images[number] = _moved(resize(window, look.size, look.size), moves[number], look.edge)

        list((self._pool.map if self._pool else map)(make, range(len(indices))))
        if look.mean is None or look.std is None:
            return images
        return normalized(images, look.mean, look.std)

    def _decode(self, sample: int) -> Bytes:
        index = self.index
        size, place = int(index.sizes[sample]), int(index.pointers[sample])
        try:
            stored = np.frombuffer(os.pread(self._file.fileno(), size, place), dtype=np.uint8)
        except OSError as error:
            raise damage(index, sample, f"cannot be read ({error.strerror})") from error
        if len(stored) != size:
            raise damage(index, sample, "cannot be read")
        if checksum(stored) != int(index.checksums[sample]):
            raise damage(index, sample, "is damaged: its checksum is wrong")
        shape = (int(index.heights[sample]), int(index.widths[sample]), index.channels)
        if index.modes[sample] != JPG:
            return stored.reshape(shape)
        from PIL import Image

        try:
            pixels = np.asarray(Image.open(io.BytesIO(stored.data)).convert("RGB"))
        except OSError:
            pixels = np.empty(0, dtype=np.uint8)
        if pixels.shape != shape:
            raise damage(index, sample, "is no image")
        return pixels


def _moved(image: Bytes, move: npt.NDArray[np.int32], edge: bool) -> Bytes:
    """Mirror an image, then look at it further down and right; see ``Geometry``."""
    down, right, mirrored = (int(value) for value in move)
    if mirrored:
        image = image[:, ::-1]
    if not down and not right:
        return image
    border = max(abs(down), abs(right))
    mode: Any = "edge" if edge else "constant"
    padded = np.pad(image, ((border, border), (border, border), (0, 0)), mode=mode)
    height, width = image.shape[:2]
    return padded[border + down :, border + right :][:height, :width]
