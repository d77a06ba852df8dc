from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from data_prep import DataError, get_dataset
from data_prep.raw import arrays
from tests.unit.data_prep.raw_files import (
    images_of,
    needs_data,
    open_here,
    real_data,
    write_files,
    write_tar,
)

#: Class counts of the two splits as published on the MNIST page.
MNIST_HISTOGRAM = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}


def test_each_digit_of_scikit_learn_is_in_one_split_enlarged_as_pillow_does(tmp_path: Path) -> None:
    raw = open_here(get_dataset("digits"), tmp_path)
    bunch = load_digits()
    enlarged: dict[int, list[np.ndarray]] = {}
    for image, label in zip(bunch.images, bunch.target, strict=True):
        small = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8))
        large = np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        enlarged.setdefault(int(label), []).append(large)
    used = {label: np.zeros(len(pictures), dtype=int) for label, pictures in enlarged.items()}
    for split in ("train", "test"):
        images = images_of(raw, split)[..., 0].astype(int)
        for image, label in zip(images, raw.splits[split].labels.tolist(), strict=True):
            distance = np.abs(np.stack(enlarged[label]) - image).max(axis=(1, 2))
            assert distance.min() <= 1  # rounding
            used[label][distance.argmin()] += 1
    assert all((counts == 1).all() for counts in used.values())


def test_digits_split_has_a_fifth_of_each_class(tmp_path: Path) -> None:
    splits = open_here(get_dataset("digits"), tmp_path).splits
    assert len(splits["train"]) == 1437 and len(splits["test"]) == 360
    total = np.bincount(load_digits().target)
    assert np.abs(np.bincount(splits["test"].labels) - total / 5).max() < 1


