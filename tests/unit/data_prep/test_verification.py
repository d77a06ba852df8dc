from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import DataError, get_dataset
from data_prep.datasets import Storage
from data_prep.preparing.verification import verify_arrays, verify_files
from data_prep.preparing.workers import Workers
from data_prep.preparing.writing import Written, write_arrays, write_files
from data_prep.raw.splits import FileSplit
from data_prep.sources import generate
from tests.pictures import picture, write_class_folders


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("raw") / "pets")


def folder_split(folders: Path) -> FileSplit:
    names = sorted(str(path.relative_to(folders)) for path in folders.glob("train/*/*.jpg"))
    return FileSplit(folders, names, np.array([int("dog" in name) for name in names]))


def write(split: FileSplit, path: Path, storage: Storage) -> Written:
    return write_files(
        split,
        "train",
        path,
        storage=storage,
        bad_share=0,
        measured=False,
        workers=Workers(1),
        tell=quiet,
    )


def verify(written: Written, split: FileSplit, storage: Storage) -> None:
    verify_files(written, split, "train", storage=storage, workers=Workers(1), tell=quiet)


@pytest.mark.parametrize(
    "storage",
    [Storage(side=None), Storage(side=None, format="raw"), Storage(side=32, quality=10)],
)
def test_an_image_in_the_place_of_another_is_found(
    storage: Storage, folders: Path, tmp_path: Path
) -> None:
    split = folder_split(folders)
    verify(write(split, tmp_path / "right.beton", storage), split, storage)
    order = np.arange(len(split))
    order[[7, 8]] = 8, 7
    written = write(split.take(order), tmp_path / "wrong.beton", storage)
    with pytest.raises(DataError, match=r"wrong\.beton: image 7 does not look like its source"):
        verify(written, split, storage)


def test_pictures_of_one_size_are_told_apart_too(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(20)]
    for number, name in enumerate(names):
        picture(number, 64, 64).save(tmp_path / name)
    split = FileSplit(tmp_path, names, np.zeros(20, dtype=np.int64))
    storage = Storage(side=32)
    for first in range(19):
        order = np.arange(20)
        order[[first, first + 1]] = first + 1, first
        written = write(split.take(order), tmp_path / "wrong.beton", storage)
        with pytest.raises(DataError, match=f"image {first} does not look like its source"):
            verify(written, split, storage)


@pytest.mark.parametrize("size", [(4000, 8), (8, 4000), (90, 3), (1, 1)])
@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_a_thin_image_passes(size: tuple[int, int], kind: str, tmp_path: Path) -> None:
    picture(1, *size).save(tmp_path / "0.png")
    split = FileSplit(tmp_path, ["0.png"], np.zeros(1, dtype=np.int64))
    storage = Storage(side=400, format="raw") if kind == "raw" else Storage(side=400)
    verify(write(split, tmp_path / "thin.beton", storage), split, storage)


def flip_bit(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (value,) = file.read(1)
        file.seek(place)
        file.write(bytes([value ^ 1]))


def test_a_bit_that_the_disk_flipped_is_found_in_any_image(folders: Path, tmp_path: Path) -> None:
    split = folder_split(folders)
    path = tmp_path / "train.beton"
    written = write(split, path, Storage())
    verify(written, split, Storage())
    with path.open("rb") as file:
        first_page = file.read().index(split.read(0)[:100])
    flip_bit(path, first_page + 200)
    with pytest.raises(DataError, match="image 0 read back is not the one that was written"):
        verify(written, split, Storage())


def test_wrong_labels_and_missing_images_are_found(folders: Path, tmp_path: Path) -> None:
    split = folder_split(folders)
    wrong = replace(split, labels=split.labels[::-1].copy())
    written = write(wrong, tmp_path / "wrong.beton", Storage())
    with pytest.raises(DataError, match="labels read back are not those"):
        verify(replace(written, labels=split.labels), split, Storage())
    written = write(split.take(np.arange(40)), tmp_path / "short.beton", Storage())
    with pytest.raises(DataError, match="labels read back are not those"):
        verify(replace(written, labels=split.labels), split, Storage())


def test_every_pixel_of_arrays_is_compared(tmp_path: Path) -> None:
    split = generate(get_dataset("digits"), (70, 30))["train"]
    path = tmp_path / "train.beton"
    written = write_arrays(split, "train", path, measured=False, tell=quiet)
    verify_arrays(written, split, "train", quiet)
    images = split.images.copy()
    images[-1, -1, -1, -1] ^= 1
    with pytest.raises(DataError, match="images 0 to 69 read back are not those written"):
        verify_arrays(written, replace(split, images=images), "train", quiet)
    with pytest.raises(DataError, match="another shape"):
        verify_arrays(written, replace(split, images=images[:, 1:]), "train", quiet)
