"""Downloads that resume, and that appear under their name only when they are whole and right."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.datasets import DataError, Download, one_line_for_os_errors
from data_prep.locks import exclusive, wait_for_disk
from data_prep.raw.splits import Progress, Source

#: Seconds that a silent server is waited for.
_TIMEOUT = 20.0
#: Seconds of rest before each new attempt, when a connection broke or a server is overloaded.
_RESTS = (1.0, 4.0, 10.0)
#: An attempt that brought so many bytes does not count as a failed one.
_PROGRESS_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 18
#: Disk space that is left free.
_SPARE_BYTES = 64 << 20


class _Broken(Exception):
    """The connection broke, or the server is overloaded: worth another attempt."""


class _Refused(Exception):
    """This URL does not give the file."""


class _State(NamedTuple):
    """What is known of a partial file: kept beside it, so that another process can resume.

    Attributes:
        url: where it comes from.
        version: ETag or date by which the server tells whether its file has changed; may be empty.
        total: bytes of the whole file; 0 where the server does not say.
    """

    url: str
    version: str
    total: int


def fetch(source: Source, download: Download) -> Path:
    """Bring a file to ``<place>/<download.path>``, unless it is there, and say where it is.

    What has arrived stays in a ``.part`` file beside it when the connection breaks or the process
    is killed; the next call goes on from there. One of several processes loads it, the others
    wait.

    Args:
        source: the data set, and the folder of its raw files; a file that is there is compared
            with the published MD5 if ``check`` is set, a new one always.
        download: the file.

    Raises:
        DataError: one line: when the file is not the published one; when no server gives it, with
            what to put where by hand; when the disk is too full or cannot be written.
    """
    dataset, place, tell = source.dataset, source.place, source.tell
    target = place / download.path
    if place.is_file():
        raise DataError(f"{place} is a file: {dataset.name} wants a folder with {dataset.raw}")
    with one_line_for_os_errors(f"cannot download {target.name}", target.parent):
        if target.exists():
            if source.check and download.md5:
                check_md5(target, download.md5)
            return target
        new_folders = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        wait = f"wait for the process that downloads {target.name}"
        with exclusive(target.parent / ".download.lock", lambda: tell(wait, 0, 1)):
            if target.exists():
                return target
            reasons = []
            for url in download.urls:
                try:
                    _fetch_from(url, download, target, tell)
                    return target
                except (_Broken, _Refused) as error:
                    reasons.append(f"{urllib.parse.urlsplit(url).hostname}: {error}")
        for folder in new_folders:
            if not any(folder.iterdir()):
                folder.rmdir()
    raise DataError(
        f"no {target.name} in {target.parent}, and it cannot be downloaded "
        f"({'; '.join(reasons)}): put {dataset.raw} into {place}, or point data.raw to where they "
        f"are, or data.root or TERNFORGE_DATA to the folder that holds {dataset.name}/"
    )


def check_md5(path: Path, expected: str) -> None:
    """Compare a raw file with its published MD5.

    Raises:
        DataError: when it is another file.
    """
    if _md5(path) != expected:
        raise DataError(
            f"{path} is not the published file (its MD5 is not {expected}): replace it, or take it "
            "as it is with data.check_raw=false"
        )


def _fetch_from(url: str, download: Download, target: Path, tell: Progress) -> None:
    part = target.with_name(f"{target.name}.part")
    state_file = part.with_name(f"{part.name}.json")
    rests = iter(_RESTS)
    while True:
        before = _size(part)
        try:
            _receive(url, download, part, state_file, tell)
            break
        except _Broken:
            if _size(part) - before >= _PROGRESS_BYTES:
                rests = iter(_RESTS)
            rest = next(rests, None)
            if rest is None:
                raise
            time.sleep(rest)
    problem = _problem_of(part, download)
    if problem:
        part.unlink()
        state_file.unlink()
        raise _Refused(f"its file {problem}")
    wait_for_disk(part)
    part.replace(target)
    state_file.unlink()
    wait_for_disk(target.parent)


def _problem_of(part: Path, download: Download) -> str:
    """Why what has arrived is not the file that was wanted; empty where it is."""
    if download.md5:
        found = _md5(part)
        return "" if found == download.md5 else f"has the MD5 {found} instead of {download.md5}"
    if download.path.endswith(".zip"):
        try:
            zipfile.ZipFile(part).close()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            return f"is no whole ZIP archive ({error})"
    return ""


def _receive(url: str, download: Download, part: Path, state_file: Path, tell: Progress) -> None:
    """One request: what is still missing of the file goes to the end of ``part``."""
    state = _read_state(state_file, url)
    done = _size(part)
    if state and done == state.total:
        return
    if not state or done > state.total:
        done = 0
    request = urllib.request.Request(url, headers={"User-Agent": "ternforge"})
    if state and done:
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", state.version)
    with _open(request) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            done = 0
        elif _first_byte(response) != done:
            state_file.unlink(missing_ok=True)
            raise _Broken("the server sends another part than it was asked for")
        length = int(response.headers.get("Content-Length") or 0)
        total = done + length if length else 0
        if total and download.bytes and total != download.bytes:
            raise _Refused(f"it offers {total:,} bytes instead of {download.bytes:,}")
        if not (length or download.bytes or download.md5):
            raise _Refused("it does not say how long the file is: whether all came is not known")
        _check_space(part.parent, length or download.bytes)
        state_file.write_text(json.dumps(_State(url, _version(response), total)))
        with part.open("ab" if done else "wb") as file:
            for chunk in _chunks(response):
                done += len(chunk)
                if download.bytes and done > download.bytes:
                    part.unlink()
                    raise _Refused(f"it sends more than {download.bytes:,} bytes")
                file.write(chunk)
                tell(f"download {download.path}", done, total or download.bytes)
    if not done:
        raise _Refused("it sends an empty file")
    expected = total or download.bytes
    if expected and done != expected:
        raise _Broken(f"the connection broke after {done:,} of {expected:,} bytes")


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """The server's answer; only http and https are spoken, also where a server leads elsewhere."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        return opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        overloaded = error.code >= 500 or error.code == http.client.TOO_MANY_REQUESTS
        kind = _Broken if overloaded else _Refused
        raise kind(f"the server says {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _Refused(_first_line(error.reason)) from None  # no connection at all
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_first_line(error)) from None


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK_BYTES):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_first_line(error)) from None


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise DataError(
            f"{folder} has {free / 1e6:,.0f} MB left, too little for a download of "
            f"{needed / 1e6:,.0f} MB"
        )


def _first_line(error: object) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason.splitlines()[0]


def _first_byte(response: http.client.HTTPResponse) -> int:
    """Of ``Content-Range: bytes 100-199/200``: 100."""
    first = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdecimal() else -1


def _version(response: http.client.HTTPResponse) -> str:
    """What ``If-Range`` may name: a strong ETag, or the date of the last change."""
    etag = response.headers.get("ETag", "")
    if etag.startswith('"'):
        return etag
    return response.headers.get("Last-Modified", "")


def _read_state(path: Path, url: str) -> _State | None:
    """The state of a partial file that can be resumed, else None: then it starts again."""
    try:
        state = _State(*json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return state if state.url == url and state.version and state.total else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
