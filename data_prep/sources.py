"""Where the raw images of a data set are, in whatever form: found, checked, listed, not decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.datasets import DataError, Dataset, one_line_for_os_errors
from data_prep.raw.arrays import read_cifar, read_digits, read_mnist, read_svhn
from data_prep.raw.class_folders import read_class_folders, read_tinyimagenet
from data_prep.raw.imagenet import read_imagenet
from data_prep.raw.names import is_shown, printable
from data_prep.raw.splits import (
    ArraySplit,
    EncodedSplit,
    FileSplit,
    Integers,
    Progress,
    Raw,
    Source,
    TarSplit,
    ZipSplit,
    unwatched,
)
from data_prep.raw.stamps import stamp

__all__ = [
    "READERS",
    "ArraySplit",
    "EncodedSplit",
    "FileSplit",
    "Progress",
    "Raw",
    "TarSplit",
    "ZipSplit",
    "check_place",
    "describe_place",
    "generate",
    "listing_digest",
    "look",
    "open_raw",
    "raw_place",
    "stamp",
]

READERS: dict[str, Callable[[Source], Raw]] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "cifar": read_cifar,
    "svhn": read_svhn,
    "tinyimagenet": read_tinyimagenet,
    "class_folders": read_class_folders,
    "imagenet": read_imagenet,
}


def raw_place(dataset: Dataset, root: Path | None, raw: Path | None) -> Path:
    """Where the raw files of a data set are looked for.

    Args:
        dataset: the row.
        root: folder of raw data sets; None for TERNFORGE_DATA, or else ``data``.
        raw: the files of this data set, a folder or an archive; goes before ``root``.

    Raises:
        DataError: when ``raw`` does not exist.
    """
    if raw is None:
        return (root or Path(os.environ.get("TERNFORGE_DATA") or "data")) / dataset.name
    if not raw.exists():
        raise DataError(f"data.raw: {raw} does not exist: {dataset.name} wants {dataset.raw}")
    return raw


def describe_place(dataset: Dataset, place: Path) -> str:
    """Where the images will come from, for people."""
    if dataset.reader == "digits":
        return "an installed package"
    if place.is_file() or any(map(_is_brought, place.rglob("*"))):
        return str(place)
    if not dataset.downloads:
        return f"{place}, where nothing is yet"
    size = sum(download.bytes for download in dataset.downloads)
    return f"a download{f' of {size / 1e6:,.0f} MB' if size else ''} to {place}"


def _is_brought(path: Path) -> bool:
    """Whether it is a file, or a link to some, but no trace of a download."""
    is_folder = path.is_dir() and not path.is_symlink()
    return is_shown(path.name) and not is_folder and not path.name.endswith((".part", ".part.json"))


def check_place(dataset: Dataset, place: Path) -> None:
    """Refuse a place that is not there and cannot be downloaded to, before anything is written.

    Raises:
        DataError: that says what has to lie where.
    """
    if not (dataset.downloads or dataset.reader == "digits" or place.exists()):
        raise DataError(f"{place} does not exist: {dataset.name} wants {dataset.raw}")


def open_raw(
    dataset: Dataset,
    place: Path,
    scratch: Path,
    *,
    check_raw: bool = True,
    max_per_class: int | None = None,
    tell: Progress,
) -> Raw:
    """Find the images of a data set and their labels; files that are missing are downloaded.

    Args:
        dataset: the row.
        place: as ``raw_place`` gives it; never written to, but for a download.
        scratch: an existing, empty folder for unpacked files.
        check_raw: compare files with the published checksums and counts, where there are any.
        max_per_class: take the first so many images of each class, by name.
        tell: progress.

    Raises:
        DataError: one line, when files are missing, are not what they should be, or cannot be
            read.
    """
    if max_per_class is not None and max_per_class < 1:
        raise DataError(f"max_per_class={max_per_class}: at least 1 image of each class is needed")
    with one_line_for_os_errors(f"cannot read {dataset.name}", place):
        raw = READERS[dataset.reader](Source(dataset, place, scratch, check_raw, tell))
    notes = list(raw.notes)
    for name, split in raw.splits.items():
        _check_labels(dataset, place, name, split.labels, len(raw.class_names))
        notes += _compare_count(dataset, name, split, check_raw)
        missing = sorted(set(range(len(raw.class_ids))) - set(split.labels.tolist()))
        if missing:
            example = printable(raw.class_ids[missing[0]])
            notes.append(f"no {name} images of {len(missing):,} classes, such as {example}")
    splits = raw.splits
    if max_per_class is not None:
        splits = {
            name: split.take(_first_of_each_class(split.labels, max_per_class))
            for name, split in splits.items()
        }
        notes.append(f"at most {max_per_class:,} images of each class")
    return replace(raw, splits=splits, notes=tuple(notes))


def _check_labels(
    dataset: Dataset, place: Path, split: str, labels: Integers, classes: int
) -> None:
    present = np.unique(labels)
    if len(present) < 2:
        found = "images of one class only" if len(present) else "no images"
        raise DataError(
            f"{place}: the {split} split of {dataset.name} has {found}: {dataset.name} wants "
            f"{dataset.raw}"
        )
    if present[0] < 0 or present[-1] >= classes:
        raise DataError(
            f"{place}: the {split} split of {dataset.name} has labels from {present[0]} to "
            f"{present[-1]}, not from 0 to {classes - 1}"
        )


def _compare_count(
    dataset: Dataset, name: str, split: ArraySplit | EncodedSplit, check_raw: bool
) -> list[str]:
    found, published = len(split), dataset.counts.get(name, len(split))
    if found == published:
        return []
    if check_raw and isinstance(split, ArraySplit):
        raise DataError(
            f"{dataset.name}: the {name} split has {found:,} images instead of {published:,}; take "
            "it as it is with data.check_raw=false"
        )
    return [f"{found:,} of the {published:,} {name} images of {dataset.name}"]


def _first_of_each_class(labels: Integers, count: int) -> Integers:
    """Positions, in rising order, of the first ``count`` labels of each kind."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.arange(len(labels)) - starts
    return np.sort(order[rank < count])


