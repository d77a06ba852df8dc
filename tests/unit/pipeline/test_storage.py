from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.remote_storage import RemoteStorage
from pipeline.checkpoints.state import Progress, Snapshot
from pipeline.checkpoints.storage import (
    DamagedError,
    LocalStorage,
    Storage,
    check_storage,
    storage_of,
)
from pipeline.checkpoints.store import CheckpointStore, Position
from pipeline.checkpoints.writer import CheckpointWriter
from pipeline.config import Experiment, PipelineError
from pipeline.settings import build_experiment
from tests.unit.pipeline.small_training import ROW, ROWS, make_step, small_training

FILES = {"a.bin", "b.bin"}


def experiment(folder: str | None) -> Experiment:
    values = {"name": "x", "dataset": "digits", "backbone": "lenet5"}
    return build_experiment({**values, "checkpoint": {"folder": folder}})


class Bucket:
    """What is in a bucket, asked for past the pipeline."""

    def __init__(self, client: Any) -> None:
        self.client = client
        client.create_bucket(Bucket="bucket")

    def objects(self) -> list[str]:
        return [
            entry["Key"] for entry in self.client.list_objects(Bucket="bucket").get("Contents", [])
        ]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket="bucket", Key=key)["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=content)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.client.delete_object(Bucket="bucket", Key=key)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server that speaks S3 over HTTP, and its address; it takes seconds to import."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def bucket(credentials: None) -> Iterator[Bucket]:
    import boto3

    bucket = Bucket(boto3.client("s3"))
    yield bucket
    bucket.delete(*bucket.objects())
    bucket.client.delete_bucket(Bucket="bucket")


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return LocalStorage(tmp_path / "checkpoints")
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return RemoteStorage("s3://bucket/runs/x")
    return RemoteStorage(f"memory://{tmp_path.name}")


def test_what_was_written_is_read_back_and_gone_when_it_is_removed(storage):
    assert storage.names() == []
    storage.write("first", {"a.bin": [b"one ", memoryview(b"two")], "b.bin": []})
    storage.write("second", {"a.bin": [b"three"]})
    assert sorted(storage.names()) == ["first", "second"]
    files = storage.open("first", FILES)
    assert {name: path.read_bytes() for name, path in files.items()} == {
        "a.bin": b"one two",
        "b.bin": b"",
    }
    assert storage.open("second", FILES)["a.bin"].read_bytes() == b"three"
    storage.remove("first")
    assert storage.names() == ["second"]
    with pytest.raises(DamagedError):
        storage.open("first", FILES)


def test_a_folder_is_written_over_as_a_whole(storage):
    storage.write("first", {"a.bin": [b"one"], "b.bin": [b"two"]})
    assert storage.open("first", FILES).keys() == FILES
    storage.write("first", {"a.bin": [b"three"]})
    files = storage.open("first", FILES)
    assert {name: path.read_bytes() for name, path in files.items()} == {"a.bin": b"three"}


def test_a_write_that_fails_half_way_leaves_nothing(storage):
    def content() -> Iterator[bytes]:
        yield b"half"
        raise OSError("the reader has gone")

    storage.write("first", {"a.bin": [b"whole"]})
    with pytest.raises(OSError, match="the reader has gone"):
        storage.write("second", {"a.bin": [b"whole"], "b.bin": content()})
    assert storage.names() == ["first"]


@pytest.mark.slow
def test_a_folder_without_its_manifest_is_not_there_on_s3_and_goes_with_the_next_write(bucket):
    storage = RemoteStorage("s3://bucket/runs/x")
    bucket.put("runs/x/killed/a.bin", b"half of it")
    assert storage.names() == []
    storage.write("first", {"a.bin": [b"whole"]})
    assert bucket.objects() == ["runs/x/first/a.bin", "runs/x/first/manifest.json"]


@pytest.mark.slow
def test_other_objects_of_the_bucket_are_left_alone(bucket):
    others = ["other.txt", "runs/x.txt", "runs/xy/first/a.bin", "runs/x/notes.txt"]
    for key in others:
        bucket.put(key, b"of somebody else")
    storage = RemoteStorage("s3://bucket/runs/x")
    storage.write("first", {"a.bin": [b"whole"]})
    storage.remove("first")
    assert sorted(bucket.objects()) == sorted(others)


def test_a_training_is_restored_from_any_storage_bit_for_bit(storage):
    state = small_training("adamw")
    writer = CheckpointWriter(CheckpointStore(storage, "identity"))
    for number in range(3):
        make_step(state, number)
        writer.start(state, Progress(0, number + 1, [], number + 1), ROWS)
    writer.wait()
    # Another machine knows the place, and nothing else.
    there = LocalStorage(storage.folder) if isinstance(storage, LocalStorage) else None
    store = CheckpointStore(there or RemoteStorage(storage.place), "identity")
    position = store.newest(pytest.fail)
    assert position == Position(0, 3)
    again = small_training("adamw")
    store.load(position, again, ROW)
    for training in (state, again):
        make_step(training, 3)
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert sorted(storage.names()) == ["epoch-0000-step-000002", "epoch-0000-step-000003"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("cut short", "model.safetensors holds 9 bytes of"),
        ("flipped", "model.safetensors does not match its checksum"),
        ("missing", "model.safetensors is missing"),
        ("manifest", "its manifest is damaged"),
        ("large manifest", "its manifest is damaged"),
    ],
)
def test_a_damaged_checkpoint_on_s3_is_named_and_the_one_before_it_wins(bucket, case, reason):
    store = CheckpointStore(RemoteStorage("s3://bucket"), "identity")
    for epoch in (1, 2):
        store.save(Snapshot.of(small_training(), Progress(epoch, epoch, [{}] * epoch)))
    key, manifest = "epoch-0002/model.safetensors", "epoch-0002/manifest.json"
    content = bytearray(bucket.read(key))
    match case:
        case "cut short":
            bucket.put(key, content[:9])
        case "flipped":
            content[-1] ^= 1
            bucket.put(key, content)
        case "missing":
            bucket.delete(key)
        case "manifest":
            bucket.put(manifest, b"{")
        case "large manifest":
            bucket.put(manifest, b" " * 100_000 + bucket.read(manifest))
    lines: list[str] = []
    again = CheckpointStore(RemoteStorage("s3://bucket"), "identity")
    assert again.newest(lines.append) == Position(1)
    assert lines == [f"checkpoint epoch-0002 is skipped: {reason}"] or reason in lines[0]
    again.load(Position(1), small_training(), ROW)


