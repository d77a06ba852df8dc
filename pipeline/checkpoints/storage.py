"""Where checkpoints lie: named folders of files, on a disk or behind a URI, whole or not there.

The manifest of a folder, with the size and SHA-256 of every file, is written last. What does not
match it is never opened, and neither is what is no plain file: a pipe, for one, would hang.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data_prep.locks import wait_for_disk
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.config import Experiment

#: Of a file, in parts.
Content = Iterable[bytes | memoryview]

MANIFEST = "manifest.json"

#: Of a manifest; those written here have a few hundred.
MANIFEST_BYTES = 64 * 1024

#: Of one file: far more than any network here has, and soon enough read.
_MOST_BYTES = 1 << 36

#: How the names of what is not whole begin. Names of checkpoints never do.
PARTIAL = ".partial-"

#: Seconds until storage that does not answer is taken for unreachable.
_PATIENCE = 30.0


class DamagedError(Exception):
    """A folder that is not as it was written; the message says in what, in one line."""


@dataclass(frozen=True)
class File:
    """What a manifest says of a file: its bytes, and their SHA-256 in 64 hex digits."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        # From a manifest, which may hold anything.
        if type(self.size) is not int or not 0 <= self.size <= _MOST_BYTES:
            raise ValueError("no size")
        if re.fullmatch("[0-9a-f]{64}", self.sha256) is None:
            raise ValueError("no SHA-256")

    def check_size(self, name: str, size: int) -> None:
        """Refuse a file of that name and of another size."""
        if size != self.size:
            raise DamagedError(f"{name} holds {size} bytes of {self.size}")


def write_manifest(files: Mapping[str, File]) -> bytes:
    """The content of a manifest of these files."""
    return json.dumps({"files": {name: asdict(file) for name, file in files.items()}}).encode()


def read_manifest(content: bytes, allowed: Set[str]) -> dict[str, File]:
    """The files that a manifest names, which have to be allowed: none of another folder, say.

    Raises:
        DamagedError: it is no manifest, or names other files.
    """
    try:
        entries = json.loads(content)["files"].items()
        files = {name: File(**said) for name, said in entries}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError("its manifest is damaged") from None
    unknown = sorted(files.keys() - allowed)
    if unknown:
        raise DamagedError(f"its manifest names {unknown[0][:80]!r}, which is none of its files")
    return files


class Storage(ABC):
    """Named folders of files.

    Every method may raise an OSError that says in one line what does not work.

    Attributes:
        place: folder or URI, for people.
    """

    place: str

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the folders, in no order; what was left half written is not among them."""

    @abstractmethod
    def write(self, name: str, files: Mapping[str, Content]) -> None:
        """Write a folder, in place of one of that name, by the content of its files, in parts."""

    @abstractmethod
    def open(self, name: str, allowed: Set[str]) -> dict[str, Path]:
        """The files of a folder on this machine, by name, each as it was written.

        They may be gone after the next call.

        Args:
            allowed: names that its files may have.

        Raises:
            DamagedError: the folder is not whole.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a folder, of which nothing is seen any more from the first moment on."""

    @abstractmethod
    def try_out(self) -> None:
        """Write something and remove it again."""


class LocalStorage(Storage):
    """Folders in a folder; synced to the disk, and named when they are whole.

    Args:
        folder: made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = str(folder)

    def names(self) -> list[str]:
        try:
            return [path.name for path in self.folder.iterdir() if path.name[0] != "."]
        except FileNotFoundError:
            return []

    def write(self, name: str, files: Mapping[str, Content]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{PARTIAL}*"):  # of a writer that was killed
            _delete(leftover)
        partial = self._hidden(name)
        partial.mkdir()
        try:
            listed = {}
            for file, content in files.items():
                with (partial / file).open("xb") as opened:
                    listed[file] = _write(opened, content)
            with (partial / MANIFEST).open("xb") as opened:
                _write(opened, [write_manifest(listed)])
            wait_for_disk(partial)
            former = self._hide(name) if os.path.lexists(self.folder / name) else None
            partial.rename(self.folder / name)
            wait_for_disk(self.folder)
            if former is not None:
                _delete(former)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def open(self, name: str, allowed: Set[str]) -> dict[str, Path]:
        folder = self.folder / name
        if folder.is_symlink() or not folder.is_dir():
            raise DamagedError("it is no folder")
        with _plain_file(folder / MANIFEST) as file:
            listed = read_manifest(file.read(MANIFEST_BYTES), allowed)
        for file_name, said in listed.items():
            with _plain_file(folder / file_name) as file:
                said.check_size(file_name, os.fstat(file.fileno()).st_size)
                if hashlib.file_digest(file, "sha256").hexdigest() != said.sha256:
                    raise DamagedError(f"{file_name} does not match its checksum")
        return {file_name: folder / file_name for file_name in listed}

    def remove(self, name: str) -> None:
        _delete(self._hide(name))

    def try_out(self) -> None:
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=existing, prefix=PARTIAL) as file:
            file.write(b"ternforge")
            file.flush()
            os.fsync(file.fileno())

    def _hide(self, name: str) -> Path:
        return (self.folder / name).rename(self._hidden(name))

    def _hidden(self, name: str) -> Path:
        # One of its own for each writer: one that was given up as lost may still be at work.
        return self.folder / f"{PARTIAL}{name}-{secrets.token_hex(4)}"


