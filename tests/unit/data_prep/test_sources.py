from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import MNIST

from data_prep import DATASETS, DataError, Dataset, get_dataset, sources
from data_prep.sources import Split, generate, read

MNIST_FILES = get_dataset("mnist").raw_files

#: Class counts of the two splits as published on the MNIST page.
MNIST_HISTOGRAM = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}

needs_data = pytest.mark.skipif(
    not os.environ.get("TERNFORGE_DATA"), reason="TERNFORGE_DATA is not set"
)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The published format: two zero bytes, type 8, dimensions, sizes big-endian, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def read_idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def test_each_digit_of_scikit_learn_is_in_one_split_enlarged_as_pillow_does(tmp_path: Path) -> None:
    splits = read(get_dataset("digits"), None, tmp_path)
    bunch = load_digits()
    enlarged: dict[int, list[np.ndarray]] = {}
    for image, label in zip(bunch.images, bunch.target, strict=True):
        small = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8))
        large = np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        enlarged.setdefault(int(label), []).append(large)
    used = {label: np.zeros(len(pictures), dtype=int) for label, pictures in enlarged.items()}
    for images, labels in splits.values():
        for image, label in zip(images[..., 0].astype(int), labels.tolist(), strict=True):
            distance = np.abs(np.stack(enlarged[label]) - image).max(axis=(1, 2))
            assert distance.min() <= 1  # rounding
            used[label][distance.argmin()] += 1
    assert all((counts == 1).all() for counts in used.values())


def test_digits_split_has_a_fifth_of_each_class(tmp_path: Path) -> None:
    splits = read(get_dataset("digits"), None, tmp_path)
    assert len(splits["train"].labels) == 1437 and len(splits["test"].labels) == 360
    total = np.bincount(load_digits().target)
    assert np.abs(np.bincount(splits["test"].labels) - total / 5).max() < 1


@needs_data
def test_mnist_is_what_its_files_say(tmp_path: Path) -> None:
    splits = read(get_dataset("mnist"), None, tmp_path)
    raw = Path(os.environ["TERNFORGE_DATA"]) / "mnist" / "MNIST" / "raw"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(raw / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(raw / f"{prefix}-labels-idx1-ubyte.gz")
        assert np.array_equal(splits[split].images[..., 0], images)
        assert np.array_equal(splits[split].labels, labels)
        assert np.bincount(splits[split].labels).tolist() == MNIST_HISTOGRAM[split]


@needs_data
def test_unpacked_files_of_mnist_are_read_as_the_packed_ones(tmp_path: Path) -> None:
    source = Path(os.environ["TERNFORGE_DATA"]) / "mnist" / "MNIST" / "raw"
    raw = tmp_path / "root" / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        packed = source / Path(name).name
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    scratch = [tmp_path / "packed", tmp_path / "unpacked"]
    for folder in scratch:
        folder.mkdir()
    expected = read(get_dataset("mnist"), None, scratch[0])
    unpacked = read(get_dataset("mnist"), tmp_path / "root", scratch[1])
    for split in ("train", "test"):
        assert np.array_equal(unpacked[split].images, expected[split].images)
        assert np.array_equal(unpacked[split].labels, expected[split].labels)


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with unpacked files in MNIST's format: 50 images to train, 20 to test."""
    raw = tmp_path / "root" / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.RandomState(0)
    for prefix, count in (("train", 50), ("t10k", 20)):
        images = random.randint(0, 256, (count, 28, 28))
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in raw.iterdir()}
    monkeypatch.setattr(sources, "_UNPACKED_MNIST", sums)
    return tmp_path / "root"


def test_unpacked_files_in_the_format_of_mnist_are_read(small_mnist: Path, tmp_path: Path) -> None:
    row = replace(get_dataset("mnist"), counts={"train": 50, "test": 20})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    splits = read(row, small_mnist, scratch)
    expected = np.random.RandomState(0).randint(0, 256, (50, 28, 28))
    assert np.array_equal(splits["train"].images[..., 0], expected)
    assert splits["test"].labels.tolist() == [n % 10 for n in range(20)]


