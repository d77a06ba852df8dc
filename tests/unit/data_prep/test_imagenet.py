from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import ImageFolder, imagenet
from torchvision.models import ResNet50_Weights

from data_prep import DataError, get_dataset
from data_prep.sources import EncodedSplit, Raw
from tests.unit.data_prep.raw_files import (
    labels_by_content,
    named,
    needs_data,
    open_here,
    real_data,
    write_files,
    write_tar,
    write_zip,
)

WNIDS = ["n01440764", "n01443537", "n01484850"]
ROW = replace(get_dataset("imagenet"), classes=3)

TRAIN = [f"{wnid}/{wnid}_{n}.JPEG" for wnid in reversed(WNIDS) for n in (10, 9)]
#: Class of the validation images 1, 2, ...; neither all of them nor in order on disk.
TRUTH = [2, 0, 1, 1, 2, 0, 2]
NUMBERS = [5, 1, 2, 4]


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def train_files(top: str) -> dict[str, bytes]:
    return {f"{top}{name}": name.encode() for name in TRAIN}


def val_files(top: str) -> dict[str, bytes]:
    return {f"{top}{val_name(number)}": val_name(number).encode() for number in NUMBERS}


def check(raw: Raw) -> None:
    """The images of TRAIN and of NUMBERS, with the labels that they have."""
    assert raw.class_ids == tuple(WNIDS)
    assert labels_by_content(raw, "train") == {name: WNIDS.index(name[:9]) for name in TRAIN}
    assert labels_by_content(raw, "test") == {val_name(n): TRUTH[n - 1] for n in NUMBERS}


