from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import DATASETS, DataError, get_dataset
from data_prep.sources import READERS, read


@pytest.mark.parametrize("name", DATASETS)
def test_a_row_is_consistent(name: str) -> None:
    row = DATASETS[name]
    assert row.name == name and name.isalnum()
    assert row.reader in READERS
    assert len(row.mean) == len(row.std) == row.channels
    assert len(set(row.class_names)) == len(row.class_names)
    assert set(row.counts) == {"train", "test"}
    assert row.license and row.source and row.title


def test_digits_mean_and_std_are_those_of_the_training_split(tmp_path: Path) -> None:
    row = get_dataset("digits")
    pixels = read(row, None, tmp_path)["train"].images / 255
    assert row.mean == (round(float(np.mean(pixels)), 4),)
    assert row.std == (round(float(np.std(pixels)), 4),)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'minst': did you mean 'mnist'\?"):
        get_dataset("minst")
    with pytest.raises(DataError, match="known are digits, mnist"):
        get_dataset("zzz")


def test_listing_needs_neither_torch_nor_ffcv() -> None:
    code = (
        "import data_prep, sys; data_prep.DATASETS; data_prep.ffcv_available();"
        "print([m for m in ('torch', 'numpy', 'ffcv', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"