def idx(array: np.ndarray) -> bytes:
    """MNIST's format: two zero bytes, type 8, dimensions, sizes big-endian, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def small_mnist(place: Path, packed: bool) -> dict[str, np.ndarray]:
    """Files in MNIST's format: 50 images to train, 20 to test; gives the images."""
    random = np.random.RandomState(0)
    images = {}
    for split, prefix, count in (("train", "train", 50), ("test", "t10k", 20)):
        images[split] = random.randint(0, 256, (count, 28, 28))
        contents = {"images-idx3": idx(images[split]), "labels-idx1": idx(np.arange(count) % 10)}
        for kind, content in contents.items():
            name = f"MNIST/raw/{prefix}-{kind}-ubyte"
            packed_files = {f"{name}.gz": gzip.compress(content)}
            write_files(place, packed_files if packed else {name: content})
    return images


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "MNIST", "MNIST/raw"])
def test_files_in_the_format_of_mnist_are_read(packed: bool, place: str, tmp_path: Path) -> None:
    images = small_mnist(tmp_path, packed)
    raw = open_here(get_dataset("mnist"), tmp_path / place, check_raw=False)
    for split in ("train", "test"):
        assert np.array_equal(images_of(raw, split)[..., 0], images[split])
        assert raw.splits[split].labels.tolist() == [n % 10 for n in range(len(images[split]))]
    assert raw.notes == (
        "50 of the 60,000 train images of mnist",
        "20 of the 10,000 test images of mnist",
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("number", range(4))
def test_a_file_of_mnist_that_is_not_the_published_one_is_named(
    number: int,
    packed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_mnist(tmp_path, packed)
    row = get_dataset("mnist")
    # All files but one count as published.
    downloads = []
    for download in row.downloads:
        path = tmp_path / download.path if packed else (tmp_path / download.path).with_suffix("")
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        downloads.append(download._replace(md5=md5))
        monkeypatch.setitem(arrays._UNPACKED_MNIST, path.name, md5)
    wrong = tmp_path / downloads[number].path
    wrong = wrong if packed else wrong.with_suffix("")
    content = bytearray(wrong.read_bytes())
    content[-1] ^= 1
    wrong.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_here(replace(row, downloads=tuple(downloads)), tmp_path)
    assert str(caught.value).startswith(f"{wrong} is not the published file (its MD5 is not ")
    assert str(caught.value).endswith("take it as it is with data.check_raw=false")
    assert wrong.read_bytes() == content


@pytest.mark.parametrize("damage", [b"", b"no gzip", gzip.compress(b"no images", mtime=0)])
def test_a_damaged_file_of_mnist_is_one_line(damage: bytes, tmp_path: Path) -> None:
    small_mnist(tmp_path, packed=True)
    write_files(tmp_path, {"MNIST/raw/t10k-images-idx3-ubyte.gz": damage})
    with pytest.raises(DataError, match="is damaged or of another format") as caught:
        open_here(get_dataset("mnist"), tmp_path, check_raw=False)
    assert "\n" not in str(caught.value)


def test_a_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_mnist(tmp_path, packed=True)
    monkeypatch.setattr(arrays, "_LARGEST_UNPACKED", 1 << 20)
    bomb = gzip.compress(bytes(2 << 20))
    write_files(tmp_path, {"MNIST/raw/t10k-images-idx3-ubyte.gz": bomb})
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte unpacks to more than 1,048,576 by"):
        open_here(get_dataset("mnist"), tmp_path, check_raw=False)


def cifar_files(name: str) -> tuple[dict[str, bytes], dict[str, np.ndarray], dict[str, list[int]]]:
    """Files in the published format, 4 images each, with the images and labels of each split."""
    random = np.random.RandomState(0)
    ten = name == "cifar10"
    folder = "cifar-10-batches-py" if ten else "cifar-100-python"
    parts = {
        "train": [f"data_batch_{n}" for n in range(1, 6)] if ten else ["train"],
        "test": ["test_batch"] if ten else ["test"],
    }
    classes = 10 if ten else 100
    files: dict[str, bytes] = {}
    images: dict[str, np.ndarray] = {}
    labels: dict[str, list[int]] = {}
    for split, batches in parts.items():
        images[split] = random.randint(0, 256, (4 * len(batches), 32, 32, 3), dtype=np.uint8)
        labels[split] = random.randint(0, classes, 4 * len(batches)).tolist()
        for number, batch in enumerate(batches):
            part = slice(4 * number, 4 * number + 4)
            planes = images[split][part].transpose(0, 3, 1, 2).reshape(4, 3072)
            content = {"data": planes, "labels" if ten else "fine_labels": labels[split][part]}
            if not ten:
                content["coarse_labels"] = [0] * 4
            files[f"{folder}/{batch}"] = pickle.dumps(content, protocol=2)
    meta = {"label_names" if ten else "fine_label_names": [f"class {n}" for n in range(classes)]}
    files[f"{folder}/{'batches.meta' if ten else 'meta'}"] = pickle.dumps(meta, protocol=2)
    return files, images, labels


@pytest.mark.parametrize("form", ["folder", "place", "archive", "archive itself"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_files_in_the_format_of_cifar_are_read(name: str, form: str, tmp_path: Path) -> None:
    files, images, labels = cifar_files(name)
    folder = next(iter(files)).partition("/")[0]
    archive = tmp_path / get_dataset(name).downloads[0].path
    place = tmp_path
    if form.startswith("archive"):
        # Other members, hostile ones among them, are never unpacked.
        write_tar(archive, {"../evil": b"evil", f"{folder}/more": b"more", **files})
        place = archive if form == "archive itself" else tmp_path
    else:
        write_files(tmp_path, files)
        place = tmp_path / folder if form == "place" else tmp_path
    raw = open_here(get_dataset(name), place, check_raw=False)
    for split in ("train", "test"):
        assert np.array_equal(images_of(raw, split), images[split])
        assert raw.splits[split].labels.tolist() == labels[split]
    assert raw.class_names[99:] == (("class 99",) if name == "cifar100" else ())
    assert len(raw.class_names) == get_dataset(name).classes
    assert not list(tmp_path.rglob("evil")) and not list(tmp_path.rglob("more"))


def test_a_file_of_cifar_that_is_not_the_published_one_is_named(tmp_path: Path) -> None:
    files, _, _ = cifar_files("cifar10")
    write_files(tmp_path, files)
    with pytest.raises(
        DataError, match=rf"^{tmp_path}/cifar-10-batches-py/data_batch_1 is not the"
    ):
        open_here(get_dataset("cifar10"), tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pickle.dumps({"data": Evil(), "labels": []}), "it would call posix.system"),
        (pickle.dumps({"data": Evil(), "labels": []}, protocol=2), "it would call posix.system"),
        (pickle.dumps({"labels": []}), "data"),
        (b"no pickle", "invalid load key"),
        (b"", "Ran out of input"),
    ],
)
def test_a_pickle_that_is_no_array_is_one_line_and_never_run(
    content: bytes,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files, _, _ = cifar_files("cifar10")
    write_files(tmp_path, {**files, "cifar-10-batches-py/data_batch_3": content})
    with pytest.raises(DataError, match=rf"is damaged or of another format \(.*({problem})"):
        open_here(get_dataset("cifar10"), tmp_path, check_raw=False)
    assert not (tmp_path / "evil").exists()


def test_an_archive_of_cifar_that_is_cut_is_one_line(tmp_path: Path) -> None:
    files, _, _ = cifar_files("cifar100")
    archive = write_tar(tmp_path / "cifar-100-python.tar.gz", files)
    whole = archive.read_bytes()
    for length in range(0, len(whole) - 20, len(whole) // 20):
        archive.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"^{archive} is cut or damaged \(.*\): delete it"):
            open_here(get_dataset("cifar100"), tmp_path, check_raw=False)
    write_tar(archive, {name: files[name] for name in list(files)[:2]})
    with pytest.raises(
        DataError, match=r"tar\.gz has no cifar-100-python/meta: it is another arch"
    ):
        open_here(get_dataset("cifar100"), tmp_path, check_raw=False)


def test_the_label_ten_of_svhn_is_the_digit_zero(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.array([10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1])
    for split in ("train", "test"):
        content = {"X": images.transpose(1, 2, 3, 0), "y": labels[:, np.newaxis]}
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", content)
    raw = open_here(get_dataset("svhn"), tmp_path, check_raw=False)
    for split in ("train", "test"):
        assert np.array_equal(images_of(raw, split), images)
        assert raw.splits[split].labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    with pytest.raises(DataError, match=r"train_32x32\.mat is not the published file .*check_raw"):
        open_here(get_dataset("svhn"), tmp_path)
    (tmp_path / "test_32x32.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(DataError, match=r"test_32x32\.mat is damaged or of another format \("):
        open_here(get_dataset("svhn"), tmp_path, check_raw=False)


def test_images_of_another_size_are_one_line(tmp_path: Path) -> None:
    for split in ("train", "test"):
        content = {"X": np.zeros((30, 32, 3, 5), dtype=np.uint8), "y": np.ones((5, 1))}
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", content)
    with pytest.raises(
        DataError, match=r"train split has images \(5, 30, 32, 3\) of type uint8 for"
    ):
        open_here(get_dataset("svhn"), tmp_path, check_raw=False)


@pytest.mark.parametrize(("label", "found"), [(-1, "-1 to 9"), (10, "0 to 10")])
def test_a_label_without_a_class_is_an_error(label: int, found: str, tmp_path: Path) -> None:
    files, _, _labels = cifar_files("cifar10")
    batch = pickle.loads(files["cifar-10-batches-py/test_batch"]) | {"labels": [0, 1, 9, label]}
    write_files(tmp_path, {**files, "cifar-10-batches-py/test_batch": pickle.dumps(batch)})
    with pytest.raises(
        DataError, match=rf"test split of cifar10 has labels from {found}, not from 0"
    ):
        open_here(get_dataset("cifar10"), tmp_path, check_raw=False)


@needs_data
def test_mnist_is_what_its_files_say() -> None:
    raw = open_here(get_dataset("mnist"), real_data() / "mnist")
    assert raw.notes == ()
    folder = real_data() / "mnist" / "MNIST" / "raw"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        assert images_of(raw, split).tobytes() == pixels
        assert raw.splits[split].labels.tolist() == list(labels)
        assert np.bincount(raw.splits[split].labels).tolist() == MNIST_HISTOGRAM[split]


@needs_data
def test_unpacked_files_of_mnist_are_read_as_the_packed_ones(tmp_path: Path) -> None:
    row = get_dataset("mnist")
    for download in row.downloads:
        packed = real_data() / "mnist" / download.path
        content = gzip.decompress(packed.read_bytes())
        write_files(tmp_path, {download.path.removesuffix(".gz"): content})
    expected, unpacked = open_here(row, real_data() / "mnist"), open_here(row, tmp_path)
    for split in ("train", "test"):
        assert np.array_equal(images_of(unpacked, split), images_of(expected, split))
        assert np.array_equal(unpacked.splits[split].labels, expected.splits[split].labels)


@needs_data
@pytest.mark.slow
def test_cifar10_is_what_torchvision_reads(tmp_path: Path) -> None:
    restore = real_data() / "cifar10" / "restore_cifar.py"
    subprocess.run([sys.executable, restore, tmp_path], check=True, stdout=subprocess.DEVNULL)
    raw = open_here(get_dataset("cifar10"), tmp_path)
    for split in ("train", "test"):
        expected = CIFAR10(tmp_path, train=split == "train")
        assert np.array_equal(images_of(raw, split), expected.data)
        assert raw.splits[split].labels.tolist() == expected.targets
        assert list(raw.class_names) == expected.classes


@needs_data
def test_real_house_numbers_are_what_their_files_say() -> None:
    raw = open_here(get_dataset("svhn"), real_data() / "svhn", check_raw=False)
    assert raw.notes[0] == "700 of the 73,257 train images of svhn"
    for split in ("train", "test"):
        content = scipy.io.loadmat(real_data() / "svhn" / f"{split}_32x32.mat")
        assert np.array_equal(images_of(raw, split), content["X"].transpose(3, 0, 1, 2))
        assert np.array_equal(raw.splits[split].labels, content["y"][:, 0] % 10)
