from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep import DataError, get_dataset
from data_prep.datasets import Download
from data_prep.raw import downloads
from data_prep.raw.downloads import fetch
from data_prep.raw.splits import Source
from tests.unit.data_prep.raw_files import silent

CONTENT = bytes(range(256)) * 12_000  # 3 MB
MD5 = hashlib.md5(CONTENT).hexdigest()

ROW = get_dataset("svhn")


@dataclass
class Behavior:
    """Of a server.

    Attributes:
        content: of its only file.
        etag: sent if not empty.
        ranges: whether it answers requests for a part.
        broken: for each request, after how many bytes the connection is cut.
        announced: length that is announced instead of the true one.
        status: of answers that are errors, for each request.
        location: where it leads to instead.
        chunked: no length is announced.
        pause: seconds between two pieces of 64 KiB.
        requests: what was asked for: the range or "".
    """

    content: bytes = CONTENT
    etag: str = '"one"'
    ranges: bool = True
    broken: list[int] = field(default_factory=list)
    announced: int | None = None
    status: list[int] = field(default_factory=list)
    location: str = ""
    chunked: bool = False
    pause: float = 0.0
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behavior: Behavior

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        behavior = self.behavior
        wanted = self.headers.get("Range", "")
        behavior.requests.append(wanted)
        self.close_connection = True
        if behavior.status:
            self.send_error(behavior.status.pop(0))
            return
        if behavior.location:
            self.send_response(302)
            self.send_header("Location", behavior.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        unchanged = self.headers.get("If-Range") == behavior.etag
        first = 0
        if wanted and behavior.ranges and unchanged:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = behavior.content[first:]
        self.send_response(206 if first else 200)
        if first:
            last = len(behavior.content)
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{last}")
        if behavior.etag:
            self.send_header("ETag", behavior.etag)
        if not behavior.chunked:
            length = len(body) if behavior.announced is None else behavior.announced - first
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if behavior.broken:
            body = body[: behavior.broken.pop(0)]
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), 1 << 16):
                self.wfile.write(body[start : start + (1 << 16)])
                time.sleep(behavior.pause)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behavior], str]]:
    """Start web servers; gives the URL of each one's file."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "_RESTS", (0.0, 0.0, 0.0))
    servers = []

    def start(behavior: Behavior) -> str:
        handler = type("OneHandler", (Handler,), {"behavior": behavior})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/file.bin"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def from_url(
    *urls: str, md5: str | None = MD5, size: int = len(CONTENT), path: str = "raw/file.bin"
) -> Download:
    return Download(path, urls, md5, size)


def source(place: Path, check: bool = True) -> Source:
    return Source(ROW, place, place, check, silent)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def start_fetching(download: Download, place: Path) -> subprocess.Popen[str]:
    """A process that downloads and prints its progress."""
    code = f"""
