"""FFCV's file format, version 2: written page by page, its index read with NumPy alone.

A ``.beton`` file is a header, a description of the fields, a table with one row per sample, the
data in pages of equal size, and at the end a table of the allocations. FFCV's own reader opens
the files; its writer is not used, because it waits for ever when one of its processes dies, and
because its layout depends on which process was faster. This one writes the samples in the order
in which they come: the same samples give the same file, byte for byte.

Each sample has three fields: ``image`` (FFCV's RGB image field where sizes differ, an array field
for arrays of one shape), ``label``, and ``checksum`` of the image's stored bytes, so that a reader
can tell a damaged image from a good one.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from data_prep.datasets import DataError

Bytes = npt.NDArray[np.uint8]

#: The smallest page that FFCV allows is 2 MiB, its default is 8 MiB.
PAGE_BYTES = 8 << 20

#: How an image's bytes are to be read; FFCV's numbers.
JPG, RAW = 0, 1

_VERSION = 2
_INT_FIELD, _RGB_FIELD, _ARRAY_FIELD = 1, 2, 4

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_RGB_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])


def _row_type(image: np.dtype) -> np.dtype:
    return np.dtype([("", image), ("", "<i8"), ("", "<i8")], align=True)


_RGB_ROW, _ARRAY_ROW = _row_type(_RGB_IMAGE), _row_type(np.dtype("<u8"))


@functools.lru_cache(maxsize=4)
def checksum_keys(count: int) -> npt.NDArray[np.uint32]:
    """The first ``count`` 32-bit keys of ``checksum``, an even number: outputs of SplitMix64."""
    state = np.arange(1, count // 2 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))).astype("<u8").view("<u4")


def checksum(data: Bytes) -> int:
    """64-bit hash of stored bytes: NH of UMAC (Black et al., CRYPTO 1999) with fixed keys.

    With 32-bit words m and keys k, the sum of (m[0] + k[0])(m[1] + k[1]) + (m[2] + k[2])(m[3] +
    k[3]) + ... modulo 2**64, each inner sum modulo 2**32; then exclusive or with the length. Two
    different texts of one length collide with a probability of 2**-32. It costs a tenth of a CRC,
    which matters for images that are not compressed.

    Args:
        data: uint8 (N,); zeros complete the last 8 bytes.
    """
    words = np.zeros(-(-len(data) // 8) * 2, dtype="<u4")
    words.view(np.uint8)[: len(data)] = data
    # Powers of two, so that few tables of keys are made; a longer one begins like a shorter.
    words += checksum_keys(1 << max(len(words), 2).bit_length())[: len(words)]
    pairs = words.astype(np.uint64)
    return int((pairs[0::2] * pairs[1::2]).sum(dtype=np.uint64)) ^ len(data)


class BetonWriter:
    """Writes a ``.beton`` file, sample by sample; a context manager.

    Args:
        path: of the new file.
        capacity: most samples that will come; room for their table is kept at the front.
        shape: height, width and channels of all samples where they are arrays of one shape; None
            for images of many sizes.
        page_bytes: a power of two, at least 2 MiB; no sample may be larger.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        *,
        shape: tuple[int, int, int] | None = None,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        self.path = path
        self.count = 0
        self._shape, self._page_bytes = shape, page_bytes
        self._rows = np.zeros(capacity, dtype=_RGB_ROW if shape is None else _ARRAY_ROW)
        self._allocations = np.zeros(capacity, dtype=_ALLOCATION)
        fields = _HEADER.itemsize + 3 * _FIELD.itemsize
        self._position = -(-(fields + self._rows.nbytes) // page_bytes) * page_bytes
        self._file = path.open("wb")
        self._file.seek(self._position)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._file.close()

    def append(
        self, label: int, data: Bytes, height: int = 0, width: int = 0, mode: int = RAW
    ) -> None:
        """Write one sample.

        Args:
            label: class.
            data: uint8 (N,), the stored bytes: a JPEG, or the pixels row by row.
            height: in pixels; like width and mode only of images of many sizes.
            width: in pixels.
            mode: ``JPG`` or ``RAW``.

        Raises:
            DataError: when the image is larger than a page.
        """
        size = len(data)
        if size > self._page_bytes:
            raise DataError(f"an image of {size:,} bytes does not fit a page of {self._page_bytes}")
        left = -self._position % self._page_bytes
        if size > left:
            self._file.seek(left, 1)
            self._position += left
        row = self._rows[self.count]
        row["f0"] = (mode, width, height, self._position) if self._shape is None else self._position
        row["f1"], row["f2"] = label, np.uint64(checksum(data)).astype(np.int64)
        self._allocations[self.count] = (self.count, self._position, size)
        self._file.write(data.data)
        self._position += size
        self.count += 1

    def _finish(self) -> None:
        end = -(-self._position // self._page_bytes) * self._page_bytes
        self._file.seek(end)
        self._file.write(self._allocations[: self.count].tobytes())
        header = np.zeros((), dtype=_HEADER)
        header["version"], header["num_fields"] = _VERSION, 3
        header["page_size"], header["num_samples"] = self._page_bytes, self.count
        header["alloc_table_ptr"] = end
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.write(self._fields().tobytes())
        self._file.write(self._rows.tobytes())
        self._file.flush()

    def _fields(self) -> npt.NDArray[np.void]:
        fields = np.zeros(3, dtype=_FIELD)
        kind = _RGB_FIELD if self._shape is None else _ARRAY_FIELD
        kinds = {"image": kind, "label": _INT_FIELD, "checksum": _INT_FIELD}
        for field, (name, type_id) in zip(fields, kinds.items(), strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
        if self._shape is not None:
            fields[0]["arguments"][:] = _array_arguments(self._shape)
        return fields


def _array_arguments(shape: tuple[int, int, int]) -> Bytes:
    described = json.dumps(np.dtype("uint8").descr).encode()
    arguments = np.zeros((), dtype=_ARRAY_ARGUMENTS)
    arguments["shape"][: len(shape)] = shape
    arguments["type_length"] = len(described)
    packed = np.frombuffer(arguments.tobytes() + described, dtype=np.uint8)
    return np.concatenate([packed, np.zeros(1024 - len(packed), dtype=np.uint8)])


@dataclass(frozen=True)
class Index:
    """Where each of the N samples of a file is, and what it is.

    Attributes:
        path: of the file.
        page_bytes: size of its pages.
        shape: of all samples where they are arrays of one shape, else None.
        labels: int64 (N,).
        checksums: uint64 (N,), of the stored bytes.
        pointers: uint64 (N,), of the first byte in the file.
        sizes: uint64 (N,), stored bytes.
        heights: int32 (N,), in pixels.
        widths: int32 (N,), in pixels.
        modes: uint8 (N,), ``JPG`` or ``RAW``.
    """

    path: Path
    page_bytes: int
    shape: tuple[int, int, int] | None
    labels: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint64]
    pointers: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    modes: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return 3 if self.shape is None else self.shape[2]


def read_index(path: Path) -> Index:
    """Read what a ``.beton`` file says of its samples.

    Raises:
        DataError: when it is no file of this format, or was cut.
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER.itemsize + 3 * _FIELD.itemsize)
        if len(head) < _HEADER.itemsize + 3 * _FIELD.itemsize:
            raise DataError(f"{path} is no .beton file: it ends in its header")
        header = np.frombuffer(head, dtype=_HEADER, count=1)[0]
        if header["version"] != _VERSION or header["num_fields"] != 3:
            raise DataError(f"{path} is no .beton file with the fields image, label, checksum")
        fields = np.frombuffer(head, dtype=_FIELD, count=3, offset=_HEADER.itemsize)
        shape = _shape(fields[0]) if fields[0]["type_id"] == _ARRAY_FIELD else None
        count, row_type = int(header["num_samples"]), _RGB_ROW if shape is None else _ARRAY_ROW
        table = int(header["alloc_table_ptr"])
        size = os.fstat(file.fileno()).st_size
        if table + count * _ALLOCATION.itemsize != size or count * row_type.itemsize > size:
            raise DataError(f"{path} has {size:,} bytes, which is not what its header announces")
        rows = np.fromfile(file, dtype=row_type, count=count)
        file.seek(table)
        allocations = np.fromfile(file, dtype=_ALLOCATION, count=count)
    image = rows["f0"]
    if shape is None:
        pointers, heights, widths = image["data_ptr"], image["height"], image["width"]
        modes = image["mode"].copy()
    else:
        pointers = image
        heights, widths = np.full(count, shape[0]), np.full(count, shape[1])
        modes = np.full(count, RAW, dtype=np.uint8)
    if not np.array_equal(pointers, allocations["ptr"]):
        raise DataError(f"{path} does not say where its samples are: its two tables differ")
    return Index(
        path=path,
        page_bytes=int(header["page_size"]),
        shape=shape,
        labels=rows["f1"].astype(np.int64),
        checksums=rows["f2"].astype(np.int64).view(np.uint64),
        pointers=pointers.astype(np.uint64),
        sizes=allocations["size"].astype(np.uint64),
        heights=heights.astype(np.int32),
        widths=widths.astype(np.int32),
        modes=modes,
    )


def _shape(field: np.void) -> tuple[int, int, int]:
    arguments = field["arguments"][: _ARRAY_ARGUMENTS.itemsize].view(_ARRAY_ARGUMENTS)[0]
    height, width, channels = (int(size) for size in arguments["shape"][:3])
    return height, width, channels
