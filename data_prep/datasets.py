"""The data sets: one row of facts each. No mean, deviation or class count is written elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


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


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is read.

    Attributes:
        name: as it is said in an experiment's name; letters and digits only.
        title: for people.
        class_names: in the order of the labels 0, 1, ...
        image_size: height and width in pixels as the network sees them.
        channels: 1 (gray) or 3 (red, green, blue).
        mean: per channel, of pixels scaled to [0, 1], subtracted by the loader.
        std: per channel, divides what the mean leaves.
        counts: images of each split.
        reader: name in ``data_prep.sources.READERS``.
        raw_files: below ``<root>/<name>``, what the user has to put there; empty where the images
            come with an installed package.
        raw_bytes: of the download, 0 where there is none.
        license: terms of use.
        source: who made it and where it comes from.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, int]
    reader: str
    raw_files: tuple[str, ...]
    raw_bytes: int
    license: str
    source: str


_TEN_DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

_ROWS = (
    Dataset(
        name="digits",
        title="Handwritten digits of UCI, as scikit-learn carries them (8x8, shown at 32x32)",
        class_names=_TEN_DIGITS,
        image_size=32,
        channels=1,
        # Measured on the training split; a test measures them again.
        mean=(0.3058,),
        std=(0.3237,),
        counts={"train": 1437, "test": 360},
        reader="digits",
        raw_files=(),
        raw_bytes=0,
        license="CC BY 4.0",
        source="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine "
        "Learning Repository, 1998; test part, from sklearn.datasets.load_digits",
    ),
    Dataset(
        name="mnist",
        title="MNIST handwritten digits",
        class_names=_TEN_DIGITS,
        image_size=28,
        channels=1,
        # Pixels in [0, 1] and no further normalization, as in Stadtmann et al. 2020.
        mean=(0.0,),
        std=(1.0,),
        counts={"train": 60_000, "test": 10_000},
        reader="mnist",
        raw_files=(
            "MNIST/raw/train-images-idx3-ubyte.gz",
            "MNIST/raw/train-labels-idx1-ubyte.gz",
            "MNIST/raw/t10k-images-idx3-ubyte.gz",
            "MNIST/raw/t10k-labels-idx1-ubyte.gz",
        ),
        raw_bytes=11_594_722,
        license="CC BY-SA 3.0",
        source="Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits, 1998",
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
