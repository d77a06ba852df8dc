"""Folders of checkpoints behind a URI, in whatever storage fsspec has a driver for."""

from __future__ import annotations

import errno
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipeline.checkpoints.storage import (
    MANIFEST,
    MANIFEST_BYTES,
    PARTIAL,
    Content,
    DamagedError,
    File,
    LocalStorage,
    Storage,
    one_line,
    read_manifest,
    write_manifest,
)
from pipeline.errors import PipelineError
from pipeline.sections import without_credentials


class RemoteStorage(Storage):
    """Folders behind a URI of fsspec, where nothing can be renamed.

    A folder is there when its manifest is, which is uploaded last and removed first. A folder that
    is opened is fetched into a scratch folder of this object, and checked there.

    Args:
        uri: as ``s3://bucket/folder``.

    Raises:
        PipelineError: nobody here speaks its protocol.
    """

    def __init__(self, uri: str) -> None:
        self.place = without_credentials(uri)
        self._credentials = uri.partition("://")[2].partition("?")[0].rpartition("@")[0]
        try:
            # Others write there too, so what was listed once is soon out of date.
            self._system, self._root = fsspec.url_to_fs(
                uri, use_listings_cache=False, skip_instance_cache=True
            )
        except ImportError as error:
            raise PipelineError(
                f"checkpoint.folder={self.place} needs a package that is not installed: {error}"
            ) from None
        except Exception as error:  # of any driver
            raise PipelineError(
                f"checkpoint.folder={self.place} cannot be used: {self._shown(error)}; take a "
                "folder, or a URI as s3://bucket/folder"
            ) from None
        self._scratch = tempfile.TemporaryDirectory(prefix="ternforge-checkpoints-")
        self._local = LocalStorage(Path(self._scratch.name))

    def names(self) -> list[str]:
        return [name for name, files in self._listing().items() if MANIFEST in files]

    def write(self, name: str, files: Mapping[str, Content]) -> None:
        listing = self._listing()
        for other, listed in listing.items():  # of a writer that was killed
            if MANIFEST not in listed or other == name:
                self.remove(other)
        self._local.write(name, files)
        try:
            for file in [*files, MANIFEST]:
                self._put(self._local.folder / name / file, f"{self._root}/{name}/{file}")
        finally:
            self._local.remove(name)

    def open(self, name: str, allowed: Set[str]) -> dict[str, Path]:
        if name not in self._local.names():
            for other in self._local.names():
                self._local.remove(other)
            try:
                self._fetch(name, allowed)
            except BaseException:
                self._local.remove(name)
                raise
        return self._local.open(name, allowed)

    def remove(self, name: str) -> None:
        folder = f"{self._root}/{name}"
        with self._driver_errors():
            if self._system.exists(f"{folder}/{MANIFEST}"):
                self._system.rm_file(f"{folder}/{MANIFEST}")
            if self._system.exists(folder):
                self._system.rm(folder, recursive=True)

    def try_out(self) -> None:
        path = f"{self._root}/{PARTIAL}{secrets.token_hex(4)}"
        with self._driver_errors():
            self._system.pipe_file(path, b"ternforge")
            self._system.rm_file(path)

    def _listing(self) -> dict[str, set[str]]:
        """Names of the files in each folder."""
        with self._driver_errors():
            paths = self._system.find(self._root, maxdepth=2)
        found: dict[str, set[str]] = {}
        for path in paths:
            folder, _, file = path.removeprefix(self._root).strip("/").rpartition("/")
            found.setdefault(folder, set()).add(file)
        found.pop("", None)
        return found

    def _put(self, file: Path, path: str) -> None:
        with self._driver_errors():
            self._system.put_file(str(file), path)
            arrived = self._system.info(path)["size"]
        if arrived != file.stat().st_size:
            raise OSError(f"only {arrived} bytes of {file.name} arrived")

    def _fetch(self, name: str, allowed: Set[str]) -> None:
        """Bring a folder here, as far as it is what its manifest says."""
        folder = self._local.folder / name
        folder.mkdir(parents=True)
        source = f"{self._root}/{name}"
        files = self._read_manifest(f"{source}/{MANIFEST}", allowed)
        for file, said in files.items():
            with self._driver_errors(missing=file):
                said.check_size(file, self._system.info(f"{source}/{file}")["size"])
                self._system.get_file(f"{source}/{file}", str(folder / file))
        (folder / MANIFEST).write_bytes(write_manifest(files))

    def _read_manifest(self, path: str, allowed: Set[str]) -> dict[str, File]:
        with self._driver_errors(missing=MANIFEST):
            if self._system.info(path)["size"] > MANIFEST_BYTES:
                raise DamagedError("its manifest is damaged")
            content = self._system.cat_file(path)
        return read_manifest(content, allowed)

    @contextmanager
    def _driver_errors(self, missing: str | None = None) -> Iterator[None]:
        """Make an OSError of what a driver raises, which may be an error of any library.

        Args:
            missing: file whose absence is damage.
        """
        try:
            yield
        except DamagedError:
            raise
        except Exception as error:
            if missing is not None and isinstance(error, FileNotFoundError):
                raise DamagedError(f"{missing} is missing") from None
            number = errno.EACCES if isinstance(error, PermissionError) else None
            raise OSError(number, self._shown(error)) from None

    def _shown(self, error: Exception) -> str:
        """What a driver says, without the credentials of the URI."""
        text = one_line(error)
        for secret in (self._credentials, self._credentials.partition(":")[2]):
            text = text.replace(secret, "...") if secret else text
        return text