def test_a_count_that_is_not_that_of_the_row_is_an_error(small_mnist: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(DataError, match="train split has 50 images and 50 labels instead of 60000"):
        read(get_dataset("mnist"), small_mnist, scratch)


@pytest.mark.parametrize("number", range(4))
def test_one_wrong_bit_in_an_unpacked_file_is_an_error_that_names_it(
    number: int, small_mnist: Path, tmp_path: Path
) -> None:
    damaged = (small_mnist / "mnist" / MNIST_FILES[number]).with_suffix("")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(DataError, match=rf"^{damaged} is damaged .* replace the file$"):
        read(get_dataset("mnist"), small_mnist, scratch)


@pytest.mark.parametrize(("label", "found"), [(-1, "-1 to 9"), (10, "0 to 10")])
def test_a_label_without_a_class_is_an_error(
    label: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = sources.READERS["digits"]

    def mislabeled(dataset: Dataset, folder: Path, scratch: Path) -> dict[str, Split]:
        splits = digits(dataset, folder, scratch)
        splits["test"].labels[5] = label
        return splits

    monkeypatch.setitem(sources.READERS, "digits", mislabeled)
    with pytest.raises(DataError, match=f"the test split has labels from {found}, not from 0 to 9"):
        read(get_dataset("digits"), None, tmp_path)


@needs_data
def test_a_damaged_gz_is_an_error_that_names_it_and_stays_untouched(tmp_path: Path) -> None:
    source = Path(os.environ["TERNFORGE_DATA"]) / "mnist" / "MNIST" / "raw"
    raw = tmp_path / "root" / "mnist" / "MNIST" / "raw"
    shutil.copytree(source, raw, copy_function=shutil.copyfile)
    raw.chmod(0o755)
    damaged = raw / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(DataError, match=rf"{damaged} is damaged .* replace the file"):
        read(get_dataset("mnist"), tmp_path / "root", scratch)
    assert damaged.read_bytes() == content


def test_missing_files_without_network_are_one_line_that_says_where_to_put_them(
    tmp_path: Path, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "nowhere"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(DataError) as caught:
        read(get_dataset("mnist"), root, scratch)
    line = str(caught.value)
    assert "\n" not in line and str(root / "mnist") in line and "TERNFORGE_DATA" in line
    assert all(name in line for name in MNIST_FILES)
    assert not root.exists()
    assert capfd.readouterr() == ("", "")


@needs_data
def test_missing_files_are_downloaded_whole_into_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = Path(os.environ["TERNFORGE_DATA"]) / "mnist" / "MNIST" / "raw"

    class QuietHandler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(source)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    splits = read(get_dataset("mnist"), tmp_path / "root", scratch)
    server.shutdown()
    server.server_close()
    assert len(splits["train"].labels) == 60_000
    raw = tmp_path / "root" / "mnist" / "MNIST" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(
        Path(name).name for name in MNIST_FILES
    )
    assert all((raw / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def rude_server() -> Iterator[Callable[[bytes], str]]:
    """Start web servers that give one answer, whatever they are asked, and hang up."""
    listeners = []

    def start(answer: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener is closed at the end
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(10_000)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield start
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-nonsense\r\n", "SSH-2.0-nonsense"),  # BadStatusLine
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",  # IncompleteRead
            "IncompleteRead",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", "not found or corrupted"),
    ],
)
def test_a_server_that_answers_nonsense_is_one_line(
    answer: bytes,
    reason: str,
    rude_server: Callable[[bytes], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MNIST, "mirrors", [rude_server(answer)])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(DataError, match=rf"cannot be downloaded \(.*{reason}") as caught:
        read(get_dataset("mnist"), tmp_path / "root", scratch)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "root").exists()


def test_two_that_place_the_same_file_at_once_both_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, target = tmp_path / "whole", tmp_path / "root" / "file"
    whole.write_bytes(bytes(range(256)) * 1000)
    target.parent.mkdir()
    both_have_copied = threading.Barrier(2, timeout=30)
    replace_file = Path.replace

    def replace_together(path: Path, to: Path) -> Path:
        both_have_copied.wait()
        return replace_file(path, to)

    monkeypatch.setattr(Path, "replace", replace_together)
    with ThreadPoolExecutor(2) as pool:
        for placed in [pool.submit(sources._place, whole, target) for _ in range(2)]:
            placed.result()
    assert target.read_bytes() == whole.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_cannot_be_placed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "whole").touch()
    target = tmp_path / "root" / "file"
    target.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        sources._place(tmp_path / "whole", target)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", DATASETS)
def test_generated_images_have_the_shape_of_the_row_and_can_be_told_apart(name: str) -> None:
    row = DATASETS[name]
    splits = generate(row, (64, 32))
    shape = (row.image_size, row.image_size, row.channels)
    assert splits["train"].images.shape == (64, *shape)
    assert splits["test"].images.shape == (32, *shape)
    assert splits["train"].images.dtype == np.uint8
    again = generate(row, (64, 32))
    assert np.array_equal(splits["train"].images, again["train"].images)
    # The nearest training image has the test image's class.
    train = splits["train"].images.reshape(64, -1).astype(float)
    for image, label in zip(splits["test"].images, splits["test"].labels, strict=True):
        nearest = np.square(train - image.reshape(-1)).sum(axis=1).argmin()
        assert splits["train"].labels[nearest] == label
