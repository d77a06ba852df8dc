"""Folders, ZIP and tar archives as one thing: a tree of files, read in place."""

from __future__ import annotations

import os
import stat
import zipfile
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.datasets import DataError
from data_prep.raw.names import is_shown, leaves_folder, printable
from data_prep.raw.splits import (
    LARGEST_FILE,
    EncodedSplit,
    FileSplit,
    Integers,
    Progress,
    TarSplit,
    ZipSplit,
)
from data_prep.raw.tar_listing import list_tar

ARCHIVE_SUFFIXES = (".zip", ".tar")

#: A file above the first number of bytes that was packed by more than the second is a ZIP bomb.
_BOMB_BYTES, _BOMB_RATIO = 1 << 20, 200


class Tree(ABC):
    """Files by their names relative to a folder or archive, parts joined by ``/``.

    Hidden files and those of ``__MACOSX`` are left out.

    Args:
        place: the folder or archive.

    Attributes:
        special: names of pipes, sockets and devices that ``files`` has met, and does not give.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.special: set[str] = set()

    @abstractmethod
    def folders(self, below: str = "") -> list[str]:
        """Names of the folders directly below a folder, sorted; none where it does not exist."""

    @abstractmethod
    def files(self, below: str = "", *, deep: bool = True) -> list[str]:
        """Files below a folder, sorted, by their names relative to the tree.

        At any depth, or directly in it if not ``deep``; none where the folder does not exist.
        """

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def split(self, names: Sequence[str], labels: Integers) -> EncodedSplit:
        """The files ``names``, N of them, as images with labels, int64 (N,)."""

    def read(self, name: str) -> bytes:
        """The bytes of one file; errors are those of ``EncodedSplit.read``."""
        return self.split([name], np.zeros(1, dtype=np.int64)).read(0)


def open_tree(place: Path, tell: Progress) -> Tree:
    """A folder, a ZIP archive, or an uncompressed tar archive.

    Raises:
        DataError: when it is none of them, or cannot be trusted.
    """
    if place.is_dir():
        return FolderTree(place)
    if place.suffix.lower() == ".tar":
        return TarTree(place, tell)
    if place.suffix.lower() == ".zip" or zipfile.is_zipfile(place):
        return ZipTree(place)
    if not place.exists():
        raise DataError(f"{place} does not exist")
    raise DataError(
        f"{place} is no folder, ZIP archive or uncompressed .tar archive: unpack it, and name the "
        "folder"
    )


class FolderTree(Tree):
    """A folder on disk; links to folders are followed."""

    def folders(self, below: str = "") -> list[str]:
        folder = self.place / below
        if not folder.is_dir():
            return []
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if is_shown(e.name) and _is_folder(e))

    def files(self, below: str = "", *, deep: bool = True) -> list[str]:
        found: list[str] = []
        waiting = [below] if (self.place / below).is_dir() else []
        while waiting:
            folder = waiting.pop()
            before = f"{folder}/" if folder else ""
            with os.scandir(self.place / folder) as entries:
                for entry in entries:
                    if not is_shown(entry.name):
                        continue
                    name = before + entry.name
                    if entry.is_file(follow_symlinks=False):
                        found.append(name)
                    elif _is_folder(entry):
                        if deep:
                            _check_circle(entry)
                            waiting.append(name)
                    elif entry.is_symlink():  # where it leads is found out when it is read
                        found.append(name)
                    else:
                        self.special.add(name)
        return sorted(found)

    def has(self, name: str) -> bool:
        return (self.place / name).is_file()

    def split(self, names: Sequence[str], labels: Integers) -> FileSplit:
        return FileSplit(self.place, names, labels)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where this user may not look: no folder to list
        return False


def _check_circle(entry: os.DirEntry[str]) -> None:
    """Refuse a link to a folder above it, below which listing would never end."""
    if not entry.is_symlink():
        return
    target = entry.stat()
    if any(os.path.samestat(target, above.stat()) for above in Path(entry.path).parents):
        raise DataError(
            f"{printable(entry.path)} is a link to a folder in which it lies itself: remove it"
        )


class _ArchiveTree(Tree):
    """An archive whose directory is in memory.

    Args:
        place: the archive.
        names: of its members, in any order.
    """

    def __init__(self, place: Path, names: list[str]) -> None:
        super().__init__(place)
        self._positions = {name: position for position, name in enumerate(names)}
        if len(self._positions) < len(names):
            twice = next(n for i, n in enumerate(names) if self._positions[n] != i)
            raise DataError(f"{place}:{printable(twice)} is there twice: pack the archive anew")
        self._sorted = sorted(name for name in names if all(map(is_shown, name.split("/"))))

    def folders(self, below: str = "") -> list[str]:
        start = len(below) + 1 if below else 0
        inner = (name[start:].partition("/") for name in self.files(below))
        return sorted({folder for folder, slash, _ in inner if slash})

    def files(self, below: str = "", *, deep: bool = True) -> list[str]:
        found = self._sorted
        if below:
            # "0" is the character after "/".
            first, end = bisect_left(found, f"{below}/"), bisect_left(found, f"{below}0")
            found = found[first:end]
        start = len(below) + 1 if below else 0
        return found if deep else [name for name in found if "/" not in name[start:]]

    def has(self, name: str) -> bool:
        return name in self._positions

    def _places(self, names: Sequence[str]) -> Integers:
        positions = (self._positions[name] for name in names)
        return np.fromiter(positions, dtype=np.int64, count=len(names))


class ZipTree(_ArchiveTree):
    """A ZIP archive, read in place.

    Args:
        place: the archive.

    Raises:
        DataError: when it is cut or damaged, or one of its members is hostile: a name that leaves
            the folder, a link, a bomb, a name twice, or one that is encrypted.
    """

    def __init__(self, place: Path) -> None:
        try:
            with zipfile.ZipFile(place) as archive:
                members = [m for m in archive.infolist() if not _zip_name(m).endswith("/")]
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(
                f"{place} is cut or no ZIP archive ({error}): delete it and get it again"
            ) from None
        for member in members:
            problem = _problem_of_zip_member(member)
            if problem:
                name = printable(member.filename)
                raise DataError(f"{place}:{name} {problem}: the archive is refused")
        super().__init__(place, [_zip_name(member) for member in members])
        columns = [
            (m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members
        ]
        self._table = np.array(columns, dtype=np.int64).reshape(len(columns), 5)

    def split(self, names: Sequence[str], labels: Integers) -> ZipSplit:
        offsets, packed, lengths, checksums, method = self._table[self._places(names)].T.copy()
        deflated = method == zipfile.ZIP_DEFLATED
        return ZipSplit(self.place, names, labels, offsets, packed, lengths, checksums, deflated)


def _zip_name(member: zipfile.ZipInfo) -> str:
    # Some programs on Windows write backslashes, against the format.
    return member.filename.replace("\\", "/").removeprefix("./")


def _problem_of_zip_member(member: zipfile.ZipInfo) -> str:
    if leaves_folder(member.filename):
        return "leads out of the folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is neither stored nor deflated"
    if member.file_size > LARGEST_FILE:
        return f"is of {member.file_size:,} bytes, more than any image"
    if member.file_size > max(_BOMB_BYTES, _BOMB_RATIO * member.compress_size):
        return f"is a bomb ({member.compress_size:,} bytes unpack to {member.file_size:,})"
    return ""


class TarTree(_ArchiveTree):
    """An uncompressed tar archive, read in place.

    A member ``<name>.tar`` stands for a folder ``<name>`` with what it holds itself, as in the
    archive of ImageNet's training images.

    Args:
        place: the archive.
        tell: progress in bytes; the headers lie all over the archive.

    Raises:
        DataError: as ``list_tar``.
    """

    def __init__(self, place: Path, tell: Progress) -> None:
        members = list_tar(place, tell)
        super().__init__(place, [member.name for member in members])
        places = [(member.offset, member.length) for member in members]
        self._table = np.array(places, dtype=np.int64).reshape(len(places), 2)

    def split(self, names: Sequence[str], labels: Integers) -> TarSplit:
        offsets, lengths = self._table[self._places(names)].T.copy()
        return TarSplit(self.place, names, labels, offsets, lengths)
