from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import DATASETS, DataError, get_dataset
from data_prep.sources import describe_place, generate, listing_digest, raw_place, stamp
from tests.unit.data_prep.raw_files import (
    PETS,
    labels_by_content,
    named,
    open_here,
    write_files,
    write_tar,
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


def test_traces_of_a_download_are_no_files_yet(tmp_path: Path) -> None:
    row = get_dataset("svhn")
    write_files(tmp_path, named(".download.lock", "x/a.mat.part", "x/a.mat.part.json"))
    assert describe_place(row, tmp_path) == f"a download of 246 MB to {tmp_path}"
    for place in (tmp_path, tmp_path / "missing"):
        assert describe_place(get_dataset("folder"), place) == f"{place}, where nothing is yet"
    write_files(tmp_path, named("x/a.mat"))
    assert describe_place(row, tmp_path) == str(tmp_path)


def test_linked_folders_are_files(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", PETS)
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "train").symlink_to(tmp_path / "elsewhere" / "train")
    assert describe_place(get_dataset("folder"), tmp_path / "pets") == f"{tmp_path}/pets"


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


SOON = 1_800_000_000 * 10**9  # nanoseconds since 1970


def set_time(path: Path, time: int) -> None:
    os.utime(path, ns=(time, time))


def test_the_digest_of_a_listing_sees_names_labels_and_states_but_not_the_place(
    tmp_path: Path,
) -> None:
    def digest(files: dict[str, bytes], name: str) -> str:
        place = write_files(tmp_path / name, files)
        for file in files:
            set_time(place / file, SOON)
        return listing_digest(open_here(get_dataset("folder"), place))

    first = digest(PETS, "first")
    assert first == digest(PETS, "second")
    changed = [
        PETS | {"train/cat/c.webp": b"of another size"},
        PETS | named("train/cat/new.jpg"),
        {key.replace("train/dog/b", "train/cat/b"): data for key, data in PETS.items()},
        {key.replace("/dog/", "/cow/"): data for key, data in PETS.items()},
        {key.replace("val/cat/1", "val/cat/2"): data for key, data in PETS.items()},
    ]
    digests = {digest(files, f"changed-{n}") for n, files in enumerate(changed)}
    assert len(digests) == len(changed) and first not in digests


@pytest.mark.parametrize(
    ("write", "name"), [(write_files, "pets"), (write_zip, "pets.zip"), (write_tar, "pets.tar")]
)
def test_other_bytes_of_the_same_size_have_another_digest(
    write: Callable[[Path, dict[str, bytes]], Path], name: str, tmp_path: Path
) -> None:
    def digest() -> str:
        return listing_digest(open_here(get_dataset("folder"), tmp_path / name))

    write(tmp_path / name, PETS)
    first = digest()
    assert digest() == first
    image = "train/cat/c.webp"
    write(tmp_path / name, PETS | {image: PETS[image][::-1]})
    assert digest() != first


def test_a_stamp_sees_files_come_and_go_and_archives_and_lists_change(tmp_path: Path) -> None:
    assert stamp(tmp_path / "missing") == ""
    pets, linked = tmp_path / "pets", tmp_path / "linked"
    write_files(linked, named("fox/a.jpg"))
    write_files(pets, PETS | named("val.txt", "MNIST/raw/train-labels-idx1-ubyte", "a.zip"))
    (pets / "train" / "fox").symlink_to(linked / "fox")
    (pets / "gone").symlink_to("nothing")
    (pets / "train" / "back").symlink_to(pets)  # a circle
    seen = [stamp(pets)]
    assert stamp(pets) == seen[0] and len(seen[0]) == 64
    changes: list[Callable[[], object]] = [
        lambda: write_files(pets, named("train/cat/new.jpg")),
        lambda: (pets / "train" / "cat" / "new.jpg").rename(pets / "train" / "dog" / "new.jpg"),
        lambda: (pets / "train" / "cat" / "deep" / "er" / "z.png").unlink(),
        lambda: (pets / "train" / "cat").rename(pets / "train" / "cow"),
        lambda: (linked / "fox" / "a.jpg").unlink(),
        lambda: set_time(pets / "val.txt", SOON),
        lambda: (pets / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"longer" * 99),
        lambda: set_time(pets / "a.zip", SOON),
    ]
    for change in changes:
        change()
        seen.append(stamp(pets))
    assert len(set(seen)) == len(seen)
    write_files(pets, {"train/dog/b.JPG": b"another image"})
    assert stamp(pets) == seen[-1]


def test_a_stamp_of_an_archive_is_its_size_and_time(tmp_path: Path) -> None:
    place = write_zip(tmp_path / "a.zip", PETS)
    set_time(place, SOON)
    first = stamp(place)
    set_time(place, SOON + 1)
    assert stamp(place) != first
    place.write_bytes(place.read_bytes() + b"x")
    set_time(place, SOON)
    assert stamp(place) != first


def test_a_stamp_of_a_thousand_folders_takes_no_time(tmp_path: Path) -> None:
    for number in range(1000):
        write_files(tmp_path, {f"train/{number}/a.jpg": b""})
    stamp(tmp_path)
    start = time.perf_counter()
    stamp(tmp_path)
    assert time.perf_counter() - start < 0.5  # a tenth of it where nothing else runs


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
