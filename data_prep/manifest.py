"""What is known of prepared files, and whether they still are what was written."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.beton import Index, read_index
from data_prep.datasets import DataError, Dataset, Normalization, Storage

MANIFEST_NAME = "manifest.json"

#: Part of every spec: raise it when files written earlier must not be used any more.
FORMAT = 3

#: Larger files are hashed again only when their modification time has changed: each image has a
#: checksum of its own, which is verified whenever it is read.
_ALWAYS_HASHED_BYTES = 1 << 30


def ffcv_available() -> bool:
    """Whether FFCV is installed; it is not imported."""
    return importlib.util.find_spec("ffcv") is not None


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, as 64 hex digits; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_spec(
    dataset: Dataset,
    *,
    storage: Storage | None,
    synthetic: tuple[int, int] | None,
    max_per_class: int | None,
    raw: dict[str, Any] | None,
    checked: bool,
) -> dict[str, Any]:
    """Everything that decides what prepared files hold, as plain data.

    Args:
        dataset: the row.
        storage: how encoded images are kept; None for arrays.
        synthetic: numbers of made-up images.
        max_per_class: most images of a class.
        raw: what identifies raw files that the user named; None for the usual place.
        checked: whether raw files were compared with their published checksums.
    """
    normalization = dataset.normalization
    spec = {
        "format": FORMAT,
        "dataset": dataset.name,
        "reader": "synthetic" if synthetic else dataset.reader,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "normalization": None if normalization is None else normalization._asdict(),
        "storage": None if storage is None else asdict(storage),
        "synthetic": synthetic,
        "max_per_class": max_per_class,
        "raw": raw,
        "checked": checked,
    }
    # As it will be read back: lists for tuples.
    return json.loads(json.dumps(spec))


def allowed_bad(bad_share: float, count: int) -> int:
    """How many of ``count`` images may be bad: the share of them, and one in any case unless the
    share is 0."""
    return max(1, int(bad_share * count)) if bad_share > 0 else 0


class BadFile(NamedTuple):
    """A raw file that was left out: its split, where it is, and why."""

    split: str
    name: str
    reason: str


@dataclass(frozen=True)
class PreparedFile:
    """A file as it was written.

    Attributes:
        name: in its folder.
        bytes: its size.
        sha256: of the whole file, 64 hex digits.
        index_sha256: of what comes before the first image and after the last one, which says
            where the images are and what they are.
        modified: time in nanoseconds.
    """

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    modified: int

    @classmethod
    def measure(cls, path: Path) -> PreparedFile:
        """Read the file and note what it is."""
        status = path.stat()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index_digest = _index_sha256(read_index(path))
        return cls(path.name, status.st_size, digest, index_digest, status.st_mtime_ns)

    def check_size(self, folder: Path) -> Path:
        """The file's path, if it is there in full.

        Raises:
            DataError: when it is missing or has another size.
        """
        path = folder / self.name
        if not path.is_file():
            raise DataError(f"{path} is missing; {_rebuild(folder)}")
        size = path.stat().st_size
        if size != self.bytes:
            raise DataError(f"{path} has {size} bytes instead of {self.bytes}; {_rebuild(folder)}")
        return path

    def open_index(self, folder: Path) -> Index:
        """Where its images are, if the file is there in full and says so as it was written.

        Raises:
            DataError: when it is missing, has another size, or another index.
        """
        path = self.check_size(folder)
        try:
            index = read_index(path)
        except DataError as error:
            raise DataError(f"{error}; {_rebuild(folder)}") from None
        if _index_sha256(index) != self.index_sha256:
            raise DataError(f"{path} was changed after it was written; {_rebuild(folder)}")
        return index

    def check(self, folder: Path) -> None:
        """Compare with the file on disk.

        Raises:
            DataError: when it is missing, has another size, or other content.
        """
        path = self.open_index(folder).path
        untouched = path.stat().st_mtime_ns == self.modified
        if untouched and self.bytes > _ALWAYS_HASHED_BYTES:
            return
        if PreparedFile.measure(path).sha256 != self.sha256:
            raise DataError(f"{path} was changed after it was written; {_rebuild(folder)}")


@dataclass(frozen=True)
class Manifest:
    """The description of one prepared data set, kept beside its files as ``manifest.json``.

    Attributes:
        folder: where the files are; not part of the description itself.
        spec: what was asked for, see ``make_spec``.
        files: of each split.
        counts: images in the files, for each split.
        class_names: for people, in the order of the labels.
        class_ids: names of the class folders; ``class_names`` where there are none.
        mean: per channel, of pixels in [0, 1]: the row's, else measured on the training images.
        std: as ``mean``.
        class_histogram: images of each class, for each split.
        quarantine: raw files that were left out.
        raw_stamp: of the raw files as they were, see ``sources.stamp``; empty where the spec itself
            says which ones they are, or where there are none.
        notes: worth telling, one line each.
        fingerprint: SHA-256 of all labels, sizes and stored bytes in order, 64 hex digits; the
            same for the same content, whatever the folder and the number of processes.
        versions: of what decided the bytes.
        reused: whether ``prepare`` found the files ready.
    """

    folder: Path
    spec: dict[str, Any]
    files: dict[str, PreparedFile]
    counts: dict[str, int]
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_histogram: dict[str, list[int]]
    quarantine: tuple[BadFile, ...]
    raw_stamp: str
    notes: tuple[str, ...]
    fingerprint: str
    versions: dict[str, str]
    reused: bool = field(default=False, compare=False)

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.spec["dataset"]

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height and width in pixels as the network sees them."""
        return self.spec["image_size"]

    @property
    def channels(self) -> int:
        """1 (gray) or 3 (red, green, blue)."""
        return self.spec["channels"]

    @property
    def normalization(self) -> Normalization:
        """Mean and deviation together."""
        return Normalization(self.mean, self.std)

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files.values())

    def to_json(self) -> str:
        """The content of ``manifest.json``, with a checksum over itself."""
        body = asdict(replace(self, folder=Path()))
        del body["folder"], body["reused"]
        body["quarantine"] = [entry._asdict() for entry in self.quarantine]
        return json.dumps({**body, "checksum": digest_of(body)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``<folder>/manifest.json``; the files themselves are not looked at.

        Raises:
            DataError: when it is missing, cannot be read, or is not as it was written.
        """
        path = folder / MANIFEST_NAME
        try:
            body = json.loads(path.read_text())
            checksum = body.pop("checksum")
            if checksum != digest_of(body):
                raise DataError(f"{path} was changed after it was written; {_rebuild(folder)}")
            files = {name: PreparedFile(**file) for name, file in body.pop("files").items()}
            quarantine = tuple(BadFile(**entry) for entry in body.pop("quarantine"))
            tuples = ("class_names", "class_ids", "mean", "std", "notes")
            body |= {key: tuple(body[key]) for key in tuples}
            return cls(folder=folder, files=files, quarantine=quarantine, **body)
        except FileNotFoundError:
            raise DataError(f"{path} is missing; {_rebuild(folder)}") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path} is not a manifest; {_rebuild(folder)}") from None

    def check(self, spec: dict[str, Any]) -> None:
        """Compare with the wanted spec and with the files on disk.

        Raises:
            DataError: at the first difference, naming the file and how to rebuild it.
        """
        for key, wanted in spec.items():
            found = self.spec.get(key)
            if found != wanted:
                raise DataError(
                    f"{self.folder / MANIFEST_NAME} says {key}={found!r} instead of {wanted!r}; "
                    f"{_rebuild(self.folder)}"
                )
        for file in self.files.values():
            file.check(self.folder)

    def check_bad_share(self, bad_share: float) -> None:
        """Compare the images that were left out with the share of each split that may be.

        Raises:
            DataError: when there are more.
        """
        for split, count in self.counts.items():
            bad = [file for file in self.quarantine if file.split == split]
            if len(bad) > allowed_bad(bad_share, count + len(bad)):
                raise DataError(
                    f"{self.folder} was prepared without {len(bad)} bad {split} images of "
                    f"{count + len(bad):,}, more than data.bad_share={bad_share:g} of all: the "
                    f"first is {bad[0].name}: {bad[0].reason}"
                )


def _index_sha256(index: Index) -> str:
    first, last = int(index.pointers[0]), int(index.pointers[-1] + index.sizes[-1])
    with index.path.open("rb") as file:
        digest = hashlib.sha256(file.read(first))
        file.seek(last)
        digest.update(file.read())
    return digest.hexdigest()


def _rebuild(folder: Path) -> str:
    return f"delete the folder {folder} and it is prepared anew"
