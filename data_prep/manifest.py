"""What is known of prepared files, and whether they still are what was written."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.datasets import DataError, Dataset

MANIFEST_NAME = "manifest.json"

#: Part of every spec: raise it when files written earlier must not be used any more.
FORMAT = 1

#: Larger files are hashed again only when their modification time has changed.
_ALWAYS_HASHED_BYTES = 1 << 30


def ffcv_available() -> bool:
    """Whether FFCV is installed; it is not imported."""
    return importlib.util.find_spec("ffcv") is not None


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, as 64 hex digits; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def make_spec(dataset: Dataset, backend: str, synthetic: tuple[int, int] | None) -> dict[str, Any]:
    """Everything that decides what prepared files hold, as plain data."""
    counts = dataset.counts
    if synthetic is not None:
        counts = {"train": synthetic[0], "test": synthetic[1]}
    return {
        "format": FORMAT,
        "dataset": dataset.name,
        "reader": "synthetic" if synthetic else dataset.reader,
        "backend": backend,
        "counts": dict(counts),
        "class_names": list(dataset.class_names),
        "image_shape": [dataset.image_size, dataset.image_size, dataset.channels],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


@dataclass(frozen=True)
class PreparedFile:
    """A file as it was written: size in bytes, SHA-256, modification time in nanoseconds."""

    name: str
    bytes: int
    sha256: str
    modified: int

    @classmethod
    def measure(cls, path: Path) -> PreparedFile:
        """Read the file and note what it is."""
        status = path.stat()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.name, status.st_size, digest, status.st_mtime_ns)

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

    def check(self, folder: Path) -> None:
        """Compare with the file on disk.

        Raises:
            DataError: when it is missing, has another size, or other content.
        """
        path = self.check_size(folder)
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
        files: the files of each split.
        class_histogram: images of each class, for each split.
        fingerprint: SHA-256 of all labels and pixels, 64 hex digits; the same for every backend,
            folder and tool version.
        versions: of the tools that wrote the files.
        reused: whether ``prepare`` found the files ready.
    """

    folder: Path
    spec: dict[str, Any]
    files: dict[str, list[PreparedFile]]
    class_histogram: dict[str, list[int]]
    fingerprint: str
    versions: dict[str, str]
    reused: bool = field(default=False, compare=False)

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.spec["dataset"]

    @property
    def backend(self) -> str:
        """``ffcv`` or ``torch``."""
        return self.spec["backend"]

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return self.spec["counts"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return tuple(self.spec["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.spec["image_shape"]
        return height, width, channels

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""
        return tuple(self.spec["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""
        return tuple(self.spec["std"])

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for files in self.files.values() for file in files)

    def to_json(self) -> str:
        """The content of ``manifest.json``, with a checksum over itself."""
        body = asdict(replace(self, folder=Path()))
        del body["folder"], body["reused"]
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
            files = {
                split: [PreparedFile(**file) for file in entries]
                for split, entries in body.pop("files").items()
            }
            return cls(folder=folder, files=files, **body)
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
        for files in self.files.values():
            for file in files:
                file.check(self.folder)


def _rebuild(folder: Path) -> str:
    return f"delete the folder {folder} and it is prepared anew"
