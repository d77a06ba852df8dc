"""Raw data set to verified files with a manifest: all there and right, or not there at all."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import Value
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np

from data_prep.datasets import DataError, Dataset, get_dataset, one_line_for_os_errors
from data_prep.manifest import MANIFEST_NAME, Manifest, PreparedFile, digest_of, make_spec
from data_prep.sources import Split, data_root, generate, read

#: Called as progress(stage, done, total).
Progress = Callable[[str, int, int], None]

BACKENDS = ("ffcv", "torch")

#: FFCV's smallest page; one image never crosses a page.
_PAGE_BYTES = 1 << 21

#: Up to this size every pixel is read back, above it this many images, evenly spread.
_FULLY_VERIFIED_BYTES = 1 << 28
_VERIFIED_SAMPLES = 1024

_VERIFY_BATCH = 500


@dataclass(frozen=True)
class Plan:
    """What ``prepare`` would do.

    Attributes:
        folder: where the prepared files are or would be.
        files: name to size in bytes, exact but for a few bytes of header.
        ready: whether they are there already, in full size.
        source: where the images come from, as a line of text.
    """

    folder: Path
    files: dict[str, int]
    ready: bool
    source: str


def plan(
    dataset: str | Dataset,
    *,
    root: Path | None = None,
    prepared: Path,
    backend: str = "ffcv",
    synthetic: tuple[int, int] | None = None,
) -> Plan:
    """Say what ``prepare`` with the same arguments would do; nothing is written.

    Raises:
        DataError: for an unknown data set or backend, a manifest that does not hold, or a folder
            that cannot be looked into.
    """
    row, spec, folder = _resolve(dataset, prepared, backend, synthetic)
    with one_line_for_os_errors(f"cannot prepare {row.name}", folder):
        if folder.exists():
            manifest = Manifest.read(folder)
            entries = [file for files in manifest.files.values() for file in files]
            for entry in entries:
                entry.check_size(folder)
            sizes = {entry.name: entry.bytes for entry in entries}
            return Plan(folder, sizes, True, "prepared files")
        source = _source_line(row, root, synthetic)
    sizes = {}
    for split, count in spec["counts"].items():
        for name, size in _expected_sizes(split, count, spec["image_shape"], backend).items():
            sizes[name] = size
    return Plan(folder, sizes, False, source)


def _expected_sizes(split: str, count: int, shape: list[int], backend: str) -> dict[str, int]:
    image = shape[0] * shape[1] * shape[2]
    if backend == "torch":
        return {f"{split}-images.npy": count * image + 128, f"{split}-labels.npy": count * 8 + 128}
    pages = -(-count // (_PAGE_BYTES // image)) + -(-count * 16 // _PAGE_BYTES)
    return {f"{split}.beton": pages * _PAGE_BYTES + count * 24}


def _source_line(row: Dataset, root: Path | None, synthetic: tuple[int, int] | None) -> str:
    if synthetic is not None:
        return "generated images"
    if not row.raw_files:
        return "an installed package"
    folder = data_root(root) / row.name
    present = [
        (folder / name).exists() or (folder / name).with_suffix("").exists()
        for name in row.raw_files
    ]
    if all(present):
        return str(folder)
    return f"a download of {row.raw_bytes / 1e6:.0f} MB to {folder}"


def prepare(
    dataset: str | Dataset,
    *,
    root: Path | None = None,
    prepared: Path,
    backend: str = "ffcv",
    synthetic: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make the prepared files of a data set, or check those that are there.

    The files are written into a folder beside the final one, read back, compared with the source,
    and renamed into place with their manifest in one step. So a killed run leaves nothing that
    could be taken for whole, and the next one starts afresh. Two runs at once: one works, the
    other waits for it.

    Args:
        dataset: name or row.
        root: folder of raw data sets; default TERNFORGE_DATA, else ``data``.
        prepared: folder of prepared data sets.
        backend: ``ffcv`` (``.beton`` files) or ``torch`` (``.npy`` files, for machines without
            FFCV); both give the same batches.
        synthetic: made-up images (train, test), at least 1 each, in the shape of the data set
            instead of its own.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        DataError: one line, when raw data are missing or damaged, prepared files are not what the
            manifest says, or nothing can be written.
    """
    row, spec, folder = _resolve(dataset, prepared, backend, synthetic)
    tell = progress or _silent
    with one_line_for_os_errors(f"cannot prepare {row.name}", folder.parent):
        if folder.exists():
            return _checked(folder, spec, tell)
        with _only_one(folder, row.name, tell):
            if folder.exists():
                return _checked(folder, spec, tell)
            partial = folder.with_name(f"{folder.name}.partial")
            if partial.exists():
                shutil.rmtree(partial)
            try:
                partial.mkdir()
                _write_all(row, spec, root, partial, tell)
                partial.rename(folder)
                _sync(folder.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return Manifest.read(folder)


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _resolve(
    dataset: str | Dataset, prepared: Path, backend: str, synthetic: tuple[int, int] | None
) -> tuple[Dataset, dict[str, Any], Path]:
    row = get_dataset(dataset) if isinstance(dataset, str) else dataset
    if backend not in BACKENDS:
        raise DataError(f"unknown data backend {backend!r}: valid are {', '.join(BACKENDS)}")
    if synthetic is not None and min(synthetic) < 1:
        raise DataError(f"cannot generate {synthetic} images: each split needs at least 1")
    spec = make_spec(row, backend, synthetic)
    return row, spec, prepared / f"{row.name}-{digest_of(spec)[:10]}"


def _checked(folder: Path, spec: dict[str, Any], tell: Progress) -> Manifest:
    tell("check", 0, 1)
    manifest = Manifest.read(folder)
    manifest.check(spec)
    tell("check", 1, 1)
    return replace(manifest, reused=True)


@contextmanager
def _only_one(folder: Path, name: str, tell: Progress) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"wait for the process that prepares {name}", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_all(
    row: Dataset, spec: dict[str, Any], root: Path | None, partial: Path, tell: Progress
) -> None:
    tell("read", 0, 1)
    if spec["reader"] == "synthetic":
        splits = generate(row, (spec["counts"]["train"], spec["counts"]["test"]))
    else:
        scratch = partial / "raw"
        scratch.mkdir()
        splits = read(row, root, scratch)
        shutil.rmtree(scratch)
    tell("read", 1, 1)

    write = _write_beton if spec["backend"] == "ffcv" else _write_arrays
    files = {}
    for name, split in splits.items():
        paths = write(partial, name, split, tell)
        for path in paths:
            _sync(path)
        files[name] = [PreparedFile.measure(path) for path in paths]
    classes = len(row.class_names)
    manifest = Manifest(
        folder=partial,
        spec=spec,
        files=files,
        class_histogram={
            name: np.bincount(split.labels, minlength=classes).tolist()
            for name, split in splits.items()
        },
        fingerprint=_fingerprint(splits),
        versions={tool: version(tool) for tool in ("numpy", spec["backend"])},
    )
    for name, split in splits.items():
        _verify(manifest, name, split, tell)
    path = partial / MANIFEST_NAME
    path.write_text(manifest.to_json())
    _sync(path)
    _sync(partial)


def _write_arrays(folder: Path, name: str, split: Split, tell: Progress) -> list[Path]:
    images, labels = folder / f"{name}-images.npy", folder / f"{name}-labels.npy"
    tell(f"write {name}", 0, len(split.labels))
    for path, array in ((images, split.images), (labels, split.labels)):
        # Not numpy.save: on a full disk its error does not say so.
        with path.open("wb") as file:
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(array.data)
    tell(f"write {name}", len(split.labels), len(split.labels))
    return [images, labels]


class _Chunks:
    """The queue that FFCV's writer takes its work from; what was taken is reported."""

    def __init__(self, count: int, report: Callable[[int, int], None], size: int = 1000) -> None:
        self._count, self._report, self._size = count, report, size
        self._next = 0

    def get(self) -> list[tuple[int, int]] | None:
        self._report(self._next, self._count)
        chunk = range(self._next, min(self._next + self._size, self._count))
        self._next += len(chunk)
        return [(index, index) for index in chunk] or None


def _write_beton(folder: Path, name: str, split: Split, tell: Progress) -> list[Path]:
    """Write a ``.beton`` with FFCV's writer, in this process.

    ``DatasetWriter.from_indexed_dataset`` forks workers and waits for ever when one dies (a full
    disk is enough). Its steps are called here one by one instead, so that an error is raised.
    """
    from data_prep.loaders import ffcv_without_compiler

    with ffcv_without_compiler():
        from ffcv.fields import IntField, NDArrayField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter, worker_job_indexed_dataset

    path = folder / f"{name}.beton"
    fields = {
        "image": NDArrayField(np.dtype("uint8"), split.images.shape[1:]),
        "label": IntField(),
    }
    writer = DatasetWriter(str(path), fields, page_size=_PAGE_BYTES, num_workers=1)
    writer.num_samples = len(split.labels)
    writer.prepare()
    # One process has nothing to share, and shared memory would outlive an error.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    rows = writer.num_samples * writer.metadata_type.itemsize
    writer.metadata_sm = SimpleNamespace(buf=bytearray(rows))
    allocations: SimpleQueue[list[tuple[int, int, int]]] = SimpleQueue()
    worker_job_indexed_dataset(
        _Chunks(writer.num_samples, lambda done, total: tell(f"write {name}", done, total)),
        writer.metadata_sm,
        writer.metadata_type,
        fields,
        MemoryAllocator(str(path), writer.data_region_start, writer.page_size),
        Value(ctypes.c_uint64),
        allocations,
        list(zip(split.images, split.labels.tolist(), strict=True)),
    )
    writer.finalize(allocations.get())
    return [path]


def _verify(manifest: Manifest, name: str, split: Split, tell: Progress) -> None:
    """Read a written split back, as training will, and compare it with its source."""
    from data_prep.loaders import open_split

    reader = open_split(manifest, name, _VERIFY_BATCH)
    where = manifest.folder / manifest.files[name][0].name
    if not np.array_equal(reader.labels, split.labels):
        raise DataError(f"{where}: the labels read back are not those that were written")
    count = len(split.labels)
    if split.images.nbytes > _FULLY_VERIFIED_BYTES:
        order = np.linspace(0, count - 1, _VERIFIED_SAMPLES).astype(np.int64)
    else:
        order = np.arange(count)
    done = 0
    for images in reader.read(order):
        tell(f"verify {name}", done, len(order))
        chosen = order[done : done + len(images)]
        if not np.array_equal(images, split.images[chosen]):
            raise DataError(
                f"{where}: images {chosen[0]} to {chosen[-1]} read back are not those written"
            )
        done += len(images)
    if done != len(order):
        raise DataError(f"{where}: {done} images could be read back instead of {len(order)}")
    tell(f"verify {name}", done, len(order))


def _fingerprint(splits: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for name in sorted(splits):
        images, labels = splits[name]
        digest.update(f"{name} {images.shape}".encode())
        digest.update(labels.astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
