"""Readers of images that come as arrays of one size, through scikit-learn and torchvision."""

from __future__ import annotations

import gzip
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep.datasets import DataError, Download
from data_prep.raw.downloads import check_md5, fetch
from data_prep.raw.splits import ArraySplit, Raw, Source

#: Where MNIST's files may lie: first as torchvision has them.
_MNIST_FOLDERS = ("MNIST/raw/", "raw/", "")

#: MD5 of MNIST's files once unpacked; those of the packed ones are in the row.
_UNPACKED_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

#: What CIFAR's pickles may call: all that it takes to make an array.
_ARRAY_MAKERS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}

#: No file that is unpacked here is larger; the largest, of CIFAR-100, has 155 MB.
_LARGEST_UNPACKED = 256 << 20


def read_digits(source: Source) -> Raw:
    """The 8x8 digits of scikit-learn, 0..16 scaled to 0..255; a fifth of each class for tests."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits come with scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    images = _enlarged(small, source.dataset.image_size)
    by_class = np.argsort(labels, kind="stable")
    tested = np.zeros(len(labels), dtype=bool)
    tested[by_class[::5]] = True
    return _raw(
        source,
        {"train": (images[~tested], labels[~tested]), "test": (images[tested], labels[tested])},
    )


def _enlarged(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    import torch
    from torch.nn import functional as F

    # Between whole factors all weights are powers of two: exact in float32 on every machine.
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return planes.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def read_mnist(source: Source) -> Raw:
    """The four files of MNIST, unpacked or as .gz, in torchvision's folder layout."""
    from torchvision.datasets import MNIST

    staged = source.scratch / "MNIST" / "raw"
    staged.mkdir(parents=True)
    for download in _mnist_downloads(source):
        packed = source.place / download.path
        unpacked = packed.with_suffix("")
        if unpacked.is_file() and not packed.exists():
            if source.check:
                check_md5(unpacked, _UNPACKED_MNIST[unpacked.name])
            (staged / unpacked.name).symlink_to(unpacked.resolve())
            continue
        fetch(source, download)
        with _one_line_for_damage(packed), gzip.open(packed) as file:
            _copy(file, staged / unpacked.name)
    splits = {}
    for split in ("train", "test"):
        with _one_line_for_damage(source.place):
            read = MNIST(source.scratch, train=split == "train")
        splits[split] = (read.data.numpy()[..., np.newaxis], read.targets.numpy())
    return _raw(source, splits)


def _mnist_downloads(source: Source) -> list[Download]:
    """The row's, in the folder where some of the files lie already."""
    names = [Path(download.path).name for download in source.dataset.downloads]
    files = [file for name in names for file in (name, name.removesuffix(".gz"))]
    inner = next(
        (
            inner
            for inner in _MNIST_FOLDERS
            if any((source.place / inner / file).is_file() for file in files)
        ),
        _MNIST_FOLDERS[0],
    )
    return [
        download._replace(path=inner + name)
        for name, download in zip(names, source.dataset.downloads, strict=True)
    ]


def read_cifar(source: Source) -> Raw:
    """CIFAR-10 or CIFAR-100 with its fine labels: the published archive, or its unpacked folder."""
    from torchvision import datasets

    published = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source.dataset.name]
    files = [*published.train_list, *published.test_list]
    files.append([published.meta["filename"], published.meta["md5"]])
    folder = source.place / published.base_folder
    if source.place.name == published.base_folder:
        folder = source.place
    if not folder.is_dir():
        archive = source.place
        if not archive.is_file():
            (download,) = source.dataset.downloads
            archive = fetch(source, download)
        folder = source.scratch / published.base_folder
        folder.mkdir()
        _unpack(archive, folder, [name for name, _ in files])
    for name, md5 in files:
        if source.check:
            check_md5(folder / name, md5)
        else:
            _check_pickle(folder / name)
    # The files were looked at above, one by one: torchvision's own check names none of them.
    reader = type(
        "CheckedFiles",
        (published,),
        {"_check_integrity": lambda self: True, "meta": {**published.meta, "md5": None}},
    )
    splits = {}
    for split in ("train", "test"):
        with _one_line_for_damage(folder), warnings.catch_warnings():
            # NumPy's opinion of the way in which the published pickles say "not aligned".
            warnings.simplefilter("ignore")
            read = reader(folder.parent, train=split == "train")
        splits[split] = (read.data, np.asarray(read.targets))
    return _raw(source, splits, tuple(read.classes))


def read_svhn(source: Source) -> Raw:
    """The two .mat files of SVHN's cropped digits, where the label 10 stands for the digit 0."""
    from torchvision.datasets import SVHN

    splits = {}
    for split, download in zip(("train", "test"), source.dataset.downloads, strict=True):
        path = fetch(source, download)
        # The file was compared above: torchvision's own check names none.
        reader = type("CheckedFiles", (SVHN,), {"_check_integrity": lambda self: True})
        with _one_line_for_damage(path):
            read = reader(source.place, split=split)
        splits[split] = (read.data.transpose(0, 2, 3, 1), read.labels)
    return _raw(source, splits)


def _raw(
    source: Source,
    arrays: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    class_names: tuple[str, ...] = (),
) -> Raw:
    dataset = source.dataset
    shape = (dataset.image_size, dataset.image_size, dataset.channels)
    names = dataset.class_names or class_names
    splits = {}
    for split, (images, labels) in arrays.items():
        if images.dtype != np.uint8 or images.shape != (len(labels), *shape):
            raise DataError(
                f"{source.place}: the {split} split has images {images.shape} of type "
                f"{images.dtype} for {len(labels)} labels, instead of (N, H, W, C) "
                f"{(len(labels), *shape)} of type uint8"
            )
        # Torchvision gives views of planes; pixels are wanted side by side.
        splits[split] = ArraySplit(np.ascontiguousarray(images), labels.astype(np.int64), split)
    return Raw(splits, names, names, ())


@contextmanager
def _one_line_for_damage(path: Path) -> Iterator[None]:
    """Readers of files that are not what they should be fail in any way that one can think of."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of the format
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path} is damaged or of another format ({reason}): delete it and get it again"
        ) from error


class _ArraysOnly(pickle.Unpickler):
    """Refuses a pickle that would call anything but what makes an array."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_MAKERS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return super().find_class(module, name)


def _check_pickle(path: Path) -> None:
    with _one_line_for_damage(path), warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")
        _ArraysOnly(file, encoding="latin1").load()


def _unpack(archive: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy the named files, and no others, of a tar archive with a folder of the same name."""
    missing = {f"{folder.name}/{name}" for name in names}
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed:
                name = member.name.removeprefix("./")
                file = packed.extractfile(member) if name in missing else None
                if file:
                    _copy(file, folder.parent / name)
                    missing.discard(name)
                if not missing:
                    return
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{archive} is cut or damaged ({error}): delete it and get it again"
        ) from None
    raise DataError(f"{archive} has no {', '.join(sorted(missing))}: it is another archive")


def _copy(source: IO[bytes] | gzip.GzipFile, target: Path) -> None:
    left = _LARGEST_UNPACKED
    with target.open("xb") as file:
        while chunk := source.read(min(left + 1, 1 << 20)):
            left -= len(chunk)
            if left < 0:
                raise DataError(
                    f"{target.name} unpacks to more than {_LARGEST_UNPACKED:,} bytes: refused"
                )
            file.write(chunk)
