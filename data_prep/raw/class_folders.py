"""Readers of encoded images in folders by class, on disk or in an archive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from data_prep.datasets import DataError, Dataset
from data_prep.raw.archives import ARCHIVE_SUFFIXES, FolderTree, Tree, open_tree
from data_prep.raw.downloads import fetch
from data_prep.raw.names import printable
from data_prep.raw.splits import EncodedSplit, Progress, Raw, Source

#: All that torchvision takes for images, and GIF.
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
)


def read_class_folders(source: Source) -> Raw:
    """``train/<class>/`` and ``val/<class>/`` or ``test/<class>/``; labels by sorted class name."""
    dataset = source.dataset
    tree, top = find_tree(source, lambda tree, top: bool(tree.folders(f"{top}train")))
    classes = tree.folders(f"{top}train")
    if dataset.classes and len(classes) != dataset.classes:
        raise DataError(
            f"{tree.place} has {len(classes)} classes in {top}train/ instead of the "
            f"{dataset.classes} of {dataset.name}"
        )
    labels = {name: label for label, name in enumerate(classes)}
    tested = next((name for name in ("val", "test") if tree.folders(f"{top}{name}")), None)
    if tested is None:
        raise DataError(
            f"{tree.place} has no {top}val/ with a folder for each class: {_wanted(dataset)}"
        )
    train, notes = list_classes(tree, f"{top}train", labels, source.tell)
    test, test_notes = list_classes(tree, f"{top}{tested}", labels, source.tell)
    notes += test_notes
    empty = sorted(set(range(len(classes))) - set(train.labels.tolist()))
    if empty:
        name = printable(classes[empty[0]])
        raise DataError(f"{tree.place} has no images in {top}train/{name}/")
    if tested == "val" and tree.folders(f"{top}test"):
        notes.append(f"{top}test/ is not used: {top}val/ is there")
    class_names = tuple(map(printable, classes))
    return Raw({"train": train, "test": test}, class_names, tuple(classes), tuple(notes))


def read_tinyimagenet(source: Source) -> Raw:
    """Stanford's layout: labels by sorted WordNet id, those for testing from a list."""
    tree, top = find_tree(source, lambda tree, top: tree.has(f"{top}wnids.txt"))
    wnids = sorted(set(_text(tree, f"{top}wnids.txt").split()))
    if len(wnids) != source.dataset.classes:
        raise DataError(
            f"{tree.place} has {len(wnids)} classes in {top}wnids.txt instead of the "
            f"{source.dataset.classes} of {source.dataset.name}"
        )
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    train, notes = list_classes(tree, f"{top}train", labels, source.tell, inner="/images")
    rows = (line.split("\t") for line in _text(tree, f"{top}val/val_annotations.txt").splitlines())
    wnid_of = {row[0]: row[1] for row in rows if len(row) > 1}
    names = [name for name in tree.files(f"{top}val/images") if is_image(name)]
    test = label_files(tree, names, wnid_of, labels, f"{top}val/val_annotations.txt")
    first = {}
    if tree.has(f"{top}words.txt"):
        words = (line.partition("\t") for line in _text(tree, f"{top}words.txt").splitlines())
        first = {wnid: synonyms.partition(",")[0] for wnid, _, synonyms in words}
    else:
        notes.append(f"no {top}words.txt: classes are named by their WordNet ids")
    class_names = tuple(first.get(wnid, wnid) for wnid in wnids)
    return Raw({"train": train, "test": test}, class_names, tuple(wnids), tuple(notes))


def find_tree(source: Source, is_top: Callable[[Tree, str], bool]) -> tuple[Tree, str]:
    """The folder or archive with a data set's files.

    It is the place itself, or a folder or the only archive in it; where there is neither, the
    row's download is fetched.

    Args:
        source: what to read.
        is_top: tells of a tree and of a folder in it, with ``/`` at its end or empty, whether
            the files lie there.

    Returns:
        the tree, and the folder in it as given to ``is_top``.

    Raises:
        DataError: when there is nothing of the layout that is looked for.
    """
    if source.place.is_dir():
        tree: Tree = FolderTree(source.place)
        top = _top(tree, is_top)
        if top is not None:
            return tree, top
    archive = source.place if source.place.is_file() else _archive(source)
    tree = open_tree(archive, source.tell)
    top = _top(tree, is_top)
    if top is None:
        raise DataError(f"{archive} has another layout: {_wanted(source.dataset)}")
    return tree, top


