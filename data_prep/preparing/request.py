"""What is asked of ``prepare``: checked, and given the folder where its answer lies."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

from data_prep import sources
from data_prep.beton import PAGE_BYTES
from data_prep.datasets import DataError, Dataset, Storage, get_dataset
from data_prep.manifest import digest_of, make_spec
from data_prep.preparing.writing import ARRAY_PAGE_BYTES
from data_prep.raw.splits import Progress, Raw

#: Stored bytes of a pixel, for a guess that reads no image: JPEG at quality 90 on photographs.
_JPEG_BYTES_PER_PIXEL = 0.35


class Wanted(TypedDict, total=False):
    """Which images are to be prepared: arguments of ``prepare`` and ``plan``.

    Attributes:
        prepared: folder of prepared data sets.
        root: folder of raw data sets; default TERNFORGE_DATA, else ``data``.
        raw: the data set's own raw folder or archive, instead of ``<root>/<name>``.
        synthetic: made-up images (train, test), at least 1 each, in the shape of the data set
            instead of its own.
        storage: how images of many sizes are kept; default as the row says.
        max_per_class: take only the first so many images of each class; the bad ones among them
            are not replaced by others.
        check_raw: compare raw files with their published checksums; default true.
    """

    prepared: Required[Path]
    root: Path | None
    raw: Path | None
    synthetic: tuple[int, int] | None
    storage: Storage | None
    max_per_class: int | None
    check_raw: bool


@dataclass(frozen=True)
class Request:
    """What is to be prepared, and from where to where.

    Attributes:
        row: the data set.
        storage: how encoded images are kept; None for arrays.
        synthetic: made-up images (train, test) instead of its own.
        max_per_class: take only the first so many images of each class, bad ones included.
        check_raw: compare raw files with their published checksums.
        place: of the raw files.
        spec: all that decides what is in the prepared files, see ``manifest.make_spec``.
        folder: of the prepared files, named after the spec.
        raw: the opened raw files, where they had to be looked at to know the spec.
    """

    row: Dataset
    storage: Storage | None
    synthetic: tuple[int, int] | None
    max_per_class: int | None
    check_raw: bool
    place: Path
    spec: dict[str, Any]
    folder: Path
    raw: Raw | None


def make_request(
    dataset: str | Dataset,
    tell: Progress,
    *,
    prepared: Path,
    root: Path | None = None,
    raw: Path | None = None,
    synthetic: tuple[int, int] | None = None,
    storage: Storage | None = None,
    max_per_class: int | None = None,
    check_raw: bool = True,
) -> Request:
    """Check what is wanted, see ``Wanted``, and find the folder that it stands for.

    Raises:
        DataError: for an unknown data set and for settings that are wrong or have no effect.
    """
    row = get_dataset(dataset) if isinstance(dataset, str) else dataset
    _check_settings(row, synthetic, storage, max_per_class)
    storage = None if synthetic else storage or row.storage
    place = sources.raw_place(row, root, raw)
    opened, identity = None, None
    if synthetic is None and row.reader == "class_folders" and not row.downloads:
        # Nobody published what a user's own folder holds: its listing says which one it is.
        with tempfile.TemporaryDirectory() as scratch:
            opened = sources.open_raw(
                row, place, Path(scratch), max_per_class=max_per_class, tell=tell
            )
        identity = {"name": place.resolve().name, "listing": sources.listing_digest(opened)}
    elif synthetic is None and raw is not None:
        identity = {"path": str(place.resolve())}
    spec = make_spec(
        row,
        storage=storage,
        synthetic=synthetic,
        max_per_class=max_per_class,
        raw=identity,
        checked=check_raw or not any(file.md5 for file in row.downloads),
    )
    folder = prepared / f"{row.name}-{digest_of(spec)[:10]}"
    return Request(row, storage, synthetic, max_per_class, check_raw, place, spec, folder, opened)


def _check_settings(
    row: Dataset,
    synthetic: tuple[int, int] | None,
    storage: Storage | None,
    max_per_class: int | None,
) -> None:
    if synthetic is not None and min(synthetic) < 1:
        raise DataError(f"cannot generate {synthetic} images: each split needs at least 1")
    if synthetic is not None and row.classes is None:
        raise DataError(f"cannot generate images of {row.name}: it has no classes of its own")
    if max_per_class is not None and max_per_class < 1:
        raise DataError(f"data.max_per_class={max_per_class}: at least 1 is needed")
    if storage is None:
        return
    if row.storage is None:
        raise DataError(
            f"side, format, quality and passthrough have no effect on {row.name}: its images are "
            f"small and kept pixel by pixel"
        )
    if storage.side is not None and storage.side < 32:
        raise DataError(f"data.side={storage.side}: at least 32 pixels are needed")
    if storage.format not in ("jpg", "raw", "mixed"):
        raise DataError(f"unknown data.format={storage.format!r}: valid are jpg, raw, mixed")
    if not 10 <= storage.quality <= 100:
        raise DataError(f"data.quality={storage.quality}: valid are 10 to 100")


def expected_counts(request: Request) -> dict[str, int]:
    """Images of each split, as far as is known without reading them."""
    if request.synthetic is not None:
        return dict(zip(("train", "test"), request.synthetic, strict=True))
    if request.raw is not None:
        return {name: len(split) for name, split in request.raw.splits.items()}
    counts, limit = request.row.counts, request.max_per_class
    if limit is None or request.row.classes is None:
        return dict(counts)
    return {name: min(count, limit * request.row.classes) for name, count in counts.items()}


def expected_bytes(request: Request, count: int) -> int:
    """About how large the file of ``count`` images is, guessed without reading one."""
    row, storage = request.row, request.storage
    if storage is None:
        image, page, row_bytes = row.image_size**2 * row.channels, ARRAY_PAGE_BYTES, 24
    else:
        # Most photographs have sides of 4 to 3.
        pixels = (storage.side or row.image_size) ** 2 * 3 / 4
        jpeg = {"jpg": 1.0, "mixed": 0.5, "raw": 0.0}[storage.format]
        image = int(pixels * (jpeg * _JPEG_BYTES_PER_PIXEL + (1 - jpeg) * 3))
        page, row_bytes = PAGE_BYTES, 40
    pages = -(-count // max(1, page // image)) + -(-(3200 + count * row_bytes) // page)
    return pages * page + count * 24
