"""The data sets: one row of facts each. No mean, deviation or class count is written elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

#: Name of the split that is made of training images which are held out.
VALIDATION = "validation"


class DataError(Exception):
    """A failure that the user can mend: one line that says what, where, and what would be right."""


@contextmanager
def one_line_for_os_errors(failure: str, place: Path) -> Iterator[None]:
    """Turn an error of the operating system into a line: what failed, which file, and why.

    Args:
        failure: how the line begins.
        place: named where the error itself names no file.

    Raises:
        DataError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{failure}: {error.filename or place}: {reason}") from error


class Download(NamedTuple):
    """A raw file that can be fetched.

    Attributes:
        path: below the data set's raw folder, where the file belongs.
        urls: tried in this order.
        md5: of the file, 32 hex digits; None where its maker publishes none.
        bytes: its size; 0 where it is not known.
    """

    path: str
    urls: tuple[str, ...]
    md5: str | None
    bytes: int


class Normalization(NamedTuple):
    """Per channel, of pixels scaled to [0, 1]: what is subtracted, and what divides the rest."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Storage:
    """How images of many sizes are kept in the prepared file.

    Attributes:
        side: of an image that is larger, the longer side is reduced to so many pixels, at least
            32; None keeps every image as large as it is.
        format: ``jpg``, ``raw`` (pixels), or ``mixed``: every second image raw.
        quality: of the JPEG encoder, 10 to 100.
        passthrough: keep the bytes of a JPEG that needs no change, instead of encoding it again.
    """

    side: int | None = None
    format: Literal["jpg", "raw", "mixed"] = "jpg"
    quality: int = 90
    passthrough: bool = True


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is read.

    Attributes:
        name: as it is said in an experiment's name; letters and digits only.
        title: for people.
        reader: name in ``data_prep.sources.READERS``.
        classes: how many; None until a folder of the user's own has been looked at.
        class_names: in the order of the labels 0, 1, ...; empty where the raw files name them.
        image_size: height and width in pixels as the network sees them.
        channels: 1 (gray) or 3 (red, green, blue).
        normalization: that the data set is known for; None where it is measured.
        counts: images of each published split; empty where nobody published it.
        storage: of images that come as files of many sizes; None for small arrays of one size,
            which are kept pixel by pixel.
        raw: for people, what has to lie in the data set's raw folder.
        downloads: files that can be fetched; empty where the user has to bring them.
        license: terms of use.
        source: who made it and where it comes from.
    """

    name: str
    title: str
    reader: str
    classes: int | None
    image_size: int
    channels: int
    normalization: Normalization | None
    counts: dict[str, int]
    raw: str
    license: str
    source: str
    class_names: tuple[str, ...] = ()
    storage: Storage | None = None
    downloads: tuple[Download, ...] = field(default=(), repr=False)


