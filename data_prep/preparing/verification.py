"""A written file compared with its source, before anybody is shown it.

Quick to import: each worker process does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from data_prep.beton import RAW, Bytes, Index, checksum, read_index
from data_prep.datasets import DataError, Storage
from data_prep.preparing.images import (
    BadImage,
    Pixels,
    decode,
    decode_jpeg,
    has_strict_decoder,
    reduced_size,
)
from data_prep.preparing.workers import Workers
from data_prep.preparing.writing import Written, read_image
from data_prep.raw.splits import ArraySplit, EncodedSplit, Progress

#: Largest root mean square difference, in gray levels, between the thumbnails of a stored image
#: and of its source. Measured on 550 photographs: below 1 at most settings, 12 at the worst that
#: are allowed (32 pixels, quality 10); between two different photographs 66 to 73 on average,
#: and more than 18 in 999 of 1,000 pairs.
_TOLERANCE = 14.0
_THUMBNAIL_SIDE = 4

#: The same of all pixels, where none should have changed but for the decoder's rounding.
_EXACT_TOLERANCE = 1.0

#: Images of a split that are decoded at least, spread over it; one of every page in any case.
_DECODED = 64


def verify_arrays(written: Written, split: ArraySplit, name: str, tell: Progress) -> None:
    """Read every image of a file back and compare it with its source.

    Raises:
        DataError: at the first difference.
    """
    index = _checked_index(written)
    if index.shape != split.images.shape[1:]:
        raise DataError(f"{written.path}: the images have another shape than those written")
    tell(f"verify {name}", 0, len(index))
    for first, last in _pages(index):
        data = _page(index, first, last)
        images = np.ascontiguousarray(split.images[first:last]).reshape(last - first, -1)
        sums = [checksum(image) for image in images]
        if (
            not np.array_equal(data, images.reshape(-1))
            or sums != index.checksums[first:last].tolist()
        ):
            raise DataError(
                f"{written.path}: images {first} to {last - 1} read back are not those written"
            )
        tell(f"verify {name}", last, len(index))


def verify_files(
    written: Written,
    split: EncodedSplit,
    name: str,
    *,
    storage: Storage,
    workers: Workers,
    tell: Progress,
) -> None:
    """Read every image back, check its checksum, and compare some of every page with the source.

    Those are decoded from the file and from the source, the latter by Pillow alone, and must look
    the same.

    Raises:
        DataError: at the first difference.
    """
    index = _checked_index(written)
    tell(f"verify {name}", 0, len(index))
    done = 0
    for difference in workers.run(_check_page, _tasks(index, written, split, storage)):
        if isinstance(difference, str):
            raise DataError(f"{written.path}: {difference}")
        done += difference
        tell(f"verify {name}", done, len(index))


def _checked_index(written: Written) -> Index:
    index = read_index(written.path)
    if not np.array_equal(index.labels, written.labels):
        raise DataError(f"{written.path}: the labels read back are not those that were written")
    return index


def _pages(index: Index) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) image of each page."""
    pages = index.pointers // np.uint64(index.page_bytes)
    borders = np.flatnonzero(np.diff(pages)) + 1
    yield from zip([0, *borders.tolist()], [*borders.tolist(), len(index)], strict=True)


def _page(index: Index, first: int, last: int) -> Bytes:
    start = int(index.pointers[first])
    end = int(index.pointers[last - 1] + index.sizes[last - 1])
    with index.path.open("rb") as file:
        file.seek(start)
        return np.fromfile(file, dtype=np.uint8, count=end - start)


@dataclass(frozen=True)
class _Task:
    """The images of a page, the number of the first one, and those that are compared: their
    numbers within the page, and their sources."""

    index: Index
    first: int
    chosen: list[int]
    sources: EncodedSplit
    storage: Storage


def _tasks(
    index: Index, written: Written, split: EncodedSplit, storage: Storage
) -> Iterator[_Task]:
    spread = np.linspace(0, len(index) - 1, _DECODED).astype(np.int64)
    for first, last in _pages(index):
        chosen = np.unique(spread[(spread >= first) & (spread < last)])
        if len(chosen) == 0:
            chosen = np.asarray([(first + last) // 2])
        sources = split.take(written.positions[chosen])
        yield _Task(_part(index, first, last), first, (chosen - first).tolist(), sources, storage)


def _part(index: Index, first: int, last: int) -> Index:
    tables: dict[str, Any] = {
        key: value[first:last]
        for key, value in vars(index).items()
        if isinstance(value, np.ndarray)
    }
    return replace(index, **tables)


def _check_page(task: _Task) -> int | str:
    """How many images were checked, or what is wrong."""
    index = task.index
    data = _page(index, 0, len(index))
    starts = (index.pointers - index.pointers[0]).astype(np.int64)
    images = [
        data[start : start + size]
        for start, size in zip(starts.tolist(), index.sizes.tolist(), strict=True)
    ]
    for number, image in enumerate(images):
        if checksum(image) != index.checksums[number]:
            return f"image {task.first + number} read back is not the one that was written"
    for place, number in enumerate(task.chosen):
        source = task.sources.name(place)
        try:
            is_right = _looks_like(images[number], index, number, task.sources, place, task.storage)
        except BadImage as error:
            return (
                f"image {task.first + number} cannot be compared with its source {source}: {error}"
            )
        if not is_right:
            return f"image {task.first + number} does not look like its source {source}"
    return len(index)


def _looks_like(
    stored: Bytes, index: Index, number: int, sources: EncodedSplit, place: int, storage: Storage
) -> bool:
    content = read_image(sources, place)
    source = decode(content)
    height, width = int(index.heights[number]), int(index.widths[number])
    if (height, width) != reduced_size(source.shape[0], source.shape[1], storage.side):
        return False
    if index.modes[number] == RAW:
        if len(stored) != height * width * 3:
            return False
        pixels = stored.reshape(height, width, 3)
        if pixels.shape == source.shape:
            return _difference(pixels, source) <= _EXACT_TOLERANCE
        return _looks_alike(pixels, source)
    if stored.tobytes() == content:
        return True
    if has_strict_decoder():
        decode_jpeg(stored.tobytes(), width, height)
    return _looks_alike(decode(stored.tobytes()), source)


def _looks_alike(stored: Pixels, source: Pixels) -> bool:
    """Whether the thumbnails of two images are alike; a thin image has fewer pixels to compare."""
    height, width = (min(_THUMBNAIL_SIDE, size) for size in stored.shape[:2])
    one, other = (
        np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
        for pixels in (stored, source)
    )
    return _difference(one, other) <= _TOLERANCE


def _difference(one: Pixels, other: Pixels) -> float:
    """Root mean square of the differences, in gray levels."""
    return float(np.sqrt(np.mean((one.astype(np.float32) - other) ** 2)))
