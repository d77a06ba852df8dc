"""Raw files as tests write them, and what ``open_raw`` makes of them."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import Dataset
from data_prep.sources import ArraySplit, EncodedSplit, Raw, open_raw

needs_data = pytest.mark.skipif(
    not os.environ.get("TERNFORGE_DATA"), reason="TERNFORGE_DATA is not set"
)


def real_data() -> Path:
    """The folder of real images; only for tests that ``needs_data``."""
    return Path(os.environ["TERNFORGE_DATA"])


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def open_here(row: Dataset, place: Path, **options: Any) -> Raw:
    """``open_raw`` with a scratch folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        return open_raw(row, place, Path(scratch), tell=silent, **options)


def write_files(place: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def write_zip(place: Path, files: dict[str, bytes]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w") as archive:
        for number, (name, content) in enumerate(files.items()):
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.writestr(name, content, method)
    return place


def write_tar(place: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w:gz" if place.suffix == ".gz" else "w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place


def named(*names: str) -> dict[str, bytes]:
    """Files whose content says which file it is."""
    return {name: name.encode() for name in names}


PETS = named(
    "train/dog/b.JPG",
    "train/dog/a.jpeg",
    "train/cat/deep/er/z.png",
    "train/cat/c.webp",
    "val/cat/1.tiff",
    "val/dog/2.ppm",
    "val/dog/3.bmp",
)


def labels_by_content(raw: Raw, split: str) -> dict[str, int]:
    """Label of each image by what its file holds."""
    images = raw.splits[split]
    assert isinstance(images, EncodedSplit)
    contents = [images.read(index).decode() for index in range(len(images))]
    assert len(set(contents)) == len(contents)
    return dict(zip(contents, images.labels.tolist(), strict=True))


def images_of(raw: Raw, split: str) -> np.ndarray:
    images = raw.splits[split]
    assert isinstance(images, ArraySplit)
    return images.images
