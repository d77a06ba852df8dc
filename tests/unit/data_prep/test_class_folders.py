from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from data_prep import DataError, get_dataset
from data_prep.raw.class_folders import is_image
from data_prep.sources import EncodedSplit, listing_digest, look
from tests.unit.data_prep.raw_files import (
    PETS,
    labels_by_content,
    named,
    needs_data,
    open_here,
    real_data,
    write_files,
    write_tar,
    write_zip,
)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_files, "pets"),
        (write_zip, "pets.zip"),
        (write_tar, "pets.tar"),
        (write_zip, "pets/any.zip"),
        (write_tar, "pets/any.tar"),
    ],
)
@pytest.mark.parametrize("top", ["", "top/"])
@pytest.mark.parametrize("tested", ["val", "test"])
def test_folders_of_classes_are_read_where_they_lie(
    write: Callable[[Path, dict[str, bytes]], Path],
    name: str,
    top: str,
    tested: str,
    tmp_path: Path,
) -> None:
    files = {top + key.replace("val/", f"{tested}/"): data for key, data in PETS.items()}
    write(tmp_path / name, files | named(f"{top}train/cat/.hidden.jpg", "__MACOSX/train/cat/x.jpg"))
    place = tmp_path / name.partition("/")[0]
    raw = open_here(get_dataset("folder"), place)
    assert raw.class_names == raw.class_ids == ("cat", "dog") and raw.notes == ()
    for split, folder in (("train", "train"), ("test", tested)):
        expected = {
            data.decode(): int("/dog/" in key)
            for key, data in files.items()
            if key.startswith(f"{top}{folder}/")
        }
        assert labels_by_content(raw, split) == expected
    row = look(get_dataset("folder"), place)
    assert (row.classes, row.class_names) == (2, ("cat", "dog"))
    assert row.counts == {"train": 4, "test": 3}


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    names = [
        f"{split}/{c}/{n}.jpg" for split in ("train", "val") for c in "bAa" for n in (2, 10, 1)
    ]
    write_files(tmp_path, named(*names))
    raw = open_here(get_dataset("folder"), tmp_path)
    for split, folder in (("train", "train"), ("test", "val")):
        images, expected = raw.splits[split], ImageFolder(tmp_path / folder)
        found = [(images.name(i), int(images.labels[i])) for i in range(len(images))]
        assert found == [(str(path), label) for path, label in expected.samples]
        assert raw.class_ids == tuple(expected.classes)


def test_what_is_no_image_is_counted_and_an_unused_split_is_said(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        PETS | named("train/cat/notes.txt", "train/dog/x", "train/loose.jpg", "test/cat/t.jpg"),
    )
    assert open_here(get_dataset("folder"), tmp_path).notes == (
        "3 files in train are left out, being no images by name, no regular files or in no folder "
        "of a class: train/loose.jpg, ...",
        "test/ is not used: val/ is there",
    )


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, r"holds no such files: folder wants train/<class>/ and val/<class>/"),
        (named("cat/a.jpg", "dog/b.jpg"), "holds no such files: folder wants train/<class>/ and"),
        (named("train/a/x.jpg", "train/b/x.jpg"), "has no val/ with a folder for each class"),
        (
            named("train/a/x.jpg", "train/b/y.jpg", "val/x.jpg"),
            "has no val/ with a folder for each",
        ),
        (PETS | named("val/cow/x.jpg"), "val has the folder 'cow', but train/ has none"),
        (PETS | named("train/cow/x.txt"), "has no images in train/cow/"),
        (
            named("train/a/x.jpg", "val/a/y.jpg"),
            "train split of folder has images of one class only",
        ),
        (named("a/train/x/x.jpg", "a.zip", "b.zip"), "a/val"),
        (
            named("a.zip", "b.zip"),
            "holds 2 archives, such as a.zip and b.zip: name one of them by da",
        ),
        (named("a.zip"), r"a\.zip is cut or no ZIP archive"),
    ],
)
def test_another_layout_is_one_line(files: dict[str, bytes], problem: str, tmp_path: Path) -> None:
    place = write_files(tmp_path, files)
    with pytest.raises(DataError, match=problem) as caught:
        open_here(get_dataset("folder"), place)
    assert "\n" not in str(caught.value) and str(place) in str(caught.value)


def test_classes_that_are_never_tested_are_said(tmp_path: Path) -> None:
    write_files(tmp_path, PETS | named("train/ape/x.jpg", "train/bee/x.jpg"))
    assert open_here(get_dataset("folder"), tmp_path).notes == (
        "no test images of 2 classes, such as ape",
    )


