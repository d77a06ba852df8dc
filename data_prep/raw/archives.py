"""Folders, ZIP and tar archives as one thing: a tree of files, read in place."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.datasets import DataError
from data_prep.raw.splits import EncodedSplit, FileSplit, Integers, Progress, TarSplit, ZipSplit

ARCHIVE_SUFFIXES = (".zip", ".tar")

#: No image and no list of labels is larger.
_LARGEST_MEMBER = 256 << 20
#: A file above the first number of bytes that was packed by more than the second is a ZIP bomb.
_BOMB_BYTES, _BOMB_RATIO = 1 << 20, 200

_TAR_BLOCK = 512
#: A record of long names or attributes in a tar archive; no sane one is larger.
_LARGEST_TAR_RECORD = 1 << 20
_TAR_FILES, _TAR_FOLDER, _TAR_LONG_NAME, _TAR_PAX = b"0\x007", b"5", b"L", b"x"
_TAR_IGNORED = b"gK"


class Tree(ABC):
    """Files by their names relative to a folder or archive, parts joined by ``/``.

    Hidden files and those of ``__MACOSX`` are left out.

    Args:
        place: the folder or archive.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

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
        """The bytes of one file.

        Raises:
            DataError: when it is larger than a list of labels can be.
        """
        one = self.split([name], np.zeros(1, dtype=np.int64))
        if one.sizes()[0] > _LARGEST_MEMBER:
            raise DataError(f"{one.name(0)} is too large for what it should hold")
        return one.read(0)


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
            return sorted(e.name for e in entries if _is_shown(e.name) and e.is_dir())

    def files(self, below: str = "", *, deep: bool = True) -> list[str]:
        found: list[str] = []
        waiting = [below] if (self.place / below).is_dir() else []
        while waiting:
            folder = waiting.pop()
            before = f"{folder}/" if folder else ""
            with os.scandir(self.place / folder) as entries:
                for entry in entries:
                    if not _is_shown(entry.name):
                        continue
                    if not entry.is_dir():
                        found.append(before + entry.name)
                    elif deep:
                        waiting.append(before + entry.name)
        return sorted(found)

    def has(self, name: str) -> bool:
        return (self.place / name).is_file()

    def split(self, names: Sequence[str], labels: Integers) -> FileSplit:
        return FileSplit(self.place, names, labels)


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
            raise DataError(f"{place}:{twice} is there twice: pack the archive anew")
        self._sorted = sorted(name for name in names if all(map(_is_shown, name.split("/"))))

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
                members = [member for member in archive.infolist() if not member.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(f"{place} is cut or no ZIP archive ({error})") from None
        for member in members:
            problem = _problem_of_zip_member(member)
            if problem:
                raise DataError(f"{place}:{member.filename} {problem}: the archive is refused")
        super().__init__(place, [_plain(member.filename) for member in members])
        columns = [
            (m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members
        ]
        self._table = np.array(columns, dtype=np.int64).reshape(len(columns), 5)

    def split(self, names: Sequence[str], labels: Integers) -> ZipSplit:
        offsets, packed, lengths, checksums, method = self._table[self._places(names)].T.copy()
        deflated = method == zipfile.ZIP_DEFLATED
        return ZipSplit(self.place, names, labels, offsets, packed, lengths, checksums, deflated)


def _problem_of_zip_member(member: zipfile.ZipInfo) -> str:
    if _leaves_folder(member.filename):
        return "leads out of the folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is neither stored nor deflated"
    if member.file_size > _LARGEST_MEMBER:
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
        DataError: when it is cut or damaged, or has links or names that leave the folder.
    """

    def __init__(self, place: Path, tell: Progress) -> None:
        with place.open("rb", buffering=0) as file:
            members = list(_TarReader(place, file.fileno(), tell).members())
        super().__init__(place, [member.name for member in members])
        places = [(member.offset, member.length) for member in members]
        self._table = np.array(places, dtype=np.int64).reshape(len(places), 2)

    def split(self, names: Sequence[str], labels: Integers) -> TarSplit:
        offsets, lengths = self._table[self._places(names)].T.copy()
        return TarSplit(self.place, names, labels, offsets, lengths)


class _TarMember(NamedTuple):
    name: str
    offset: int
    length: int


class _TarReader:
    """Finds the members of a tar archive; Python's own reader takes four times as long."""

    def __init__(self, place: Path, descriptor: int, tell: Progress) -> None:
        self._place, self._descriptor, self._tell = place, descriptor, tell
        self._size = os.fstat(descriptor).st_size
        # Jumps from header to header: reading ahead would fetch the images as well.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def members(self) -> Iterator[_TarMember]:
        """All files, those of archives in the archive too."""
        yield from self._members_between(0, self._size, "")
        self._tell(f"list {self._place.name}", self._size, self._size)

    def _members_between(self, start: int, end: int, before: str) -> Iterator[_TarMember]:
        name = ""
        while True:
            header = self._read(start, _TAR_BLOCK, end)
            if not any(header):
                return
            length = self._length(header, start)
            kind, data = header[156:157], start + _TAR_BLOCK
            start = data + -(-length // _TAR_BLOCK) * _TAR_BLOCK
            if kind == _TAR_LONG_NAME:
                name = self._record(data, length, end).rstrip(b"\0").decode(errors="replace")
                continue
            if kind == _TAR_PAX:
                name = _pax_path(self._record(data, length, end)) or name
                continue
            if kind in _TAR_IGNORED:
                continue
            full, name = before + _plain(name or _short_name(header)), ""
            if kind == _TAR_FOLDER:
                continue
            if kind not in _TAR_FILES:
                raise DataError(
                    f"{self._place}:{full} is a link or a device: not an archive to use"
                )
            if _leaves_folder(full):
                raise DataError(f"{self._place}:{full} leads out of the folder: not one to use")
            if start > end:
                raise DataError(f"{self._place} is cut: it ends within {full}")
            if full.endswith(".tar"):
                self._tell(f"list {self._place.name}", data, self._size)
                yield from self._members_between(data, data + length, full[:-4] + "/")
            else:
                yield _TarMember(full, data, length)

    def _read(self, offset: int, length: int, end: int) -> bytes:
        data = os.pread(self._descriptor, length, offset) if offset + length <= end else b""
        if len(data) < length:
            raise DataError(f"{self._place} is cut: its last member is not the last one")
        return data

    def _record(self, offset: int, length: int, end: int) -> bytes:
        if length > _LARGEST_TAR_RECORD:
            raise DataError(f"{self._place} is damaged: a name of {length:,} bytes")
        return self._read(offset, length, end)

    def _length(self, header: bytes, offset: int) -> int:
        """What a header says of its member's size, once its own checksum is right."""
        try:
            expected = int(header[148:156].strip(b"\0 "), 8)
            # The checksum counts its own eight characters as blanks.
            if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
                raise ValueError
            if header[124] & 0x80:  # GNU's form for sizes of 8 GiB and more
                return int.from_bytes(header[125:136], "big")
            return int(header[124:136].strip(b"\0 ") or b"0", 8)
        except ValueError:
            raise DataError(f"{self._place} is damaged: no tar header at byte {offset:,}") from None


def _short_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode(errors="replace")


def _pax_path(record: bytes) -> str:
    """The name in a POSIX extended header, whose lines are ``<length> <key>=<value>``."""
    match = re.search(rb"^\d+ path=(.*)$", record, re.MULTILINE)
    return match[1].decode(errors="replace") if match else ""


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _leaves_folder(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    return ".." in parts or not parts[0] or re.match("[A-Za-z]:$", parts[0]) is not None
