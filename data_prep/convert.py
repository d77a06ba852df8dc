"""Raw data set to verified files with a manifest: all there and right, or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
import PIL

from data_prep import sources
from data_prep.beton import PAGE_BYTES
from data_prep.datasets import DataError, Dataset, one_line_for_os_errors
from data_prep.locks import wait_for_disk
from data_prep.manifest import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    PreparedFile,
    digest_of,
)
from data_prep.preparing.folders import only_one, written_whole
from data_prep.preparing.images import has_strict_decoder, jpeg_decoder
from data_prep.preparing.request import (
    Request,
    Wanted,
    expected_bytes,
    expected_counts,
    make_request,
)
from data_prep.preparing.verification import verify_arrays, verify_files
from data_prep.preparing.workers import MAIN_GUARD, Workers, is_starting
from data_prep.preparing.writing import Written, estimate_bytes, write_arrays, write_files
from data_prep.raw.splits import ArraySplit, EncodedSplit, Progress, Raw, unwatched

#: Fewer images are faster done in this process than others are started.
_FEW = 1000

#: Of the estimated size, what has to be free beyond it.
_SPACE_MARGIN = 0.1


@dataclass(frozen=True)
class Plan:
    """What ``prepare`` would do.

    Attributes:
        folder: where the prepared files are or would be.
        files: name to size in bytes: exact if they are there, nearly so for arrays, else a guess
            from the number of images.
        ready: whether they are there already, in full size.
        source: where the images come from, as a line of text.
    """

    folder: Path
    files: dict[str, int]
    ready: bool
    source: str


def plan(dataset: str | Dataset, **wanted: Unpack[Wanted]) -> Plan:
    """Say what ``prepare`` with the same arguments would do; nothing is written.

    Raises:
        DataError: for an unknown data set, settings that have no effect on it, a manifest that
            does not hold, or a folder that cannot be looked into.
    """
    request = make_request(dataset, unwatched, **wanted)
    row, folder = request.row, request.folder
    with one_line_for_os_errors(f"cannot prepare {row.name}", folder):
        if folder.exists():
            manifest = Manifest.read(folder)
            for file in manifest.files.values():
                file.check_size(folder)
            sizes = {file.name: file.bytes for file in manifest.files.values()}
            return Plan(folder, sizes, True, "prepared files")
        source = (
            "generated images" if request.synthetic else sources.describe_place(row, request.place)
        )
    sizes = {
        f"{split}.beton": expected_bytes(request, count)
        for split, count in expected_counts(request).items()
    }
    return Plan(folder, sizes, False, source)


def prepare(
    dataset: str | Dataset,
    *,
    bad_share: float = 0.001,
    processes: int | None = None,
    progress: Progress | None = None,
    **wanted: Unpack[Wanted],
) -> Manifest:
    """Make the prepared files of a data set, or check those that are there.

    The files are written into a folder beside the final one, read back, compared with the source,
    and renamed into place with their manifest in one step. So a killed run leaves nothing that
    could be taken for whole, and the next one starts afresh. Two runs at once: one works, the
    other waits for it.

    Args:
        dataset: name or row.
        bad_share: of each split, the share of images that may be bad; those are left out and
            listed in the manifest. One bad image is allowed in any split, unless it is 0.
        processes: that decode and encode; default one for each core; no difference to the files.
            More than one need ``if __name__ == "__main__":`` in the script that calls this.
        progress: called as ``progress(stage, done, total)``.
        wanted: which images, from where to where: ``prepared``, and what else ``Wanted`` names.

    Raises:
        DataError: one line, when raw data are missing or damaged, too many images or all of a
            training class are bad, prepared files are not as written, or nothing can be written.
    """
    _check_work(bad_share, processes)
    tell, processes = progress or unwatched, processes or _cores()
    with _one_line_for_lack_of_memory(processes):
        request = make_request(dataset, tell, **wanted)
        return _prepared(request, bad_share, processes, tell)


def _check_work(bad_share: float, processes: int | None) -> None:
    if is_starting():
        raise DataError(MAIN_GUARD)
    if not 0 <= bad_share <= 1:
        raise DataError(f"data.bad_share={bad_share:g} is no share: it goes from 0 to 1")
    if processes is not None and processes < 1:
        raise DataError(f"data.processes={processes}: at least 1 is needed")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _one_line_for_lack_of_memory(processes: int) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise DataError(
            f"too little memory: try fewer data.processes (now {processes}), or a machine with more"
        ) from None


def _prepared(request: Request, bad_share: float, processes: int, tell: Progress) -> Manifest:
    """The manifest of the files that are there, or else are made now."""
    folder, name = request.folder, request.row.name
    with one_line_for_os_errors(f"cannot prepare {name}", folder.parent):
        if not folder.exists():
            if request.synthetic is None:
                sources.check_place(request.row, request.place)
            waits = partial(tell, f"wait for the process that prepares {name}", 0, 1)
            with only_one(folder, waits):
                if not folder.exists():
                    with written_whole(folder) as new:
                        _write_all(request, new, bad_share, processes, tell)
                    return Manifest.read(folder)
        return _checked(request, bad_share, tell)


def _checked(request: Request, bad_share: float, tell: Progress) -> Manifest:
    tell("check", 0, 1)
    manifest = Manifest.read(request.folder)
    manifest.check(request.spec)
    manifest.check_bad_share(bad_share)
    tell("check", 1, 1)
    notes = manifest.notes
    stamp = sources.stamp(request.place) if manifest.raw_stamp else ""
    if stamp and stamp != manifest.raw_stamp:
        notes += (
            f"the raw files in {request.place} are not those that were prepared: delete "
            f"{request.folder} to prepare them anew",
        )
    return replace(manifest, notes=notes, reused=True)


def _write_all(
    request: Request, folder: Path, bad_share: float, processes: int, tell: Progress
) -> None:
    scratch = folder / "raw"
    scratch.mkdir()
    raw = request.raw or _open(request, scratch, tell)
    # Where files had to be listed to know the spec, the spec itself says which ones they are.
    is_known = request.raw is not None or request.synthetic is not None
    stamp = "" if is_known else sources.stamp(request.place)
    if max(len(split) for split in raw.splits.values()) < _FEW:
        processes = 1
    written, notes = {}, raw.notes
    with Workers(processes) as workers:
        _check_space(request, raw, folder, workers, tell)
        for name, split in raw.splits.items():
            written[name] = _write_split(request, name, split, folder, bad_share, workers, tell)
            notes += _lost_classes(raw, name, written[name])
    shutil.rmtree(scratch)
    manifest = _describe(request, replace(raw, notes=notes), stamp, written, folder)
    path = folder / MANIFEST_NAME
    path.write_text(manifest.to_json())
    wait_for_disk(path)


def _open(request: Request, scratch: Path, tell: Progress) -> Raw:
    row = request.row
    if request.synthetic is not None:
        splits = sources.generate(row, request.synthetic)
        names = row.class_names or tuple(f"class {number}" for number in range(row.classes or 0))
        return Raw(splits, names, names, ())
    return sources.open_raw(
        row,
        request.place,
        scratch,
        check_raw=request.check_raw,
        max_per_class=request.max_per_class,
        tell=tell,
    )


def _write_split(
    request: Request,
    name: str,
    split: ArraySplit | EncodedSplit,
    folder: Path,
    bad_share: float,
    workers: Workers,
    tell: Progress,
) -> Written:
    """Write a split, wait until it is on the disk, and compare it with its source."""
    path = folder / f"{name}.beton"
    measured = request.row.normalization is None and name == "train"
    if isinstance(split, ArraySplit):
        written = write_arrays(split, name, path, measured=measured, tell=tell)
        wait_for_disk(path)
        verify_arrays(written, split, name, tell)
        return written
    if request.storage is None:
        raise DataError(f"{request.row.name}: its row does not say how its images are kept")
    written = write_files(
        split,
        name,
        path,
        storage=request.storage,
        bad_share=bad_share,
        measured=measured,
        workers=workers,
        tell=tell,
    )
    wait_for_disk(path)
    verify_files(written, split, name, storage=request.storage, workers=workers, tell=tell)
    return written


def _lost_classes(raw: Raw, name: str, written: Written) -> tuple[str, ...]:
    """A note of classes whose images are all bad.

    Raises:
        DataError: when there is one in the training split.
    """
    split = raw.splits[name]
    lost = np.setdiff1d(split.labels, written.labels).tolist()
    if not lost:
        return ()
    line = f"all {name} images of {raw.class_names[lost[0]]} are bad"
    if len(lost) > 1:
        line += f", and so are those of {len(lost) - 1:,} other classes"
    if name != "train":
        return (line,)
    first = split.name(int(np.flatnonzero(split.labels == lost[0])[0]))
    reason = next(file.reason for file in written.bad if file.name == first)
    raise DataError(f"{line}: {first}: {reason}")


def _check_space(
    request: Request, raw: Raw, folder: Path, workers: Workers, tell: Progress
) -> None:
    """Refuse to begin what the disk cannot hold; archives of arrays are unpacked by now."""
    tell("estimate the size", 0, 1)
    needed = 0
    for split in raw.splits.values():
        if isinstance(split, ArraySplit):
            needed += split.images.nbytes
        elif request.storage is not None:
            needed += estimate_bytes(split, request.storage, workers)
    needed = int(needed * (1 + _SPACE_MARGIN)) + 2 * len(raw.splits) * PAGE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"cannot prepare {request.row.name}: it takes about {needed / 1e6:,.0f} MB, and "
            f"{folder.parent} has {free / 1e6:,.0f} MB free: make room, or point data.prepared "
            "to another disk"
        )
    tell("estimate the size", 1, 1)


def _describe(
    request: Request, raw: Raw, stamp: str, written: dict[str, Written], folder: Path
) -> Manifest:
    normalization, sums = request.row.normalization, written["train"].sums
    if sums is not None:
        normalization = sums.normalization()
    if normalization is None or min(normalization.std) == 0:
        raise DataError(f"{request.row.name}: all training images have one color, nothing to learn")
    notes = raw.notes
    if request.storage is not None and not has_strict_decoder():
        notes += (
            "damage in the middle of a JPEG was not looked for: neither FFCV nor libturbojpeg was "
            "installed when the images were prepared",
        )
    return Manifest(
        folder=folder,
        spec=request.spec,
        files={name: PreparedFile.measure(split.path) for name, split in written.items()},
        counts={name: len(split.labels) for name, split in written.items()},
        class_names=raw.class_names,
        class_ids=raw.class_ids,
        mean=normalization.mean,
        std=normalization.std,
        class_histogram={
            name: np.bincount(split.labels, minlength=len(raw.class_names)).tolist()
            for name, split in written.items()
        },
        quarantine=tuple(file for split in written.values() for file in split.bad),
        raw_stamp=stamp,
        notes=notes,
        fingerprint=digest_of({name: split.fingerprint for name, split in written.items()}),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Of what decides the bytes in the files."""
    import cv2

    return {
        "format": str(FORMAT),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "jpeg decoder": jpeg_decoder(),
    }