def _top(tree: Tree, is_top: Callable[[Tree, str], bool]) -> str | None:
    tops = ["", *(f"{name}/" for name in tree.folders())]
    return next((top for top in tops if is_top(tree, top)), None)


def _archive(source: Source) -> Path:
    dataset, place = source.dataset, source.place
    for download in dataset.downloads:
        if (place / download.path).exists():
            return fetch(source, download)
    entries = sorted(place.iterdir()) if place.is_dir() else []
    archives = [
        path for path in entries if path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file()
    ]
    if len(archives) == 1:
        return archives[0]
    if len(archives) > 1:
        raise DataError(
            f"{place} holds {len(archives)} archives, such as {archives[0].name} and "
            f"{archives[1].name}: name one of them by data.raw"
        )
    for download in dataset.downloads:
        return fetch(source, download)
    missing = "does not exist" if not place.exists() else "holds no such files"
    raise DataError(f"{place} {missing}: {_wanted(dataset)}")


def _wanted(dataset: Dataset) -> str:
    return f"{dataset.name} wants {dataset.raw}"


def list_classes(
    tree: Tree, below: str, labels: Mapping[str, int], tell: Progress, *, inner: str = ""
) -> tuple[EncodedSplit, list[str]]:
    """The images of a split whose classes are folders.

    Args:
        tree: where they lie.
        below: folder with the folders of classes; empty for all of the tree.
        labels: label of each class by the name of its folder.
        tell: progress in classes.
        inner: folder with the images in each folder of a class.

    Returns:
        the images, by class and name, and notes on files that are none.

    Raises:
        DataError: for a folder that is no class.
    """
    top = f"{below}/" if below else ""
    unknown = sorted(set(tree.folders(below)) - set(labels))
    if unknown:
        raise DataError(f"{tree.place / below} has the folder {unknown[0]!r}, but train/ has none")
    names: list[str] = []
    counts = []
    others = tree.files(below, deep=False)
    for done, (name, label) in enumerate(labels.items()):
        tell(f"list {below or tree.place.name}", done, len(labels))
        files = tree.files(f"{top}{name}{inner}")
        images = [file for file in files if is_image(file)]
        if len(images) < len(files):
            others += [file for file in files if not is_image(file)]
        names += images
        counts.append((label, len(images)))
    tell(f"list {below or tree.place.name}", len(labels), len(labels))
    others += sorted(name for name in tree.special if name.startswith(top))
    label_of_class, count = np.array(counts, dtype=np.int64).T
    notes = []
    if others:
        notes.append(
            f"{len(others):,} files in {below or tree.place.name} are left out, being no images by "
            f"name, no regular files or in no folder of a class: {printable(others[0])}"
            f"{', ...' if len(others) > 1 else ''}"
        )
    return tree.split(names, np.repeat(label_of_class, count)), notes


def label_files(
    tree: Tree,
    names: list[str],
    class_of: Mapping[str, str],
    labels: Mapping[str, int],
    list_name: str,
) -> EncodedSplit:
    """The images of a split in one folder, whose classes come from a list.

    Args:
        tree: where they lie.
        names: of the files.
        class_of: class by the file's name without folders.
        labels: label of each class.
        list_name: name of the list, for people.

    Raises:
        DataError: for an image that the list does not name, or a class without a label.
    """
    found = []
    for name in names:
        class_name = class_of.get(name.rpartition("/")[2], "")
        if class_name not in labels:
            problem = f"says {class_name}: no class" if class_name else "does not name it"
            file = printable(str(tree.place / name))
            raise DataError(f"{file} has no label: {list_name} {problem}")
        found.append(labels[class_name])
    return tree.split(names, np.array(found, dtype=np.int64))


def is_image(name: str) -> bool:
    """Whether a file is an image by the end of its name."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _text(tree: Tree, name: str) -> str:
    if not tree.has(name):
        raise DataError(f"{tree.place / name} is missing: the labels stand there")
    return tree.read(name).decode(errors="replace")