def test_names_that_are_no_text_are_read_and_made_printable(tmp_path: Path) -> None:
    strange = os.fsdecode(b"\xff")
    write_files(tmp_path, PETS | {f"train/{strange}/{strange}.jpg": b"strange"})
    write_files(tmp_path, {f"train/{strange}/{strange}.txt": b"no image"})
    raw = open_here(get_dataset("folder"), tmp_path)
    assert labels_by_content(raw, "train")["strange"] == 2
    assert raw.class_ids[2] == strange and raw.class_names[2] == "\\xff"
    assert len(listing_digest(raw)) == 64
    assert raw.notes == (
        "1 files in train are left out, being no images by name, no regular files or in no folder "
        "of a class: train/\\xff/\\xff.txt",
        "no test images of 1 classes, such as \\xff",
    )


def test_a_pipe_with_the_name_of_an_image_is_left_out_and_a_dead_link_waits_to_be_read(
    tmp_path: Path,
) -> None:
    write_files(tmp_path, PETS)
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.jpg")
    (tmp_path / "val" / "cat" / "gone.jpg").symlink_to("nothing")
    raw = open_here(get_dataset("folder"), tmp_path)
    assert [len(raw.splits[split]) for split in ("train", "test")] == [4, 4]
    assert raw.notes == (
        "1 files in train are left out, being no images by name, no regular files or in no folder "
        "of a class: train/cat/pipe.jpg",
    )
    assert len(listing_digest(raw)) == 64


def test_every_kind_of_file_that_torchvision_takes_for_an_image_is_one() -> None:
    assert all(is_image(f"x{suffix.upper()}") for suffix in IMG_EXTENSIONS)


def test_imagenet16_wants_sixteen_classes(tmp_path: Path) -> None:
    write_files(tmp_path, PETS)
    with pytest.raises(DataError, match="has 2 classes in train/ instead of the 16 of imagenet16"):
        open_here(get_dataset("imagenet16"), tmp_path)
    raw = open_here(replace(get_dataset("imagenet16"), classes=2), tmp_path)
    assert raw.notes[0] == "4 of the 6,400 train images of imagenet16"


def tiny_files(top: str = "tiny-imagenet-200/") -> dict[str, bytes]:
    """Stanford's layout with three classes, whose ids are not sorted in their list."""
    wnids = ["n03", "n01", "n02"]
    files = {
        f"{top}train/{wnid}/images/{wnid}_{n}.JPEG": f"{wnid} {n}".encode()
        for wnid in wnids
        for n in (0, 10, 2)
    }
    files |= {
        f"{top}train/{wnid}/{wnid}_boxes.txt": b"n03_0.JPEG\t0\t0\t63\t63\n" for wnid in wnids
    }
    files |= {f"{top}val/images/val_{n}.JPEG": f"val {n}".encode() for n in range(6)}
    files |= {f"{top}test/images/test_0.JPEG": b"unlabeled"}
    rows = [f"val_{n}.JPEG\t{wnids[n % 3]}\t0\t32\t44\t62\n" for n in range(7)]
    files[f"{top}val/val_annotations.txt"] = "".join(rows).encode()
    files[f"{top}wnids.txt"] = "\n".join(wnids).encode()
    files[f"{top}words.txt"] = b"n00\tentity\nn01\tgoldfish, Carassius\nn02\tcat\nn03\tdog, hound\n"
    return files


@pytest.mark.parametrize(
    ("write", "name", "place"),
    [
        (write_files, "", ""),
        (write_files, "", "tiny-imagenet-200"),
        (write_zip, "tiny-imagenet-200-subset.zip", ""),
        (write_zip, "subset.zip", "subset.zip"),
    ],
)
def test_tiny_imagenet_is_read_where_it_lies(
    write: Callable[[Path, dict[str, bytes]], Path],
    name: str,
    place: str,
    tmp_path: Path,
) -> None:
    write(tmp_path / "tiny" / name, tiny_files())
    row = replace(get_dataset("tinyimagenet"), classes=3)
    raw = open_here(row, tmp_path / "tiny" / place)
    assert raw.class_ids == ("n01", "n02", "n03")
    assert raw.class_names == ("goldfish", "cat", "dog")
    train = {f"n0{c} {n}": c - 1 for c in (1, 2, 3) for n in (0, 10, 2)}
    assert labels_by_content(raw, "train") == train
    assert labels_by_content(raw, "test") == {f"val {n}": (2, 0, 1)[n % 3] for n in range(6)}
    assert raw.notes == (
        "9 of the 100,000 train images of tinyimagenet",
        "6 of the 10,000 test images of tinyimagenet",
    )


