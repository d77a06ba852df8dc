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
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.augment import Geometry, Indices
from data_prep.beton import JPG, Index, checksum
from data_prep.datasets import DataError
from data_prep.reading.resampling import resize

Bytes = npt.NDArray[np.uint8]
Images = npt.NDArray[np.uint8] | npt.NDArray[np.floating]

Cache = Literal["page", "process"]

#: A file may take this share of the memory before it is no longer left to the page cache.
_CACHED_SHARE = 0.6


class Look(NamedTuple):
    """How the images of an epoch are to be seen.

    Attributes:
        geometry: of samples, from their indices (N,) and stored heights and widths (N, 2).
        edge: what a shift uncovers repeats the border pixel instead of being black.
        size: height and width of the result in pixels.
        mean: (C,), subtracted from pixels scaled to [0, 1], in the type of the result; None leaves
            them uint8.
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
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def choose_cache(file_bytes: int) -> Cache:
    """Where a file of that size is best kept while it is read, see ``make_loader``."""
    return "page" if file_bytes <= _CACHED_SHARE * memory_bytes() else "process"


def open_file(path: Path, cache: Cache) -> BufferedReader:
    """Open a prepared file for reading at any place.

    Args:
        path: of the file.
        cache: ``page`` has the system read the file ahead in one sweep, instead of in random order
            when the first epoch asks, and keeps it in memory, once for all processes. ``process``
            reads the bytes of each image when it is needed and nothing around them, for files that
            do not fit.
    """
    file = path.open("rb")
    if cache == "process":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    else:
        threading.Thread(target=_read_ahead, args=(path,), daemon=True).start()
    return file


def _read_ahead(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


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
        self._pool = ThreadPoolExecutor(threads, "read") if threads > 1 else None

    def read(self, order: Indices, look: Look) -> Generator[Images]:
        for start in range(0, len(order), self._batch_size):
            yield self._batch(order[start : start + self._batch_size], look)

    def _batch(self, indices: Indices, look: Look) -> Images:
        index = self.index
        shapes = np.stack([index.heights[indices], index.widths[indices]], axis=1)
        windows, moves = look.geometry(indices, shapes)
        images = np.empty((len(indices), look.size, look.size, index.channels), dtype=np.uint8)

        def make(number: int) -> None:
            pixels = self._decode(int(indices[number]))
            top, left, height, width = windows[number]
            window = pixels[top : top + height, left : left + width]
            images[number] = _moved(resize(window, look.size, look.size), moves[number], look.edge)

        list((self._pool.map if self._pool else map)(make, range(len(indices))))
        if look.mean is None:
            return images
        scaled = images.astype(look.mean.dtype) / look.mean.dtype.type(255)
        return (scaled - look.mean) / look.std

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