def look(dataset: Dataset, place: Path) -> Dataset:
    """The row with all that can be known of a user's own folder without opening an image.

    Classes and counts of a row without them are those of the files; other rows come back as they
    are.

    Raises:
        DataError: when the place does not have the layout that the row wants.
    """
    if dataset.classes is not None:
        return dataset
    with one_line_for_os_errors(f"cannot read {dataset.name}", place):
        # Files of a row without classes are read in place: nothing needs a scratch folder.
        raw = READERS[dataset.reader](Source(dataset, place, place, True, unwatched))
    counts = {name: len(split) for name, split in raw.splits.items()}
    names = raw.class_names
    return replace(dataset, classes=len(names), class_names=names, counts=counts)


def listing_digest(raw: Raw) -> str:
    """SHA-256, 64 hex digits, of all files, which are not read: names, labels, and states.

    The same files in another place have another digest where their times of change differ.

    Raises:
        DataError: when an archive cannot be looked at.
        TypeError: when the images are arrays.
    """
    digest = hashlib.sha256(os.fsencode("\0".join(raw.class_ids)))
    for name, split in sorted(raw.splits.items()):
        if isinstance(split, ArraySplit):
            raise TypeError(f"the {name} split is an array without files")
        with one_line_for_os_errors("cannot list the images", split.place):
            states = split.states()
        digest.update(f"\0\0{name}\0{len(split)}\0".encode())
        digest.update(os.fsencode("\0".join(split.names)))
        digest.update(split.labels.astype("<i8").tobytes())
        digest.update(states.astype("<i8").tobytes())
    return digest.hexdigest()


def generate(dataset: Dataset, counts: tuple[int, int]) -> dict[str, ArraySplit]:
    """Made-up images in the shape of a data set: a pattern for each class, under noise.

    A network learns them in a few steps, so that a smoke run can see its loss fall.

    Args:
        dataset: the row whose shape and classes are taken.
        counts: images for training and for testing.

    Raises:
        DataError: for a row whose classes are not known yet.
    """
    if dataset.classes is None:
        raise DataError(f"{dataset.name} has no classes of its own: look at its images first")
    size, channels = dataset.image_size, dataset.channels
    splits = {}
    for name, count in zip(("train", "test"), counts, strict=True):
        labels = np.arange(count, dtype=np.int64) % dataset.classes
        random = np.random.RandomState(len(name))
        images = random.randint(0, 64, (count, size, size, channels), dtype=np.uint8)
        cell = -(-size // 4)
        for label in np.unique(labels):
            pattern = np.random.RandomState(label).randint(0, 2, (4, 4, channels)) * 191
            pattern = pattern.repeat(cell, axis=0).repeat(cell, axis=1)[:size, :size]
            images[labels == label] += pattern.astype(np.uint8)
        splits[name] = ArraySplit(images, labels, name)
    return splits
