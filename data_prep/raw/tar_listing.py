"""Where the members of a tar archive lie; Python's own reader takes four times as long."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.datasets import DataError
from data_prep.raw.names import leaves_folder, printable
from data_prep.raw.splits import Progress

_BLOCK = 512
#: A record of long names or attributes; no sane one is larger.
_LARGEST_RECORD = 1 << 20
_FILES, _FOLDER, _LONG_NAME, _PAX = b"0\x007", b"5", b"L", b"x"
_IGNORED = b"gK"

#: How files begin that are none, though their names say so; no name of a member begins like that.
_OTHER_FORMATS = {
    rb"\x1f\x8b": "compressed by gzip",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2",
    rb"\xfd7zXZ\x00": "compressed by xz",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd",
    rb"PK\x03\x04": "a ZIP archive",
}


class TarMember(NamedTuple):
    """A file: its name, the offset of its first byte, and how many bytes it has."""

    name: str
    offset: int
    length: int


def list_tar(place: Path, tell: Progress) -> list[TarMember]:
    """The files in an uncompressed tar archive, in their order.

    Files of an archive ``<name>.tar`` in it have names that begin with ``<name>/``.

    Args:
        place: the archive.
        tell: progress in bytes; the headers lie all over the archive.

    Raises:
        DataError: when it is of another format, empty, cut or damaged, or has links, names that
            leave the folder, or archives in its archives.
    """
    with place.open("rb", buffering=0) as file:
        start = file.read(10)
        for magic, kind in _OTHER_FORMATS.items():
            if re.match(magic, start):
                raise DataError(f"{place} is {kind}, no plain tar archive: unpack it")
        members = list(_Reader(place, file.fileno(), tell).members()) if start else []
    if not members:
        raise DataError(f"{place} is empty: no file is in it")
    return members


class _Reader:
    def __init__(self, place: Path, descriptor: int, tell: Progress) -> None:
        self._place, self._descriptor, self._tell = place, descriptor, tell
        self._size = os.fstat(descriptor).st_size
        # Jumps from header to header: reading ahead would fetch the images as well.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def members(self) -> Iterator[TarMember]:
        """All files, those of archives in the archive too."""
        yield from self._members_between(0, self._size, "")
        self._tell(f"list {self._place.name}", self._size, self._size)

    def _members_between(self, start: int, end: int, before: str) -> Iterator[TarMember]:
        name = ""
        while True:
            header = self._read(start, _BLOCK, end)
            if not any(header):
                return
            length = self._length(header, start)
            kind, data = header[156:157], start + _BLOCK
            start = data + -(-length // _BLOCK) * _BLOCK
            if kind == _LONG_NAME:
                name = _text(self._record(data, length, end).rstrip(b"\0"))
                continue
            if kind == _PAX:
                name = self._pax_path(data, length, end) or name
                continue
            if kind in _IGNORED:
                continue
            full, name = before + (name or _short_name(header)).removeprefix("./"), ""
            if kind == _FOLDER:
                continue
            if kind not in _FILES:
                raise self._unusable(full, "is a link or a device: not an archive to use")
            if leaves_folder(full):
                raise self._unusable(full, "leads out of the folder: not one to use")
            if start > end:
                raise self._damaged(f"is cut: it ends within {printable(full)}")
            if not full.endswith(".tar"):
                yield TarMember(full, data, length)
                continue
            if before:
                raise self._unusable(full, "is the third archive, one within the other: unpack it")
            self._tell(f"list {self._place.name}", data, self._size)
            yield from self._members_between(data, data + length, full[:-4] + "/")

    def _unusable(self, name: str, why: str) -> DataError:
        return DataError(f"{self._place}:{printable(name)} {why}")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self._place} {what}; delete it and get it again")

    def _read(self, offset: int, length: int, end: int) -> bytes:
        data = os.pread(self._descriptor, length, offset) if offset + length <= end else b""
        if len(data) < length:
            raise self._damaged("is cut: its last member is not the last one")
        return data

    def _record(self, offset: int, length: int, end: int) -> bytes:
        if length > _LARGEST_RECORD:
            raise self._damaged(f"is damaged: a name of {length:,} bytes")
        return self._read(offset, length, end)

    def _length(self, header: bytes, offset: int) -> int:
        """What a header says of its member's size, once its own checksum is right."""
        size, checksum = header[124:136].strip(b"\0 "), header[148:156].strip(b"\0 ")
        # The checksum counts its own eight characters as blanks.
        found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _is_octal(checksum) and int(checksum, 8) == found:
            if header[124] & 0x80:  # GNU's form for sizes of 8 GiB and more
                return int.from_bytes(header[125:136], "big")
            if _is_octal(size) or not size:
                return int(size or b"0", 8)
        raise self._damaged(f"is damaged: no tar header at byte {offset:,}")

    def _pax_path(self, offset: int, length: int, end: int) -> str:
        """The name in a POSIX extended header: records ``<bytes of it> <key>=<value>\\n``."""
        path, rest = b"", self._record(offset, length, end)
        while rest:
            digits = rest.partition(b" ")[0]
            size = int(digits) if re.fullmatch(rb"[0-9]{1,7}", digits) else 0
            if not len(digits) < size <= len(rest):
                raise self._damaged(f"is damaged: no names of files at byte {offset:,}")
            key, _, value = rest[len(digits) + 1 : size - 1].partition(b"=")
            path = value if key == b"path" else path
            rest = rest[size:]
        return _text(path)


def _is_octal(field: bytes) -> bool:
    return re.fullmatch(rb"[0-7]+", field) is not None


def _short_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name)


def _text(name: bytes) -> str:
    return os.fsdecode(name)
