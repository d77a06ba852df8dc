"""Raw images as readers hand them on: pixels of one size, or encoded files where they lie."""

from __future__ import annotations

import os
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from data_prep.datasets import DataError, Dataset
from data_prep.raw.names import printable

#: Called as tell(stage, done, total).
Progress = Callable[[str, int, int], None]


def unwatched(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


Integers = npt.NDArray[np.int64]

#: Bytes; no image and no list of labels is larger.
LARGEST_FILE = 256 << 20

#: Fixed part of the header that a ZIP archive keeps before each member.
_ZIP_HEADER_BYTES = 30


@dataclass(frozen=True)
class ArraySplit:
    """Images of one size, in memory.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,).
        split: name of the split, for people.
    """

    images: npt.NDArray[np.uint8]
    labels: Integers
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where an image is, for people."""
        return f"{self.split} image {index}"

    def take(self, chosen: Integers) -> ArraySplit:
        """The images at the positions ``chosen``, int64 (M,), in that order."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class EncodedSplit(ABC):
    """Encoded files that are read one by one.

    It holds paths and numbers, never an open file: it can be pickled, forked, and read by many
    threads at once.

    Attributes:
        place: folder or archive with the files.
        names: N names, relative to ``place``.
        labels: int64 (N,).
    """

    place: Path
    names: Sequence[str]
    labels: Integers

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Where a file is, for people."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one file.

        Raises:
            OSError: when it cannot be read.
            DataError: when it is too large for an image or no regular file, or an archive does
                not hold what it announces.
        """

    @abstractmethod
    def states(self) -> Integers:
        """What tells whether files have changed, without reading them: int64 (N, 2).

        Bytes of each file, and a number that is another one when it holds something else.
        """

    def take(self, chosen: Integers) -> Self:
        """The files at the positions ``chosen``, int64 (M,), in that order."""
        parts: dict[str, Any] = {
            key: value[chosen] for key, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, names=[self.names[i] for i in chosen.tolist()], **parts)

    def _check_size(self, index: int, size: int) -> None:
        if size > LARGEST_FILE:
            raise DataError(f"{self.name(index)} is of {size:,} bytes, more than any image")


@dataclass(frozen=True)
class FileSplit(EncodedSplit):
    """Files below a folder."""

    def name(self, index: int) -> str:
        return printable(self._path(index))

    def _path(self, index: int) -> str:
        return f"{self.place}{os.sep}{self.names[index]}"

    def read(self, index: int) -> bytes:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(self._path(index), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{self.name(index)} is no regular file")
            self._check_size(index, status.st_size)
            return file.readall()

    def states(self) -> Integers:
        """Sizes and times of change; -1 where there are none, as of a link that leads nowhere."""
        rows = [_state(Path(self._path(index))) for index in range(len(self))]
        return np.array(rows, dtype=np.int64).reshape(len(rows), 2)


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # it is reported when the file is read
        return -1, -1
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class TarSplit(EncodedSplit):
    """Members of an uncompressed tar archive.

    Attributes:
        offsets: int64 (N,), of each file's first byte.
        lengths: int64 (N,), bytes of each file.
    """

    offsets: Integers
    lengths: Integers

    def name(self, index: int) -> str:
        return printable(f"{self.place}:{self.names[index]}")

    def read(self, index: int) -> bytes:
        length = int(self.lengths[index])
        self._check_size(index, length)
        with self.place.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, int(self.offsets[index]))
        if len(data) != length:
            raise DataError(f"{self.name(index)} is cut: the archive ended within it")
        return data

    def states(self) -> Integers:
        """Sizes, and size and time of change of the archive, mixed into one number."""
        status = self.place.stat()
        version = np.full(len(self), status.st_mtime_ns ^ status.st_size, dtype=np.int64)
        return np.stack([self.lengths, version], axis=1)


@dataclass(frozen=True)
class ZipSplit(EncodedSplit):
    """Members of a ZIP archive, stored or deflated.

    Attributes:
        offsets: int64 (N,), of the header before each member.
        packed: int64 (N,), bytes of each member in the archive.
        lengths: int64 (N,), bytes of each file.
        checksums: int64 (N,), CRC-32 of each file.
        deflated: bool (N,), False where a member is stored as it is.
    """

    offsets: Integers
    packed: Integers
    lengths: Integers
    checksums: Integers
    deflated: npt.NDArray[np.bool_]

    def name(self, index: int) -> str:
        return printable(f"{self.place}:{self.names[index]}")

    def read(self, index: int) -> bytes:
        offset, packed, length = (
            int(array[index]) for array in (self.offsets, self.packed, self.lengths)
        )
        with self.place.open("rb", buffering=0) as file:
            header = os.pread(file.fileno(), _ZIP_HEADER_BYTES, offset)
            if len(header) < _ZIP_HEADER_BYTES or header[:4] != b"PK\x03\x04":
                raise DataError(f"{self.name(index)} is not where the archive says: a damaged file")
            # Lengths of the member's name and of its extra field, which lie before its data.
            before = int.from_bytes(header[26:28], "little") + int.from_bytes(
                header[28:30], "little"
            )
            data = os.pread(file.fileno(), packed, offset + _ZIP_HEADER_BYTES + before)
        if self.deflated[index]:
            data = self._inflate(index, data, length)
        if len(data) != length:
            raise DataError(f"{self.name(index)} is not of the {length:,} bytes that it announces")
        if zlib.crc32(data) != self.checksums[index]:
            raise DataError(f"{self.name(index)} is damaged: its CRC is not that of the archive")
        return data

    def _inflate(self, index: int, data: bytes, length: int) -> bytes:
        try:
            # One byte more than announced is enough to tell a member that is larger.
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length + 1)
        except zlib.error as error:
            raise DataError(f"{self.name(index)} is damaged: {error}") from None

    def states(self) -> Integers:
        """Sizes and CRCs."""
        return np.stack([self.lengths, self.checksums], axis=1)


@dataclass(frozen=True)
class Raw:
    """A data set where it lies, not yet decoded.

    Attributes:
        splits: ``train`` and ``test``.
        class_names: for people, in the order of the labels.
        class_ids: names of the class folders; ``class_names`` where there are none.
        notes: worth telling, one line each.
    """

    splits: Mapping[str, ArraySplit | EncodedSplit]
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What a reader is asked for.

    Attributes:
        dataset: the row.
        place: folder or archive with the raw files; never written to, but for a download.
        scratch: an existing, empty folder for unpacked files.
        check: compare files with the published checksums.
        tell: progress.
    """

    dataset: Dataset
    place: Path
    scratch: Path
    check: bool
    tell: Progress