def devkit(top: str) -> dict[str, bytes]:
    """The development kit: numbers of its own for the classes, and groups of classes behind."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    # The kit's number of each class is not its rank.
    kit_numbers = {WNIDS[1]: 1, WNIDS[2]: 2, WNIDS[0]: 3}
    rows = [(number, wnid, "some, words", "a gloss", 0) for wnid, number in kit_numbers.items()]
    rows.append((1001, "n00001740", "entity", "all there is", 2))
    table = np.empty((len(rows), 1), dtype=[(field, "O") for field in fields])
    for index, row in enumerate(rows):
        table[index, 0] = row
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": table})
    truth = "".join(f"{kit_numbers[WNIDS[label]]}\n" for label in TRUTH)
    return {
        f"{top}meta.mat": file.getvalue(),
        f"{top}ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def devkit_archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in devkit("ILSVRC2012_devkit_t12/data/").items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{number:08},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8 \n"
    for number, label in reversed(list(enumerate(TRUTH, start=1)))
)
SYNSETS = "".join(f"{WNIDS[label]}\n" for label in TRUTH)
CAFFE = "".join(f"{val_name(number)} {label}\n" for number, label in enumerate(TRUTH, start=1))

LISTS = {
    "kaggle": {"LOC_val_solution.csv": KAGGLE.encode()},
    "synsets": {"imagenet_2012_validation_synset_labels.txt": SYNSETS.encode()},
    "caffe": {"val.txt": CAFFE.encode()},
    "caffe in val": {"val/val.txt": CAFFE.encode()},
    "devkit": devkit("ILSVRC2012_devkit_t12/data/"),
    "short devkit": devkit("devkit/data/"),
    "loose devkit": devkit("val/"),
    "devkit in val": devkit("val/ILSVRC2012_devkit_t12/data/"),
    "devkit archive": {"ILSVRC2012_devkit_t12.tar.gz": devkit_archive()},
}


@pytest.mark.parametrize(
    ("write", "name"), [(write_files, "i"), (write_zip, "i.zip"), (write_tar, "i.tar")]
)
def test_folders_by_class_are_read(
    write: Callable[[Path, dict[str, bytes]], Path], name: str, tmp_path: Path
) -> None:
    val = {f"val/{WNIDS[TRUTH[n - 1]]}/{val_name(n)}": val_name(n).encode() for n in NUMBERS}
    raw = open_here(ROW, write(tmp_path / name, train_files("train/") | val))
    check(raw)
    assert raw.notes == (
        "6 of the 1,281,167 train images of imagenet",
        "4 of the 50,000 test images of imagenet",
    )


@pytest.mark.parametrize("name", LISTS)
def test_a_flat_val_gets_its_labels_from_every_usual_list(name: str, tmp_path: Path) -> None:
    raw = open_here(
        ROW, write_files(tmp_path, train_files("train/") | val_files("val/") | LISTS[name])
    )
    check(raw)
    assert any(note.startswith("labels of the validation images are those") for note in raw.notes)


@pytest.mark.parametrize(("write", "name"), [(write_files, "kaggle"), (write_zip, "kaggle.zip")])
def test_the_folders_of_kaggle_are_read(
    write: Callable[[Path, dict[str, bytes]], Path], name: str, tmp_path: Path
) -> None:
    inner = "ILSVRC/Data/CLS-LOC/"
    # Kaggle's other list of this name numbers the images and says no class.
    other = {"ILSVRC/ImageSets/CLS-LOC/val.txt": b"ILSVRC2012_val_00000001 1\n"}
    files = train_files(f"{inner}train/") | val_files(f"{inner}val/") | LISTS["kaggle"] | other
    check(open_here(ROW, write(tmp_path / name, files)))


def write_original_tars(place: Path) -> None:
    classes = {}
    for wnid in reversed(WNIDS):
        members = {name.partition("/")[2]: name.encode() for name in TRAIN if name[:9] == wnid}
        classes[f"{wnid}.tar"] = write_tar(place / "class.tar", members).read_bytes()
    (place / "class.tar").unlink()
    write_tar(place / "ILSVRC2012_img_train.tar", classes)
    write_tar(place / "ILSVRC2012_img_val.tar", val_files(""))


@pytest.mark.parametrize("name", ["kaggle", "synsets", "caffe", "devkit archive"])
def test_the_two_original_archives_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    write_original_tars(write_files(tmp_path, LISTS[name]))
    before = sorted(tmp_path.rglob("*"))
    raw = open_here(ROW, tmp_path)
    check(raw)
    train = raw.splits["train"]
    assert train.name(0) == f"{tmp_path}/ILSVRC2012_img_train.tar:{WNIDS[0]}/{WNIDS[0]}_10.JPEG"
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_and_an_archive_go_together(tmp_path: Path) -> None:
    write_files(tmp_path, train_files("train/") | LISTS["synsets"])
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", val_files(""))
    check(open_here(ROW, tmp_path))


def test_the_development_kit_says_what_torchvision_reads_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, train_files("train/") | val_files("val/") | LISTS["devkit archive"])
    name, _ = imagenet.ARCHIVE_META["devkit"]
    md5 = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (name, md5))
    imagenet.parse_devkit_archive(tmp_path)
    wnids = imagenet.load_meta_file(tmp_path)[1]
    assert wnids == [WNIDS[label] for label in TRUTH]
    expected = {val_name(n): WNIDS.index(wnids[n - 1]) for n in NUMBERS}
    assert labels_by_content(open_here(ROW, tmp_path), "test") == expected


def test_the_thousand_classes_have_the_names_that_torchvision_gives_them(tmp_path: Path) -> None:
    names = [
        f"{split}/n{wnid:08}/{wnid}.JPEG" for split in ("train", "val") for wnid in range(1000)
    ]
    raw = open_here(get_dataset("imagenet"), write_zip(tmp_path / "a.zip", named(*names)))
    assert raw.class_names == tuple(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    assert raw.class_ids[7] == "n00000007" and raw.splits["train"].labels[7] == 7


FLAT = train_files("train/") | val_files("val/")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (named("train/n01440764/x.JPEG"), r"train has 1 classes, but imagenet has 3 classes named"),
        (
            named(*(f"train/{name}/x.JPEG" for name in "abc")),
            "train has a folder 'a', but imagenet",
        ),
        (
            train_files("train/"),
            "has neither val/ nor ILSVRC2012_img_val.tar: imagenet wants train/",
        ),
        (FLAT, r"has no labels of the flat validation images: put LOC_val_solution\.csv, "),
        (FLAT | {"val.txt": b"ILSVRC2012_val_00000001.JPEG 3\n"}, r"val\.txt is not the list of"),
        (FLAT | {"val.txt": b"ILSVRC2012_val_00000001.JPEG -1\n"}, r"val\.txt is not the list of"),
        (FLAT | {"val.txt": b"ILSVRC2012_val_00000001.JPEG\n"}, r"val\.txt is not the list of"),
        (
            FLAT | {"LOC_val_solution.csv": b"\nx,y"},
            r"_00000001\.JPEG has no label: LOC",
        ),
        (
            FLAT | {"val.txt": CAFFE.encode()[:93]},
            r"_00000004\.JPEG has no label: val\.txt does not",
        ),
        (
            FLAT | {"imagenet_2012_validation_synset_labels.txt": b"n09999999\n" * 7},
            "has no label: imagenet_2012_validation_synset_labels.txt says n09999999: no class",
        ),
        (
            FLAT | {"devkit/data/ILSVRC2012_validation_ground_truth.txt": b"1\n"},
            "ILSVRC2012_validation_ground_truth.txt says nothing without meta.mat beside it",
        ),
        (
            FLAT | LISTS["devkit"] | {"ILSVRC2012_devkit_t12/data/meta.mat": b"x" * 200},
            "meta.mat are",
        ),
        (
            FLAT | {"ILSVRC2012_devkit_t12.tar.gz": devkit_archive()[:99]},
            "is cut or not the devkit",
        ),
        (
            FLAT | {"val/other.JPEG": b"", "val.txt": CAFFE.encode()},
            r"other\.JPEG has no label",
        ),
    ],
)
def test_other_files_are_one_line(files: dict[str, bytes], problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        open_here(ROW, write_files(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_a_part_of_imagenet_is_a_folder(tmp_path: Path) -> None:
    names = [f"{split}/{wnid}/x.JPEG" for split in ("train", "val") for wnid in WNIDS[:2]]
    write_files(tmp_path, named(*names))
    with pytest.raises(DataError, match=r"for a part of it take the data set `folder`$"):
        open_here(ROW, tmp_path)
    assert open_here(get_dataset("folder"), tmp_path).class_ids == tuple(WNIDS[:2])


@needs_data
@pytest.mark.parametrize("form", ["folders", "flat", "archives"])
def test_real_photographs_are_found_in_every_form_of_imagenet(form: str, tmp_path: Path) -> None:
    with tarfile.open(real_data() / "imagenet-sample" / "imagenet-1k-fullres-subset.tar") as packed:
        packed.extractall(tmp_path, filter="data")
    place = tmp_path / "imagenet-1k-fullres"
    (place / "val").rename(place / "train")
    expected = ImageFolder(place / "train")
    contents = [Path(path).read_bytes() for path, _ in expected.samples]
    truth = "".join(f"{expected.classes[label]}\n" for _, label in expected.samples)
    flat = {val_name(number): content for number, content in enumerate(contents, start=1)}
    if form == "folders":
        (place / "val").symlink_to(place / "train")
    if form == "flat":
        write_files(place / "val", flat)
    if form == "archives":
        classes = {}
        for path, label in expected.samples:
            members = {Path(path).name: Path(path).read_bytes()}
            classes[f"{expected.classes[label]}.tar"] = write_tar(
                tmp_path / "class.tar", members
            ).read_bytes()
        (place / "train").rename(tmp_path / "elsewhere")
        write_tar(place / "ILSVRC2012_img_train.tar", classes)
        write_tar(place / "ILSVRC2012_img_val.tar", flat)
    write_files(place, {"imagenet_2012_validation_synset_labels.txt": truth.encode()})
    raw = open_here(replace(get_dataset("imagenet"), classes=100), place)
    assert raw.class_ids == tuple(expected.classes)
    for split in ("train", "test"):
        images = raw.splits[split]
        assert isinstance(images, EncodedSplit)
        assert images.labels.tolist() == [label for _, label in expected.samples]
        assert [images.read(index) for index in range(len(images))] == contents
        assert images.states()[:, 0].tolist() == [len(content) for content in contents]
