"""A cheap sign of whether raw files have changed since they were prepared."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from data_prep.datasets import one_line_for_os_errors
from data_prep.raw.class_folders import is_image
from data_prep.raw.names import is_shown

#: Folders no deeper below the place than this may hold archives and lists of labels.
_LIST_DEPTH = 2


def stamp(place: Path) -> str:
    """SHA-256, 64 hex digits, that is another one when raw files come, go, or are replaced.

    It is made of the times of change of all folders, and of the size and time of change of the
    place itself and of files other than images near it. No image is looked at: one that is
    written again under its own name makes no difference.

    Args:
        place: as ``raw_place`` gives it.

    Returns:
        empty where the place does not exist.

    Raises:
        DataError: when a folder cannot be looked into.
    """
    if not place.exists():
        return ""
    with one_line_for_os_errors("cannot look for changes of the raw files", place):
        digest = hashlib.sha256(_state(place.stat()))
        waiting = [("", 0)] if place.is_dir() else []
        while waiting:
            below, depth = waiting.pop()
            for entry in _watched(place / below, depth):
                status = _status(entry)
                name = f"{below}{entry.name}/"
                digest.update(os.fsencode(name) + _state(status))
                if stat.S_ISDIR(status.st_mode):
                    waiting.append((name, depth + 1))
    return digest.hexdigest()


def _watched(folder: Path, depth: int) -> list[os.DirEntry[str]]:
    """Folders, and near the place other files and links than those with names of images."""
    is_near = depth <= _LIST_DEPTH
    with os.scandir(folder) as entries:
        watched = [
            entry
            for entry in entries
            if entry.is_dir(follow_symlinks=False) or (is_near and not is_image(entry.name))
        ]
    return sorted(
        (entry for entry in watched if is_shown(entry.name)), key=lambda entry: entry.name
    )


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link that leads nowhere
        return entry.stat(follow_symlinks=False)


def _state(status: os.stat_result) -> bytes:
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return f"\0{size}\0{status.st_mtime_ns}\0".encode()
