"""The folder of a prepared data set: written by one process alone, whole or not there at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data_prep.datasets import DATASETS
from data_prep.locks import exclusive, wait_for_disk

#: Folders that a killed process may have left; whatever else ends in .partial is somebody else's.
_PARTIAL = re.compile(rf"({'|'.join(DATASETS)})-[0-9a-f]{{10}}\.partial")


@contextmanager
def only_one(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Be the only process that makes a folder; the folders around it are made if need be.

    Args:
        folder: that is to be made.
        on_wait: called before this process waits for another one.
    """
    new: list[Path] = []
    with ExitStack() as stack:
        stack.callback(_remove_empty, new)
        while True:
            new[:] = [parent for parent in folder.parents if not parent.exists()]
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(exclusive(_lock_file(folder), on_wait))
                break
            except FileNotFoundError:
                continue  # the process that made the folders has failed and removed them
        yield


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty: it is of use
            folder.rmdir()


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, which is renamed to it at the end, or removed at an error.

    To be used under ``only_one``. What killed processes have left is removed before.

    Yields:
        The new folder, empty.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    for other in folder.parent.glob("*.partial"):
        if _PARTIAL.fullmatch(other.name):
            _remove_if_abandoned(other)
    try:
        partial.mkdir()
        yield partial
        wait_for_disk(partial)
        partial.rename(folder)
        wait_for_disk(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _remove_if_abandoned(partial: Path) -> None:
    """Remove a folder and its lock file, which is there, and which nobody holds any more."""
    lock_file = _lock_file(partial.with_suffix(""))
    # There is no lock file: it is not ours; it is held: somebody is at work there; or no right to.
    with (
        suppress(FileNotFoundError, BlockingIOError, PermissionError),
        lock_file.open("r+") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), lock_file.stat()):
            shutil.rmtree(partial, ignore_errors=True)
            lock_file.unlink()