UPLOADER = textwrap.dedent(
    """
    import itertools, sys
    from pipeline.checkpoints.remote_storage import RemoteStorage
    storage = RemoteStorage("s3://bucket/runs/x")
    for number in itertools.count():
        content = [bytes([number]) * 200_000]
        storage.write(f"epoch-{number}", {name: content for name in "abc"})
        print(number, flush=True)
    """
)


@pytest.mark.slow
def test_an_upload_killed_at_any_time_leaves_only_whole_folders(bucket):
    """Three times, each at another moment of an upload."""
    for delay in (0.0, 0.02, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-c", UPLOADER],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        assert process.stdout is not None
        for _ in range(4):
            last = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        process.communicate()
        storage = RemoteStorage("s3://bucket/runs/x")
        numbers = sorted(int(name.removeprefix("epoch-")) for name in storage.names())
        assert numbers[: last + 1] == list(range(last + 1))
        for number in numbers:
            for file in storage.open(f"epoch-{number}", {"a", "b", "c"}).values():
                assert file.read_bytes() == bytes([number]) * 200_000
            storage.remove(f"epoch-{number}")
        storage.write("last", {"a": [b"whole"]})
        assert bucket.objects() == ["runs/x/last/a", "runs/x/last/manifest.json"]
        storage.remove("last")


def test_where_checkpoints_lie_is_decided_by_the_experiment(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "x" / "20260101-000000-abc"
    assert storage_of(experiment(None), run).place == str(run / "checkpoints")
    below = f"x/{run.name}"
    assert storage_of(experiment(str(tmp_path)), run).place == f"{tmp_path}/{below}"
    assert storage_of(experiment(f"file://{tmp_path}/"), run).place == f"{tmp_path}/{below}"
    assert storage_of(experiment("memory://all/"), run).place == f"memory://all/{below}"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage_of(experiment("~/kept"), run).place == f"{tmp_path}/kept/{below}"
    monkeypatch.chdir(tmp_path)
    assert storage_of(experiment("kept"), run).place == f"{tmp_path}/kept/{below}"


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_storage(experiment(None))
    for folder in (str(tmp_path), f"{tmp_path}/new/folder", f"file://{tmp_path}"):
        check_storage(experiment(folder))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_so_is_a_bucket(bucket):
    check_storage(experiment("s3://bucket/a"))
    assert bucket.objects() == []


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("nope://bucket/x", "cannot be used: Protocol not known: nope; take a folder, or a URI as"),
        ("gs://bucket/x", "needs a package that is not installed: Please install gcsfs"),
        ("{tmp_path}/file/x", "cannot be kept in checkpoint.folder={tmp_path}/file/x: Not a dir"),
        ("/proc/x", "cannot be kept in checkpoint.folder=/proc/x: No such file or directory"),
        ("http://127.0.0.1:9/x", "cannot be kept in checkpoint.folder=http://127.0.0.1:9/x: "),
    ],
)
def test_a_place_that_is_none_is_refused_in_a_line(tmp_path, folder, problem):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError) as raised:
        check_storage(experiment(folder.replace("{tmp_path}", str(tmp_path))))
    assert problem.replace("{tmp_path}", str(tmp_path)) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("s3://missing/x", "checkpoint.folder=s3://missing/x: The specified bucket does not exist"),
        ("s3://", "cannot be kept in checkpoint.folder=s3://: "),
        ("s3://user:pass@word@bucket/x", "cannot be kept in checkpoint.folder=s3://bucket/x: "),
    ],
)
def test_so_is_a_bucket_that_is_none(bucket, folder, problem):
    with pytest.raises(PipelineError) as raised:
        check_storage(experiment(folder))
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "pass@word" not in str(raised.value)
    assert [entry["Name"] for entry in bucket.client.list_buckets()["Buckets"]] == ["bucket"]


@pytest.mark.slow
def test_credentials_that_the_server_refuses_are_a_line_without_them(monkeypatch):
    """A server that says 403 to everything, as S3 does to a wrong key."""
    answer = (
        b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: 72\r\n"
        b"Connection: close\r\n\r\n"
        b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    )
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    with pytest.raises(PipelineError, match="Access Denied") as raised:
        check_storage(experiment("s3://bucket/x"))
    listener.close()
    assert "the-" not in str(raised.value)


@pytest.mark.slow
def test_storage_that_never_answers_is_given_up(monkeypatch):
    """A server that takes the connection and says nothing."""
    monkeypatch.setattr("pipeline.checkpoints.storage._PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        started = time.monotonic()
        with pytest.raises(PipelineError, match=r"no answer within 0\.5 seconds"):
            check_storage(experiment("s3://bucket/x"))
    assert time.monotonic() - started < 5
