"""One split of a data set to one ``.beton`` file, by as many processes as there are.

Quick to import: each worker process does it.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.beton import BetonWriter
from data_prep.datasets import DataError, Normalization, Storage
from data_prep.manifest import BadFile, allowed_bad
from data_prep.preparing.images import BadImage, Pixels, clean
from data_prep.preparing.workers import Workers
from data_prep.raw.splits import ArraySplit, EncodedSplit, Progress

#: Images that a worker is given at once; and where each may take megabytes. Fewer of those cost
#: time: with 8, files that are kept as they are take a quarter longer.
_CHUNK, _CHUNK_OF_LARGE = 32, 16

#: What is wrong with one file of many; any other error of the system is one of the disk, the
#: network or this process, and would make good images look bad.
_ERRORS_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)

_ARRAY_CHUNK = 1000

#: FFCV's smallest page: the files of small data sets stay small.
ARRAY_PAGE_BYTES = 2 << 20

#: Images that are cleaned to estimate the size of the file.
_SAMPLES = 128

_EXAMPLES = 3


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over pixels: how many; their values and squares, int64 (C,)."""

    count: int
    values: npt.NDArray[np.int64]
    squares: npt.NDArray[np.int64]

    def add(self, other: PixelSums) -> PixelSums:
        """The sums over both."""
        return PixelSums(
            self.count + other.count, self.values + other.values, self.squares + other.squares
        )

    def normalization(self) -> Normalization:
        """Mean and standard deviation of the pixels, scaled to [0, 1]."""
        mean = self.values / self.count
        # The variance from whole numbers: no digit is lost before the division.
        spread = [
            self.count * int(square) - int(value) ** 2
            for value, square in zip(self.values, self.squares, strict=True)
        ]
        std = [math.sqrt(number) / self.count / 255 for number in spread]
        return Normalization(tuple((mean / 255).tolist()), tuple(std))


@dataclass(frozen=True)
class Written:
    """What was written of a split.

    Attributes:
        path: of the file.
        positions: int64 (M,), of the images written, in the split.
        labels: int64 (M,), theirs.
        bad: files that were left out.
        fingerprint: SHA-256 of the stored bytes, sizes and labels in order, 64 hex digits.
        sums: over all pixels, where they were asked for.
    """

    path: Path
    positions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    bad: tuple[BadFile, ...]
    fingerprint: str
    sums: PixelSums | None


def write_arrays(
    split: ArraySplit, name: str, path: Path, *, measured: bool, tell: Progress
) -> Written:
    """Write images of one size, pixel by pixel; the arguments are those of ``write_files``."""
    count, (height, width, channels) = len(split), split.images.shape[1:]
    digest = hashlib.sha256()
    shape = (height, width, channels)
    with BetonWriter(path, count, shape=shape, page_bytes=ARRAY_PAGE_BYTES) as writer:
        for first in range(0, count, _ARRAY_CHUNK):
            tell(f"write {name}", first, count)
            labels = split.labels[first : first + _ARRAY_CHUNK].tolist()
            images = np.ascontiguousarray(split.images[first : first + _ARRAY_CHUNK])
            digest.update(images.data)
            for label, pixels in zip(labels, images.reshape(len(images), -1), strict=True):
                writer.append(label, pixels)
    tell(f"write {name}", count, count)
    digest.update(np.asarray([height, width, channels], dtype="<i8").tobytes())
    digest.update(split.labels.astype("<i8").tobytes())
    sums = None
    if measured:
        for first in range(0, count, _ARRAY_CHUNK):
            sums = _total(sums, _sums(split.images[first : first + _ARRAY_CHUNK]))
    return Written(path, np.arange(count), split.labels, (), digest.hexdigest(), sums)


def write_files(
    split: EncodedSplit,
    name: str,
    path: Path,
    *,
    storage: Storage,
    bad_share: float,
    measured: bool,
    workers: Workers,
    tell: Progress,
) -> Written:
    """Clean and write encoded images; bad ones are left out.

    Args:
        split: where they lie.
        name: of the split, for people.
        path: of the new file.
        storage: how they are kept.
        bad_share: of bad ones that is allowed, see ``manifest.allowed_bad``.
        measured: whether sums over all pixels are wanted.
        workers: that do it.
        tell: progress.

    Raises:
        DataError: when too many images are bad, or one cannot be read for no fault of its own.
    """
    count = len(split)
    allowed = allowed_bad(bad_share, count)
    digest, sums = hashlib.sha256(), None
    bad: list[BadFile] = []
    is_kept, images = np.zeros(count, dtype=bool), np.zeros((count, len(_Image._fields)), np.int64)
    tell(f"write {name}", 0, count)
    with BetonWriter(path, count) as writer:
        for chunk in workers.run(_clean_chunk, _chunks(split, storage, measured)):
            for position, image, data in chunk.unpacked():
                if isinstance(image, str):
                    bad.append(BadFile(name, split.name(position), image))
                    if len(bad) > allowed:
                        raise DataError(_too_many(bad, position + 1, bad_share))
                    continue
                digest.update(data.data)
                label = int(split.labels[position])
                writer.append(label, data, image.height, image.width, image.mode)
                is_kept[position], images[position] = True, image
            sums = _total(sums, chunk.sums)
            tell(f"write {name}", position + 1, count)
    if not is_kept.any():
        raise DataError(f"no {name} image is left: {_listed(bad)}")
    positions, labels = np.flatnonzero(is_kept), split.labels[is_kept]
    digest.update(images[is_kept].astype("<i8").tobytes())
    digest.update(labels.astype("<i8").tobytes())
    return Written(path, positions, labels, tuple(bad), digest.hexdigest(), sums)


