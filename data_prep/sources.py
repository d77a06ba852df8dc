"""Readers: from raw files, or from an installed package, to plain arrays. One per raw layout."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from data_prep.datasets import DataError, Dataset

#: Seconds that a silent server is waited for.
_NETWORK_TIMEOUT = 20.0

#: MD5 of MNIST's files once unpacked; those of the packed ones are torchvision's.
_UNPACKED_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Split(NamedTuple):
    """Images, uint8 (N, H, W, C), and labels, int64 (N,), of one split."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def data_root(root: Path | None) -> Path:
    """Folder of raw data sets: as given, else TERNFORGE_DATA, else ``data``."""
    return root or Path(os.environ.get("TERNFORGE_DATA") or "data")


def read(dataset: Dataset, root: Path | None, scratch: Path) -> dict[str, Split]:
    """Read all splits of a data set at the size that its row states.

    Args:
        dataset: the row.
        root: folder of raw data sets, see ``data_root``; never written to, but for a download.
        scratch: an existing, empty folder for unpacked files.

    Raises:
        DataError: when raw files are missing and cannot be downloaded, or are not what they
            should be.
    """
    splits = READERS[dataset.reader](dataset, data_root(root) / dataset.name, scratch)
    for name, count in dataset.counts.items():
        labels = splits[name].labels
        if len(labels) != count or len(splits[name].images) != count:
            raise DataError(
                f"{dataset.name}: the {name} split has {len(splits[name].images)} images and "
                f"{len(labels)} labels instead of {count}"
            )
        if labels.min() < 0 or labels.max() >= len(dataset.class_names):
            raise DataError(
                f"{dataset.name}: the {name} split has labels from {labels.min()} to "
                f"{labels.max()}, not from 0 to {len(dataset.class_names) - 1}"
            )
    return {
        name: Split(_resized(splits[name].images, dataset.image_size), splits[name].labels)
        for name in dataset.counts
    }


def generate(dataset: Dataset, counts: tuple[int, int]) -> dict[str, Split]:
    """Made-up images in the shape of a data set: a pattern for each class, under noise.

    A network learns them in a few steps, so that a smoke run can see its loss fall.

    Args:
        dataset: the row whose shape and classes are taken.
        counts: images for training and for testing.
    """
    size, channels = dataset.image_size, dataset.channels
    splits = {}
    for name, count in zip(("train", "test"), counts, strict=True):
        labels = np.arange(count, dtype=np.int64) % len(dataset.class_names)
        random = np.random.RandomState(len(name))
        images = random.randint(0, 64, (count, size, size, channels), dtype=np.uint8)
        cell = -(-size // 4)
        for label in np.unique(labels):
            pattern = np.random.RandomState(label).randint(0, 2, (4, 4, channels)) * 191
            pattern = pattern.repeat(cell, axis=0).repeat(cell, axis=1)[:size, :size]
            images[labels == label] += pattern.astype(np.uint8)
        splits[name] = Split(images, labels)
    return splits


def _resized(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    if images.shape[1:3] == (size, size):
        return images
    # Between whole factors all weights are powers of two: exact in float32 on every machine.
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return planes.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _read_digits(dataset: Dataset, folder: Path, scratch: Path) -> dict[str, Split]:
    """The 8x8 digits of scikit-learn, 0..16 scaled to 0..255; a fifth of each class for tests."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits come with scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    by_class = np.argsort(labels, kind="stable")
    tested = np.zeros(len(labels), dtype=bool)
    tested[by_class[::5]] = True
    return {
        "train": Split(images[~tested], labels[~tested]),
        "test": Split(images[tested], labels[tested]),
    }


def _read_mnist(dataset: Dataset, folder: Path, scratch: Path) -> dict[str, Split]:
    """The four files of MNIST, unpacked or as .gz, in torchvision's folder layout."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity

    staged = scratch / "MNIST" / "raw"
    staged.mkdir(parents=True)
    for name, md5 in MNIST.resources:
        packed = folder / "MNIST" / "raw" / name
        unpacked = packed.with_suffix("")
        if packed.is_file():
            if not check_integrity(packed, md5):
                raise DataError(f"{packed} is damaged (its MD5 is not {md5}): replace the file")
        elif unpacked.is_file():
            md5 = _UNPACKED_MNIST[unpacked.name]
            if not check_integrity(unpacked, md5):
                raise DataError(f"{unpacked} is damaged (its MD5 is not {md5}): replace the file")
            (staged / unpacked.name).symlink_to(unpacked.resolve())
            continue
        else:
            urls = [mirror + name for mirror in MNIST.mirrors]
            _download(dataset, folder, packed, urls, md5, scratch)
        with gzip.open(packed) as source, (staged / unpacked.name).open("wb") as target:
            shutil.copyfileobj(source, target)
    splits = {}
    for split in ("train", "test"):
        read_split = MNIST(scratch, train=split == "train")
        splits[split] = Split(
            read_split.data.numpy()[..., np.newaxis], read_split.targets.numpy().astype(np.int64)
        )
    return splits


def _download(
    dataset: Dataset, folder: Path, target: Path, urls: list[str], md5: str, scratch: Path
) -> None:
    """Fetch a raw file to ``target``, which appears only when it is whole."""
    from torchvision.datasets.utils import download_url

    reason = ""
    for url in urls:
        try:
            with _impatient_network(), contextlib.redirect_stderr(io.StringIO()):
                download_url(url, scratch, target.name, md5)
            break
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            message = str(getattr(error, "reason", error)) or type(error).__name__
            reason = message.splitlines()[0]
    else:
        raise DataError(
            f"no {target.name} in {target.parent}, and it cannot be downloaded ({reason}): put "
            f"{', '.join(dataset.raw_files)} into {folder}, or point data.root or TERNFORGE_DATA "
            f"to the folder that holds {dataset.name}/"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _place(scratch / target.name, target)


def _place(source: Path, target: Path) -> None:
    """Copy a file in one step; others may place the same file at the same time."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with source.open("rb") as original, partial.open("xb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _impatient_network() -> Iterator[None]:
    """A time-out for torchvision's downloads, which set none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


READERS: dict[str, Callable[[Dataset, Path, Path], dict[str, Split]]] = {
    "digits": _read_digits,
    "mnist": _read_mnist,
}