#: Normalizations by name, as recipes ask for them; ``dataset`` stands for the row's own.
NORMALIZATIONS: dict[str, Normalization] = {
    # Pixels in [0, 1], nothing else: ThreshNet (Ju et al. 2022), MNIST of Stadtmann et al. 2020.
    "unit": Normalization((0.0,), (1.0,)),
    # Pixels in [-1, 1]: CIFAR-10 of Stadtmann et al. 2020, SVHN of He et al. 2018.
    "signed": Normalization((0.5,), (0.5,)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization(
        (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
    ),
    # A mean of each image's own deviation, below that of all pixels: STeP (Kyrkou 2024, on every
    # data set) and pre-defined sparse kernels (Kundu et al. 2020).
    "cifar10-imagewise": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Normalization(
        (129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)
    ),
}


def named_normalization(name: str, own: Normalization) -> Normalization:
    """Mean and deviation of each channel, by name.

    Args:
        name: in ``NORMALIZATIONS``, or ``dataset``.
        own: the data set's own; it also says how many channels there are.

    Raises:
        DataError: for an unknown name, and for one of another number of channels.
    """
    if name == "dataset":
        return own
    if name not in NORMALIZATIONS:
        valid = ", ".join(["dataset", *NORMALIZATIONS])
        raise DataError(f"unknown normalization {name!r}: valid are {valid}")
    mean, std = NORMALIZATIONS[name]
    channels = len(own.mean)
    if len(mean) == 1:
        return Normalization(mean * channels, std * channels)
    if len(mean) != channels:
        raise DataError(
            f"normalization {name!r} is of {len(mean)} channels and the images have {channels}: "
            "take dataset, unit or signed"
        )
    return Normalization(mean, std)


_TEN_DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)


def _mnist_file(name: str, md5: str, size: int) -> Download:
    file = f"{name}-ubyte.gz"
    urls = tuple(mirror + file for mirror in _MNIST_MIRRORS)
    return Download(f"MNIST/raw/{file}", urls, md5, size)


_ROWS = (
    Dataset(
        name="digits",
        title="Handwritten digits of UCI, as scikit-learn carries them (8x8, shown at 32x32)",
        reader="digits",
        classes=10,
        class_names=_TEN_DIGITS,
        image_size=32,
        channels=1,
        # Measured on the training split; a test measures them again.
        normalization=Normalization((0.3058,), (0.3237,)),
        counts={"train": 1437, "test": 360},
        raw="nothing: the images come with scikit-learn",
        license="CC BY 4.0",
        source="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine "
        "Learning Repository, 1998; test part, from sklearn.datasets.load_digits",
    ),
    Dataset(
        name="mnist",
        title="MNIST handwritten digits",
        reader="mnist",
        classes=10,
        class_names=_TEN_DIGITS,
        image_size=28,
        channels=1,
        # Pixels in [0, 1] and no further normalization, as in Stadtmann et al. 2020.
        normalization=NORMALIZATIONS["unit"],
        counts={"train": 60_000, "test": 10_000},
        raw="MNIST/raw/ with the four files, as .gz or unpacked",
        downloads=(
            _mnist_file("train-images-idx3", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            _mnist_file("train-labels-idx1", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            _mnist_file("t10k-images-idx3", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            _mnist_file("t10k-labels-idx1", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        ),
        license="CC BY-SA 3.0",
        source="Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits, 1998",
    ),
    Dataset(
        name="cifar10",
        title="CIFAR-10, 32x32 photographs",
        reader="cifar",
        classes=10,
        class_names=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        image_size=32,
        channels=3,
        normalization=NORMALIZATIONS["cifar10"],
        counts={"train": 50_000, "test": 10_000},
        raw="cifar-10-python.tar.gz, or the folder cifar-10-batches-py",
        downloads=(
            Download(
                "cifar-10-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
                "c58f30108f718f92721af3b95e74349a",
                170_498_071,
            ),
        ),
        license="none stated",
        source="A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009",
    ),
    Dataset(
        name="cifar100",
        title="CIFAR-100, 32x32 photographs",
        reader="cifar",
        classes=100,
        image_size=32,
        channels=3,
        normalization=NORMALIZATIONS["cifar100"],
        counts={"train": 50_000, "test": 10_000},
        raw="cifar-100-python.tar.gz, or the folder cifar-100-python",
        downloads=(
            Download(
                "cifar-100-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
                "eb9058c3a382ffc7106e4002c42a8d85",
                169_001_437,
            ),
        ),
        license="none stated",
        source="A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009",
    ),
    Dataset(
        name="svhn",
        title="SVHN, cropped house numbers (without the extra split)",
        reader="svhn",
        classes=10,
        class_names=_TEN_DIGITS,
        image_size=32,
        channels=3,
        normalization=Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        counts={"train": 73_257, "test": 26_032},
        raw="train_32x32.mat and test_32x32.mat",
        downloads=(
            Download(
                "train_32x32.mat",
                ("http://ufldl.stanford.edu/housenumbers/train_32x32.mat",),
                "e26dedcc434d2e4c54c9b2d4a06d8373",
                182_040_794,
            ),
            Download(
                "test_32x32.mat",
                ("http://ufldl.stanford.edu/housenumbers/test_32x32.mat",),
                "eb5a983be6a315427106f1b164d9cef3",
                64_275_384,
            ),
        ),
        license="for non-commercial use",
        source="Y. Netzer et al.: Reading Digits in Natural Images with Unsupervised Feature "
        "Learning, NIPS workshop 2011",
    ),
    Dataset(
        name="tinyimagenet",
        title="Tiny ImageNet, 64x64 photographs",
        reader="tinyimagenet",
        classes=200,
        image_size=64,
        channels=3,
        normalization=Normalization((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
        counts={"train": 100_000, "test": 10_000},
        # 1.4 GB in all, which memory holds, and nothing to decode: as JPEGs 0.2 GB.
        storage=Storage(format="raw"),
        raw="tiny-imagenet-200.zip, or the folder tiny-imagenet-200",
        downloads=(
            Download(
                "tiny-imagenet-200.zip",
                ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
                "90528d7ca1a48142e341f4ef8d21d0de",
                248_100_043,
            ),
        ),
        license="for non-commercial research (ImageNet)",
        source="Stanford CS231n, from ImageNet; test is its labeled validation split",
    ),
    Dataset(
        name="imagenet16",
        title="ImageNet16, 16 classes of ImageNet",
        reader="class_folders",
        classes=16,
        image_size=224,
        channels=3,
        normalization=NORMALIZATIONS["imagenet"],
        counts={"train": 6_400, "test": 1_600},
        # As ImageNet.
        storage=Storage(side=400),
        raw="imagenet16.zip, or the folders train/<class>/ and val/<class>/",
        downloads=(
            Download(
                "imagenet16.zip",
                ("https://zenodo.org/records/8027520/files/imagenet16.zip",),
                None,
                0,
            ),
        ),
        license="for non-commercial research (ImageNet)",
        source="C. Kyrkou: ImageNet16, Zenodo record 8027520, 2023",
    ),
    Dataset(
        name="imagenet",
        title="ImageNet (ILSVRC 2012), 1,000 classes",
        reader="imagenet",
        classes=1000,
        image_size=224,
        channels=3,
        normalization=NORMALIZATIONS["imagenet"],
        counts={"train": 1_281_167, "test": 50_000},
        # The shorter side of most is then 300 or less, enough for 256 and a crop of 224. About
        # 49 GB; 500 pixels take 1.4x the space and decoding time, raw 8x the space. Quality 95
        # takes 1.4x of 90 for 2 dB more.
        storage=Storage(side=400),
        raw="train/<wnid>/ and val/<wnid>/, or val/ flat with its ground truth, or the tar files "
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar as they are",
        license="for non-commercial research",
        source="O. Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge, IJCV "
        "2015; test is its labeled validation split",
    ),
    Dataset(
        name="folder",
        title="Images of your own, a folder for each class",
        reader="class_folders",
        classes=None,
        image_size=224,
        channels=3,
        normalization=None,
        counts={},
        storage=Storage(side=400),
        raw="train/<class>/ and val/<class>/ (or test/<class>/), named by data.raw",
        license="yours",
        source="yours",
    ),
)

DATASETS: dict[str, Dataset] = {row.name: row for row in _ROWS}


def get_dataset(name: str) -> Dataset:
    """The row of a data set.

    Raises:
        DataError: for an unknown name, with the nearest known one.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(DATASETS)}"
    raise DataError(f"unknown data set {name!r}: {hint}")