def estimate_bytes(split: EncodedSplit, storage: Storage, workers: Workers) -> int:
    """About how large the file will be, from a sample of images spread over the split."""
    chosen = np.unique(np.linspace(0, len(split) - 1, _SAMPLES).astype(np.int64))
    sizes = [
        image.bytes
        for chunk in workers.run(_clean_chunk, _chunks(split.take(chosen), storage, False))
        for image in chunk.images
        if not isinstance(image, str)
    ]
    return int(np.mean(sizes) * len(split)) if sizes else 0


def _too_many(bad: list[BadFile], done: int, bad_share: float) -> str:
    return (
        f"{len(bad)} of the first {done:,} {bad[0].split} images ({len(bad) / done:.1%}) are bad, "
        f"more than data.bad_share={bad_share:g} of all: {_listed(bad)}"
    )


def _listed(bad: list[BadFile]) -> str:
    examples = "; ".join(f"{file.name}: {file.reason}" for file in bad[:_EXAMPLES])
    return examples + ("; ..." if len(bad) > _EXAMPLES else "")


class _Task(NamedTuple):
    split: EncodedSplit
    first: int
    storage: Storage
    measured: bool


class _Image(NamedTuple):
    bytes: int
    height: int
    width: int
    mode: int


class _Chunk(NamedTuple):
    """What becomes of a task.

    Attributes:
        first: position of its first image in the split.
        images: each one, or why it is bad.
        data: uint8 (N,), the stored bytes of all good images, one after the other.
        sums: over the pixels of the good ones, where they were asked for.
    """

    first: int
    images: list[_Image | str]
    data: Pixels
    sums: PixelSums | None

    def unpacked(self) -> Iterator[tuple[int, _Image | str, Pixels]]:
        """Position of each image, the image or why it is bad, and its stored bytes."""
        start = 0
        for position, image in enumerate(self.images, start=self.first):
            end = start if isinstance(image, str) else start + image.bytes
            yield position, image, self.data[start:end]
            start = end


def _chunks(split: EncodedSplit, storage: Storage, measured: bool) -> Iterator[_Task]:
    is_small = storage.format == "jpg" and storage.side is not None
    size = _CHUNK if is_small else _CHUNK_OF_LARGE
    for first in range(0, len(split), size):
        part = split.take(np.arange(first, min(first + size, len(split))))
        yield _Task(part, first, storage, measured)


def _clean_chunk(task: _Task) -> _Chunk:
    """The images of a task, cleaned; a lack of memory is a MemoryError, of OpenCV too."""
    import cv2

    try:
        return _cleaned(task)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from None
        raise


def _cleaned(task: _Task) -> _Chunk:
    images: list[_Image | str] = []
    stored = [np.empty(0, np.uint8)]
    sums: PixelSums | None = None
    for position in range(len(task.split)):
        try:
            image = clean(read_image(task.split, position), task.storage, task.first + position)
        except BadImage as error:
            images.append(str(error))
            continue
        images.append(_Image(len(image.data), image.height, image.width, image.mode))
        stored.append(image.data)
        if task.measured:
            sums = _total(sums, _sums(image.pixels))
    return _Chunk(task.first, images, np.concatenate(stored), sums)


def read_image(split: EncodedSplit, position: int) -> bytes:
    """The bytes of one encoded image.

    Raises:
        BadImage: when that file is missing, barred, damaged within its archive, or too large.
        DataError: when nothing can be said of the file, because reading itself fails.
    """
    try:
        return split.read(position)
    except DataError as error:
        raise BadImage(str(error)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _ERRORS_OF_ONE_FILE:
            raise BadImage(f"cannot be read: {reason}") from None
        raise DataError(f"cannot read {split.name(position)}: {reason}") from None


def _total(one: PixelSums | None, other: PixelSums | None) -> PixelSums | None:
    if one is None or other is None:
        return one or other
    return one.add(other)


def _sums(pixels: Pixels) -> PixelSums:
    """Sums over uint8 (..., W, C)."""
    import cv2

    # Whole numbers below 2**53: exact in float64, once rounded (OpenCV squares a root).
    planes = cv2.split(pixels.reshape(-1, *pixels.shape[-2:]))
    values = np.rint([cv2.sumElems(plane)[0] for plane in planes]).astype(np.int64)
    squares = np.rint([cv2.norm(plane, cv2.NORM_L2SQR) for plane in planes]).astype(np.int64)
    return PixelSums(planes[0].size, values, squares)
