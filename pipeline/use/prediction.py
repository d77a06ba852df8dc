"""The classes of images: files and whole folders, in batches, one image after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import data_prep
from data_prep.datasets import DataError
from data_prep.raw.class_folders import is_image
from data_prep.raw.names import is_shown, printable
from pipeline.preprocessing import Preprocessing
from pipeline.use.model import UsableModel

#: Names of classes and their probabilities, the likeliest first.
Ranked = tuple[tuple[str, float], ...]

#: A larger file is no image that anybody asks about.
_MOST_BYTES = 512 << 20


@dataclass(frozen=True)
class Prediction:
    """What a network says of an image.

    Attributes:
        file: the image.
        ranked: its likeliest classes.
    """

    file: Path
    ranked: Ranked

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        best, probability = self.ranked[0]
        return {
            "file": str(self.file),
            "class": best,
            "probability": probability,
            "top": [{"class": name, "probability": share} for name, share in self.ranked],
        }


@dataclass(frozen=True)
class Refused:
    """A file that gets no prediction, and why."""

    file: Path
    reason: str

    def __str__(self) -> str:
        return f"{printable(str(self.file))}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """What lies at the places that were named.

    Attributes:
        files: to be looked at: those that were named, and of folders those that are images by
            their name or by their content.
        others: of folders, how many files are no images.
        refused: what cannot be read.
    """

    files: list[Path]
    others: int
    refused: list[Refused]


def find_images(places: Iterable[str]) -> Found:
    """The images at some places; folders with all that is in them, sorted by name."""
    files: list[Path] = []
    refused: list[Refused] = []
    others = 0
    for path in map(Path, places):
        if not _is_folder(path):
            files.append(path)
            continue
        for file in _below(path, refused):
            try:
                if is_image(file.name) or (file.is_file() and data_prep.is_image_file(file)):
                    files.append(file)
                else:
                    others += 1
            except OSError as error:
                refused.append(Refused(file, error.strerror or str(error)))
    return Found(files, others, refused)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False  # it is taken for a file, and refused with the reason when it is opened


def _below(folder: Path, refused: list[Refused]) -> Iterator[Path]:
    """The files of a folder and of those in it; but hidden ones and links to folders."""
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if not _is_folder(path):
            yield path
        elif path == folder or not path.is_symlink():
            try:
                entries = [entry for entry in path.iterdir() if is_shown(entry.name)]
            except OSError as error:
                refused.append(Refused(path, error.strerror or str(error)))
                continue
            waiting += sorted(entries, reverse=True)


def predict(
    model: UsableModel, files: Sequence[Path], *, top: int, batch_size: int
) -> Iterator[Prediction | Refused]:
    """Predict the classes of images, in their order; memory holds one batch of them at a time.

    Args:
        top: how many classes to name, at most all.
        batch_size: images that the network sees together.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = model.network.to(device)
    names = model.preprocessing.class_names
    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        seen = [_look(file, model.preprocessing) for file in part]
        pixels = [one for one in seen if not isinstance(one, Refused)]
        ranked: Iterator[Ranked] = iter(())
        if pixels:
            images = torch.from_numpy(model.preprocessing.normalize(np.stack(pixels)))
            ranked = iter(_ranked(network, images.to(device), names, min(top, len(names))))
        for file, one in zip(part, seen, strict=True):
            if isinstance(one, Refused):
                yield one
                continue
            best = next(ranked)
            if math.isnan(best[0][1]):
                yield Refused(file, "the network gives no finite numbers for it")
            else:
                yield Prediction(file, best)


def _look(file: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8] | Refused:
    """The pixels that the network is to see of a file."""
    try:
        if not file.exists():
            return Refused(file, "does not exist")
        if not file.is_file():
            return Refused(file, "is no regular file")
        if file.stat().st_size > _MOST_BYTES:
            return Refused(file, f"is larger than {_MOST_BYTES >> 20} MB")
        return preprocessing.pixels(file.read_bytes())
    except DataError as error:
        return Refused(file, str(error))
    except OSError as error:
        return Refused(file, error.strerror or str(error))


def _ranked(
    network: nn.Module, images: torch.Tensor, names: Sequence[str], top: int
) -> list[Ranked]:
    """The likeliest classes of each image, and their probabilities."""
    with torch.inference_mode():
        shares = network(images).float().softmax(dim=1)
        probabilities, classes = shares.topk(top, dim=1)
    return [
        tuple((names[number], share) for number, share in zip(*row, strict=True))
        for row in zip(classes.tolist(), probabilities.tolist(), strict=True)
    ]