def _delete(path: Path) -> None:
    """Delete a folder, or whatever somebody has put in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _plain_file(path: Path) -> Iterator[BufferedReader]:
    """A file opened for reading, unless it is a link, a pipe, a device or a folder."""
    try:
        # Without waiting for somebody at the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedError(f"{path.name} is no plain file")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedError(f"{path.name} is no plain file") from None
        raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from None


def _write(file: IO[bytes], content: Content) -> File:
    """Write a file down to the disk; what is hashed is what was meant, not what arrived."""
    digest = hashlib.sha256()
    for part in content:
        file.write(part)
        digest.update(part)
    size = file.tell()
    file.flush()
    os.fsync(file.fileno())
    return File(size=size, sha256=digest.hexdigest())


def one_line(error: Exception) -> str:
    """What an error says in one line: of one of the system, what is wrong without its number."""
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error)).split()) or type(error).__name__


def storage_of(experiment: Experiment, folder: Path) -> Storage:
    """Where the checkpoints of the run in this run folder lie.

    Raises:
        PipelineError: one line, when ``checkpoint.folder`` is no place to keep any.
    """
    place = experiment.checkpoint.folder
    if place is None:
        return LocalStorage(folder / "checkpoints")
    return _open(f"{place.rstrip('/')}/{experiment.name}/{folder.name}")


def check_storage(experiment: Experiment) -> None:
    """Refuse a ``checkpoint.folder`` that cannot be written, before anything long begins.

    Raises:
        PipelineError: one line, with the reason.
    """
    from pipeline.sections import without_credentials

    place = experiment.checkpoint.folder
    if place is None:
        return
    try:
        _within(_PATIENCE, lambda: _open(place).try_out())
    except OSError as error:
        raise PipelineError(
            f"checkpoints cannot be kept in checkpoint.folder={without_credentials(place)}: "
            f"{one_line(error)}"
        ) from None


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do what may wait for ever, and give up after so many seconds."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            action()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    if outcome[0] is not None:
        raise outcome[0]


def _open(place: str) -> Storage:
    protocol, is_uri, rest = place.partition("://")
    if not is_uri:
        return LocalStorage(Path(place).expanduser().absolute())
    if protocol in ("file", "local"):
        return LocalStorage(Path(f"/{rest.lstrip('/')}"))
    from pipeline.checkpoints.remote_storage import RemoteStorage

    return RemoteStorage(place)
