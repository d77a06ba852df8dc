"""Reader of ImageNet (ILSVRC 2012) in the forms in which people have it on disk."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable

import numpy as np

from data_prep.datasets import DataError
from data_prep.raw.archives import TarTree, Tree
from data_prep.raw.class_folders import find_tree, is_image, label_files, list_classes
from data_prep.raw.splits import Raw, Source

#: Where the folders train/ and val/ may lie; the second is Kaggle's.
_INNER = ("", "ILSVRC/Data/CLS-LOC/")
_TRAIN_ARCHIVE, _TEST_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

_WNID = re.compile(r"n\d{8}")
_IMAGE_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")

_DEVKIT = "ILSVRC2012_devkit_t12"
_DEVKIT_FOLDERS = (f"{_DEVKIT}/data/", "devkit/data/", "data/", "")
_SYNSETS, _GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
#: Of a member of the devkit; the larger one has 230 kB.
_LARGEST_LIST = 16 << 20


def read_imagenet(source: Source) -> Raw:
    """Folders by class, a flat ``val/`` with its ground truth, or the two original tar archives.

    Labels are the ranks of the sorted WordNet ids.
    """
    dataset = source.dataset
    tree, top = find_tree(source, _has_training_images)
    train_tree, train_top = _find_split(source, tree, top, "train", _TRAIN_ARCHIVE)
    wnids = train_tree.folders(train_top)
    odd = [wnid for wnid in wnids if not _WNID.fullmatch(wnid)]
    if odd or len(wnids) != dataset.classes:
        found = f"a folder {odd[0]!r}" if odd else f"{len(wnids)} classes"
        raise DataError(
            f"{train_tree.place / train_top} has {found}, but {dataset.name} has "
            f"{dataset.classes:,} classes named n01440764 and so on; for a part of it take the "
            "data set `folder`"
        )
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    train, notes = list_classes(train_tree, train_top, labels, source.tell)
    test_tree, test_top = _find_split(source, tree, top, "val", _TEST_ARCHIVE)
    if any(_WNID.fullmatch(folder) for folder in test_tree.folders(test_top)):
        test, test_notes = list_classes(test_tree, test_top, labels, source.tell)
    else:
        names = [name for name in test_tree.files(test_top, deep=False) if is_image(name)]
        ground_truth, wnid_of_number = _ground_truth(tree, (top, f"{top}val/"), wnids)
        wnid_of = {name.rpartition("/")[2]: wnid_of_number.get(_number(name), "") for name in names}
        test = label_files(test_tree, names, wnid_of, labels, ground_truth)
        test_notes = [f"labels of the validation images are those of {ground_truth}"]
    splits = {"train": train, "test": test}
    return Raw(splits, _class_names(wnids), tuple(wnids), (*notes, *test_notes))


def _has_training_images(tree: Tree, top: str) -> bool:
    return tree.has(top + _TRAIN_ARCHIVE) or any(
        tree.folders(f"{top}{inner}train") for inner in _INNER
    )


def _find_split(source: Source, tree: Tree, top: str, split: str, archive: str) -> tuple[Tree, str]:
    """The tree with the images of a split, and the folder in it."""
    for inner in _INNER:
        folder = f"{top}{inner}{split}"
        if tree.folders(folder) or any(map(is_image, tree.files(folder, deep=False))):
            return tree, folder
    if tree.has(top + archive):
        return TarTree(tree.place / top / archive, source.tell), ""
    raise DataError(
        f"{tree.place / top} has neither {split}/ nor {archive}: {source.dataset.name} wants "
        f"{source.dataset.raw}"
    )


def _class_names(wnids: list[str]) -> tuple[str, ...]:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    complete = len(wnids) == len(_IMAGENET_CATEGORIES)
    return tuple(_IMAGENET_CATEGORIES if complete else wnids)


def _number(name: str) -> int:
    """Of a validation image, from 1 to 50,000; 0 for another file."""
    match = _IMAGE_NUMBER.search(name)
    return int(match[1]) if match else 0


def _ground_truth(
    tree: Tree, folders: tuple[str, ...], wnids: list[str]
) -> tuple[str, dict[int, str]]:
    """The first list of labels that is found: its name, and the class of each image by number."""
    readers: dict[str, Callable[[str], dict[int, str]]] = {
        "LOC_val_solution.csv": _read_kaggle,
        "imagenet_2012_validation_synset_labels.txt": _read_synset_labels,
        "val.txt": lambda text: _read_caffe(text, wnids),
    }
    for folder in folders:
        for name, read in readers.items():
            if tree.has(folder + name):
                text = tree.read(folder + name).decode(errors="replace")
                try:
                    return folder + name, read(text)
                except (ValueError, LookupError):
                    raise DataError(
                        f"{tree.place / folder / name} is not the list of labels that has this name"
                    ) from None
        devkit = _find_devkit(tree, folder)
        if devkit:
            found, synsets, ranks = devkit
            return found, _read_devkit(synsets, ranks, found)
    raise DataError(
        f"{tree.place / folders[0]} has no labels of the flat validation images: put "
        f"{', '.join(readers)} or {_DEVKIT}.tar.gz there"
    )


def _read_kaggle(text: str) -> dict[int, str]:
    """Lines ``ILSVRC2012_val_00000001,n01751748 111 108 431 202``: name, class, boxes."""
    rows = [line.split(",") for line in text.splitlines()[1:]]
    return {_number(row[0]): row[1].split()[0] for row in rows}


def _read_synset_labels(text: str) -> dict[int, str]:
    """A WordNet id on each line, in the order of the images."""
    return dict(enumerate(text.split(), start=1))


def _read_caffe(text: str, wnids: list[str]) -> dict[int, str]:
    """Lines ``ILSVRC2012_val_00000001.JPEG 65``: name, rank among the sorted WordNet ids."""
    wnid_of = dict(enumerate(wnids))
    rows = [line.split() for line in text.splitlines()]
    return {_number(row[0]): wnid_of[int(row[1])] for row in rows}


def _find_devkit(tree: Tree, folder: str) -> tuple[str, bytes, bytes] | None:
    """Name, synsets and ground truth of the official development kit, as folder or archive."""
    for inner in _DEVKIT_FOLDERS:
        if tree.has(folder + inner + _GROUND_TRUTH):
            found = folder + inner + _GROUND_TRUTH
            if not tree.has(folder + inner + _SYNSETS):
                raise DataError(f"{tree.place / found} says nothing without {_SYNSETS} beside it")
            return found, tree.read(folder + inner + _SYNSETS), tree.read(found)
    found = f"{folder}{_DEVKIT}.tar.gz"
    if not tree.has(found):
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(tree.read(found)), mode="r:gz") as archive:
            synsets, ranks = (
                _member(archive, f"{_DEVKIT}/data/{name}") for name in (_SYNSETS, _GROUND_TRUTH)
            )
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        raise DataError(f"{tree.place / found} is cut or not the devkit ({error})") from None
    return found, synsets, ranks


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read(_LARGEST_LIST)


def _read_devkit(synsets: bytes, ranks: bytes, found: str) -> dict[int, str]:
    """MATLAB's table of synsets, and for each image the number of its synset in that table."""
    from scipy.io import loadmat

    try:
        table = np.atleast_1d(loadmat(io.BytesIO(synsets), squeeze_me=True)["synsets"])
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
        return {n: wnid_of[int(rank)] for n, rank in enumerate(ranks.split(), start=1)}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{found} and its {_SYNSETS} are not those of the devkit ({error})"
        ) from None