def test_without_words_the_classes_of_tiny_imagenet_are_named_by_their_ids(tmp_path: Path) -> None:
    files = tiny_files()
    del files["tiny-imagenet-200/words.txt"]
    raw = open_here(
        replace(get_dataset("tinyimagenet"), classes=3), write_zip(tmp_path / "a.zip", files)
    )
    assert raw.class_names == raw.class_ids == ("n01", "n02", "n03")
    assert raw.notes[0] == (
        "no tiny-imagenet-200/words.txt: classes are named by their WordNet ids"
    )


def test_the_archive_of_tiny_imagenet_is_compared_with_the_published_one(tmp_path: Path) -> None:
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_files())
    row = replace(get_dataset("tinyimagenet"), classes=3)
    with pytest.raises(DataError, match=r"tiny-imagenet-200\.zip is not the published file"):
        open_here(row, tmp_path)
    assert len(open_here(row, tmp_path, check_raw=False).splits["train"]) == 9


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"wnids.txt": b"n01\nn02"}, "has 2 classes in wnids.txt instead of the 3 of tinyimagenet"),
        (
            {"val/images/val_9.JPEG": b""},
            "val_9.JPEG has no label: val/val_annotations.txt does not",
        ),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn09\n"}, "says n09: no class"),
        (
            {"val/val_annotations.txt": None},
            "val_annotations.txt is missing: the labels stand there",
        ),
        ({"train/n04/images/x.JPEG": b""}, "has the folder 'n04', but"),
        (
            {"val/val_annotations.txt": "".join(f"val_{n}.JPEG\tn01\n" for n in range(6)).encode()},
            "test split of tinyimagenet has images of one class only",
        ),
    ],
)
def test_a_wrong_file_of_tiny_imagenet_is_one_line(
    change: dict[str, bytes | None],
    problem: str,
    tmp_path: Path,
) -> None:
    files = {key: data for key, data in (tiny_files("") | change).items() if data is not None}
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=problem):
        open_here(replace(get_dataset("tinyimagenet"), classes=3), tmp_path)


@needs_data
@pytest.mark.parametrize("unpacked", [False, True])
def test_the_real_tiny_imagenet_is_what_torchvision_and_its_lists_say(
    unpacked: bool, tmp_path: Path
) -> None:
    archive = real_data() / "tiny-imagenet-200" / "tiny-imagenet-200-subset.zip"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    top = tmp_path / "tiny-imagenet-200"
    raw = open_here(get_dataset("tinyimagenet"), tmp_path if unpacked else archive.parent)
    assert raw.notes[0] == "8,000 of the 100,000 train images of tinyimagenet"
    expected = ImageFolder(top / "train")
    train, test = raw.splits["train"], raw.splits["test"]
    assert isinstance(train, EncodedSplit) and isinstance(test, EncodedSplit)
    assert raw.class_ids == tuple(expected.classes)
    assert train.labels.tolist() == [label for _, label in expected.samples]
    for index in range(0, len(train), 97):
        assert train.read(index) == Path(expected.samples[index][0]).read_bytes()
    annotations = (top / "val" / "val_annotations.txt").read_text().splitlines()
    wnid_of = dict(row.split("\t")[:2] for row in annotations)
    assert len(test) == len(wnid_of) == 1600
    for index in range(0, len(test), 29):
        name = test.names[index].rpartition("/")[2]
        assert raw.class_ids[test.labels[index]] == wnid_of[name]
        assert test.read(index) == (top / "val" / "images" / name).read_bytes()
    assert raw.class_names[raw.class_ids.index("n01443537")] == "goldfish"


@needs_data
@pytest.mark.parametrize("unpacked", [False, True])
def test_real_photographs_in_class_folders_are_what_torchvision_finds(
    unpacked: bool, tmp_path: Path
) -> None:
    archive = real_data() / "imagenet-sample" / "imagenette-224-subset.tar"
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    row = replace(get_dataset("imagenet16"), classes=10)
    raw = open_here(row, tmp_path if unpacked else archive)
    for split, folder in (("train", "train"), ("test", "val")):
        images, expected = raw.splits[split], ImageFolder(tmp_path / "imagenette-224" / folder)
        assert isinstance(images, EncodedSplit)
        assert images.labels.tolist() == [label for _, label in expected.samples]
        for index in range(0, len(images), 13):
            assert images.read(index) == Path(expected.samples[index][0]).read_bytes()
