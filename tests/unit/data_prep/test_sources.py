from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import DATASETS, DataError, get_dataset
from data_prep.sources import describe_place, generate, listing_digest, raw_place
from tests.unit.data_prep.raw_files import (
    PETS,
    labels_by_content,
    named,
    open_here,
    write_files,
    write_zip,
)


def test_the_place_is_what_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = get_dataset("mnist")
    monkeypatch.delenv("TERNFORGE_DATA", raising=False)
    assert raw_place(row, None, None) == Path("data/mnist")
    monkeypatch.setenv("TERNFORGE_DATA", "/there")
    assert raw_place(row, None, None) == Path("/there/mnist")
    assert raw_place(row, tmp_path, None) == tmp_path / "mnist"
    assert raw_place(row, tmp_path / "elsewhere", tmp_path) == tmp_path
    with pytest.raises(
        DataError, match=r"^data\.raw: .*/missing does not exist: mnist wants MNIST"
    ):
        raw_place(row, None, tmp_path / "missing")


def test_a_line_says_whether_there_will_be_a_download(tmp_path: Path) -> None:
    row = get_dataset("svhn")
    assert describe_place(row, tmp_path) == f"a download of 246 MB to {tmp_path}"
    (tmp_path / "train_32x32.mat").touch()
    assert describe_place(row, tmp_path) == str(tmp_path)
    assert describe_place(get_dataset("digits"), tmp_path) == "an installed package"


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_missing_files_without_a_download_are_one_line_that_says_what_to_bring(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        open_here(DATASETS[name], tmp_path / name)
    assert str(caught.value) == (
        f"{tmp_path / name} does not exist: {name} wants {DATASETS[name].raw}"
    )


def test_a_count_that_is_not_that_of_the_row_is_an_error_where_it_is_checked(
    tmp_path: Path,
) -> None:
    row = replace(get_dataset("digits"), counts={"train": 1437, "test": 361})
    with pytest.raises(
        DataError, match=r"test split has 360 images instead of 361; .*check_raw=fa"
    ):
        open_here(row, tmp_path)
    assert open_here(row, tmp_path, check_raw=False).notes == (
        "360 of the 361 test images of digits",
    )


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_first_images_of_each_class_are_taken(count: int, tmp_path: Path) -> None:
    names = [f"{split}/{c}/{n}.jpg" for split in ("train", "val") for c in "ba" for n in range(4)]
    place = write_zip(tmp_path / "a.zip", named(*names, "train/a/0.txt", "train/a/00.jpg"))
    raw = open_here(get_dataset("folder"), place, max_per_class=count)
    whole = open_here(get_dataset("folder"), place)
    for split in ("train", "test"):
        expected, seen = [], {0: 0, 1: 0}
        for content, label in labels_by_content(whole, split).items():
            if seen[label] < count:
                expected.append((content, label))
                seen[label] += 1
        assert list(labels_by_content(raw, split).items()) == expected
    assert f"at most {count} images of each class" in raw.notes
    with pytest.raises(DataError, match="max_per_class=0: at least 1"):
        open_here(get_dataset("folder"), place, max_per_class=0)


def test_the_digest_of_a_listing_sees_names_labels_and_sizes_but_not_the_place(
    tmp_path: Path,
) -> None:
    def digest(files: dict[str, bytes], name: str) -> str:
        return listing_digest(open_here(get_dataset("folder"), write_files(tmp_path / name, files)))

    first = digest(PETS, "first")
    assert first == digest(PETS, "second")
    assert first == listing_digest(
        open_here(get_dataset("folder"), write_zip(tmp_path / "third.zip", PETS))
    )
    changed = [
        PETS | {"train/cat/c.webp": b"of another size"},
        PETS | named("train/cat/new.jpg"),
        {key.replace("train/dog/b", "train/cat/b"): data for key, data in PETS.items()},
        {key.replace("/dog/", "/cow/"): data for key, data in PETS.items()},
        {key.replace("val/cat/1", "val/cat/2"): data for key, data in PETS.items()},
    ]
    digests = {digest(files, f"changed-{n}") for n, files in enumerate(changed)}
    assert len(digests) == len(changed) and first not in digests


def test_a_row_without_classes_has_nothing_to_generate() -> None:
    with pytest.raises(DataError, match="folder has no classes of its own"):
        generate(get_dataset("folder"), (2, 2))


@pytest.mark.parametrize("name", [name for name in DATASETS if DATASETS[name].classes])
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
