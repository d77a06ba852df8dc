from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN

from data_prep import DATASETS, DataError, get_dataset
from data_prep.datasets import NORMALIZATIONS, Download, Normalization, named_normalization
from data_prep.sources import READERS, ArraySplit, open_raw


@pytest.mark.parametrize("name", DATASETS)
def test_a_row_is_consistent(name: str) -> None:
    row = DATASETS[name]
    assert row.name == name and name.isalnum()
    assert row.reader in READERS
    assert row.license and row.source and row.title and row.raw
    if row.normalization is not None:
        assert len(row.normalization.mean) == len(row.normalization.std) == row.channels
    if row.classes is None:
        assert row.class_names == () and row.counts == {}
    else:
        assert set(row.counts) == {"train", "test"}
        assert len(set(row.class_names)) == len(row.class_names)
        assert len(row.class_names) in (0, row.classes)


@pytest.mark.parametrize(
    "download",
    [download for row in DATASETS.values() for download in row.downloads],
    ids=lambda download: download.path,
)
def test_a_download_has_addresses_a_name_and_a_checksum(download: Download) -> None:
    for url in download.urls:
        assert url.startswith(("http://", "https://"))
        assert url.rpartition("/")[2] == download.path.rpartition("/")[2]
    assert download.md5 is None or re.fullmatch("[0-9a-f]{32}", download.md5)
    assert download.bytes > 0 or download.md5 is None


def test_checksums_and_addresses_are_those_of_torchvision() -> None:
    expected = {
        "cifar10": {(CIFAR10.url, CIFAR10.tgz_md5)},
        "cifar100": {(CIFAR100.url, CIFAR100.tgz_md5)},
        "svhn": {(url, md5) for url, _, md5 in (SVHN.split_list[s] for s in ("train", "test"))},
        "mnist": {
            (mirror + name, md5) for mirror in MNIST.mirrors for name, md5 in MNIST.resources
        },
    }
    for name, published in expected.items():
        downloads = get_dataset(name).downloads
        assert {(url, item.md5) for item in downloads for url in item.urls} == published


@pytest.mark.skipif(not os.environ.get("TERNFORGE_DATA"), reason="TERNFORGE_DATA is not set")
def test_sizes_of_the_files_of_mnist_are_those_on_disk() -> None:
    for download in get_dataset("mnist").downloads:
        path = Path(os.environ["TERNFORGE_DATA"]) / "mnist" / download.path
        assert path.stat().st_size == download.bytes


def test_digits_mean_and_std_are_those_of_the_training_split(tmp_path: Path) -> None:
    row = get_dataset("digits")
    raw = open_raw(row, tmp_path, tmp_path, tell=lambda stage, done, total: None)
    images = raw.splits["train"]
    assert isinstance(images, ArraySplit) and row.normalization is not None
    pixels = images.images / 255
    assert row.normalization.mean == (round(float(np.mean(pixels)), 4),)
    assert row.normalization.std == (round(float(np.std(pixels)), 4),)


def test_normalizations_are_named() -> None:
    own = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert named_normalization("dataset", own) is own
    assert named_normalization("signed", own) == Normalization((0.5,) * 3, (0.5,) * 3)
    assert named_normalization("imagenet", own) == NORMALIZATIONS["imagenet"]
    with pytest.raises(DataError, match="unknown normalization 'mean': valid are dataset, unit, "):
        named_normalization("mean", own)
    with pytest.raises(DataError, match="'imagenet' is of 3 channels and the images have 1: take"):
        named_normalization("imagenet", Normalization((0.1,), (0.4,)))


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'minst': did you mean 'mnist'\?"):
        get_dataset("minst")
    with pytest.raises(DataError, match="known are digits, mnist"):
        get_dataset("zzz")


def test_listing_needs_neither_torch_nor_ffcv() -> None:
    code = (
        "import data_prep, sys; data_prep.DATASETS; "
        "print([m for m in ('torch', 'numpy', 'ffcv', 'sklearn') if m in sys.modules]);"
        "data_prep.ffcv_available();"
        "print([m for m in ('torch', 'ffcv', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.split() == ["[]", "[]"]