from pathlib import Path
from data_prep import get_dataset
from data_prep.datasets import Download
from data_prep.raw.downloads import fetch
from data_prep.raw.splits import Source
place = Path({str(place)!r})
fetch(Source(get_dataset("svhn"), place, place, True, print), {download!r})
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_file_arrives_whole_with_its_progress_and_nothing_beside_it(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    url = serve(Behavior())
    path = fetch(
        Source(ROW, tmp_path, tmp_path, True, lambda *said: told.append(said)), from_url(url)
    )
    assert path == tmp_path / "raw" / "file.bin" and path.read_bytes() == CONTENT
    assert files(tmp_path) == {"file.bin"}
    assert {stage for stage, _, _ in told} == {"download raw/file.bin"}
    done = [done for _, done, _ in told]
    assert done == sorted(done) and told[-1][1:] == (len(CONTENT), len(CONTENT))


def test_a_broken_connection_goes_on_where_it_broke(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    behavior = Behavior(broken=[1_000_000, 500_000])
    path = fetch(source(tmp_path), from_url(serve(behavior)))
    assert path.read_bytes() == CONTENT
    assert behavior.requests == ["", "bytes=1000000-", "bytes=1500000-"]


def test_attempts_that_bring_much_are_not_counted(
    serve: Callable[[Behavior], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_PROGRESS_BYTES", 200_000)
    behavior = Behavior(broken=[300_000] * 10)
    assert fetch(source(tmp_path), from_url(serve(behavior))).exists()
    assert len(behavior.requests) == 11


def test_a_killed_download_goes_on_in_the_next_process(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    behavior = Behavior(pause=0.05)
    download = from_url(serve(behavior))
    process = start_fetching(download, tmp_path)
    part = tmp_path / "raw" / "file.bin.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    behavior.pause = 0.0
    done = part.stat().st_size
    assert 0 < done < len(CONTENT) and not (tmp_path / "raw" / "file.bin").exists()
    assert fetch(source(tmp_path), download).read_bytes() == CONTENT
    assert behavior.requests == ["", f"bytes={done}-"]
    assert files(tmp_path) == {"file.bin"}


@pytest.mark.parametrize(
    "now",
    [Behavior(ranges=False), Behavior(etag='"two"'), Behavior(etag="")],
    ids=["no ranges", "another version", "no version"],
)
def test_what_cannot_be_resumed_starts_again(
    now: Behavior, serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    part = tmp_path / "raw" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(b"of the old version" * 1000)
    url = serve(now)
    state = {"url": url, "version": '"one"', "total": len(CONTENT)}
    part.with_name("file.bin.part.json").write_text(json.dumps(list(state.values())))
    assert fetch(source(tmp_path), from_url(url)).read_bytes() == CONTENT
    assert len(now.requests) == 1 and now.requests[0].startswith("bytes=")


@pytest.mark.parametrize("state", ["", "{", "[1]", '["http://other/", "\\"one\\"", 9]', None])
def test_a_part_of_unknown_origin_starts_again(
    state: str | None, serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    part = tmp_path / "raw" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(b"whatever")
    if state is not None:
        part.with_name("file.bin.part.json").write_text(state)
    behavior = Behavior()
    path = fetch(source(tmp_path), from_url(serve(behavior)))
    assert path.read_bytes() == CONTENT and behavior.requests == [""]
    assert files(tmp_path) == {"file.bin"}


def test_a_whole_part_is_not_asked_for_again(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    behavior = Behavior()
    url = serve(behavior)
    part = tmp_path / "raw" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    part.with_name("file.bin.part.json").write_text(json.dumps([url, '"one"', len(CONTENT)]))
    assert fetch(source(tmp_path), from_url(url)).read_bytes() == CONTENT
    assert behavior.requests == []


@pytest.mark.parametrize(
    ("behavior", "size", "reason"),
    [
        (Behavior(announced=len(CONTENT) + 5), 0, "the connection broke after 3,072,000 of 3,072,"),
        (
            Behavior(content=b"<html>log in</html>"),
            len(CONTENT),
            "it offers 19 bytes instead of 3,",
        ),
        (Behavior(content=CONTENT * 2, chunked=True), len(CONTENT), "it sends more than 3,072,000"),
        (Behavior(content=b""), 0, "it sends an empty file"),
        (Behavior(status=[404]), 0, "the server says 404 Not Found"),
        (Behavior(status=[503] * 9), 0, "the server says 503 Service Unavailable"),
        (Behavior(location="file:///etc/passwd"), 0, "the server says 302 Found - Redirection to"),
        (Behavior(location="ftp://127.0.0.1/x"), 0, "unknown url type: ftp"),
    ],
    ids=["too long", "log-in page", "endless", "empty", "404", "503", "to a file", "to ftp"],
)
def test_a_server_that_does_not_give_the_file_is_one_line(
    behavior: Behavior,
    size: int,
    reason: str,
    serve: Callable[[Behavior], str],
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError) as caught:
        fetch(source(tmp_path), from_url(serve(behavior), size=size))
    line = str(caught.value)
    assert f"(127.0.0.1: {reason}" in line and "\n" not in line
    assert f"put {ROW.raw} into {tmp_path}" in line and "data.raw" in line
    assert "file.bin" not in files(tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/file.bin", "data:,x"])
def test_only_http_is_spoken(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown url type: (file|ftp|data)"):
        fetch(source(tmp_path), from_url(url))
    assert files(tmp_path) == set()


def test_a_file_with_another_checksum_is_deleted(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    behavior = Behavior(content=CONTENT[:-1] + b"x")
    with pytest.raises(DataError, match=rf"its file has the MD5 \w{{32}} instead of {MD5}\)"):
        fetch(source(tmp_path), from_url(serve(behavior)))
    assert files(tmp_path) == set()


ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("x.jpg", bytes(1000))


@pytest.mark.parametrize(
    ("behavior", "reason"),
    [
        (Behavior(content=b"<html>log in</html>"), "its file is no whole ZIP archive (File is not"),
        (Behavior(content=ZIP.getvalue()[:900]), "its file is no whole ZIP archive (File is not"),
        (Behavior(content=ZIP.getvalue(), chunked=True), "it does not say how long the file is"),
    ],
    ids=["log-in page", "end missing", "unknown length"],
)
def test_an_archive_without_checksum_has_to_be_whole(
    behavior: Behavior, reason: str, serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    download = from_url(serve(behavior), md5=None, size=0, path="a.zip")
    with pytest.raises(DataError) as caught:
        fetch(source(tmp_path), download)
    assert f"(127.0.0.1: {reason}" in str(caught.value) and "\n" not in str(caught.value)
    assert files(tmp_path) == set()


def test_a_whole_archive_without_checksum_is_taken(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    behavior = Behavior(content=ZIP.getvalue())
    download = from_url(serve(behavior), md5=None, size=0, path="a.zip")
    assert fetch(source(tmp_path), download).read_bytes() == ZIP.getvalue()


def test_a_file_without_announced_length_has_that_of_the_row(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    url = serve(Behavior(content=CONTENT[:-1], chunked=True))
    with pytest.raises(DataError, match="the connection broke after 3,071,999 of 3,072,000 bytes"):
        fetch(source(tmp_path), from_url(url, md5=None))


def test_the_next_mirror_is_asked_where_one_fails(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    urls = [serve(Behavior(status=[404])), serve(Behavior(content=b"x" * len(CONTENT)))]
    path = fetch(source(tmp_path), from_url(*urls, serve(Behavior())))
    assert path.read_bytes() == CONTENT and files(tmp_path) == {"file.bin"}


def test_an_overloaded_server_is_asked_again(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    behavior = Behavior(status=[503, 429])
    assert fetch(source(tmp_path), from_url(serve(behavior))).exists()
    assert len(behavior.requests) == 3


def test_no_network_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        fetch(source(tmp_path / "svhn"), ROW.downloads[0])
    assert time.monotonic() - start < 5
    assert str(caught.value) == (
        f"no train_32x32.mat in {tmp_path}/svhn, and it cannot be downloaded "
        "(ufldl.stanford.edu: Connection refused): put train_32x32.mat and test_32x32.mat into "
        f"{tmp_path}/svhn, or point data.raw to where they are, or data.root or TERNFORGE_DATA to "
        "the folder that holds svhn/"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rude_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], str]]:
    """Start servers that give one answer, whatever they are asked; an empty one is silence."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "_RESTS", (0.0,))
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.3)
    listeners = []

    def start(answer: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        held = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener is closed at the end
                while True:
                    connection, _ = listener.accept()
                    connection.recv(10_000)
                    connection.sendall(answer)
                    if answer:
                        connection.close()
                    held.append(connection)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/file.bin"

    yield start
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-nonsense\r\n", "SSH-2.0-nonsense"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", "it has the MD5|its file has the MD5"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 2\r\n\r\nab", "another part than it was asked"),
        (b"", "timed out"),
    ],
    ids=["nonsense", "cut", "short", "part", "silent"],
)
def test_a_rude_server_is_one_line(
    answer: bytes, reason: str, rude_server: Callable[[bytes], str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"cannot be downloaded \(.*({reason})") as caught:
        fetch(source(tmp_path), from_url(rude_server(answer), size=0))
    assert "\n" not in str(caught.value) and "file.bin" not in files(tmp_path)


def test_a_file_that_does_not_fit_the_disk_is_not_begun(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    url = serve(Behavior(announced=10**15))
    with pytest.raises(DataError, match=r"MB left, too little for a download of 1,000,000,000 MB"):
        fetch(source(tmp_path), from_url(url, size=0))
    assert files(tmp_path) == set()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"a file")
    with pytest.raises(DataError, match=rf"^cannot download file\.bin: {tmp_path}/raw: "):
        fetch(source(tmp_path), from_url("http://127.0.0.1:9/x"))


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train_32x32.mat").touch()
    with pytest.raises(DataError, match=r"\.mat is a file: svhn wants a folder with train_32x32"):
        fetch(source(tmp_path / "train_32x32.mat"), ROW.downloads[0])


def test_a_file_that_is_there_is_compared_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"another file")
    download = from_url("http://127.0.0.1:9/file.bin", path="file.bin")
    with pytest.raises(DataError) as caught:
        fetch(source(tmp_path), download)
    assert str(caught.value) == (
        f"{tmp_path}/file.bin is not the published file (its MD5 is not {MD5}): replace it, or "
        "take it as it is with data.check_raw=false"
    )
    fetch(source(tmp_path, check=False), download)
    assert (tmp_path / "file.bin").read_bytes() == b"another file"


def test_of_two_processes_one_downloads_and_the_other_waits(
    serve: Callable[[Behavior], str], tmp_path: Path
) -> None:
    behavior = Behavior(pause=0.02)
    download = from_url(serve(behavior))
    processes = [start_fetching(download, tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("wait for the process that downloads file.bin" in text for text in said) == 1
    assert behavior.requests == [""]
    assert (tmp_path / "raw" / "file.bin").read_bytes() == CONTENT
