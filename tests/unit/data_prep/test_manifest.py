from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep import DataError, Manifest, prepare
from data_prep import manifest as prepared_files

SMALL = (70, 30)


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    return prepare("digits", prepared=tmp_path, synthetic=SMALL)


def flip_bit(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (value,) = file.read(1)
        file.seek(place)
        file.write(bytes([value ^ 4]))


def test_the_manifest_says_what_is_there(digits: Manifest) -> None:
    assert digits.dataset == "digits" and digits.counts == {"train": 1437, "test": 360}
    assert digits.image_size == 32 and digits.channels == 1
    assert digits.classes == 10 and digits.class_names == tuple("0123456789")
    assert {name: sum(counts) for name, counts in digits.class_histogram.items()} == digits.counts
    assert (digits.mean, digits.std) == digits.normalization == ((0.3058,), (0.3237,))
    assert digits.quarantine == ()
    assert digits.bytes == sum(path.stat().st_size for path in digits.folder.glob("*.beton"))
    assert {"numpy", "pillow", "jpeg decoder", "opencv"} <= set(digits.versions)


def test_a_manifest_comes_back_from_its_file_and_from_another_process(digits: Manifest) -> None:
    assert Manifest.read(digits.folder) == digits
    assert pickle.loads(pickle.dumps(digits)) == digits


def test_a_folder_that_was_moved_is_still_good(small: Manifest, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    small.folder.rename(moved)
    manifest = Manifest.read(moved)
    manifest.check(small.spec)
    assert manifest.fingerprint == small.fingerprint
    assert len(manifest.files["train"].open_index(moved)) == 70


def damage_cut(manifest: Manifest) -> str:
    path = manifest.folder / "train.beton"
    os.truncate(path, path.stat().st_size // 2)
    return f"{path} has "


def damage_pixel(manifest: Manifest) -> str:
    path = manifest.folder / "train.beton"
    index = manifest.files["train"].open_index(manifest.folder)
    flip_bit(path, int(index.pointers[35]))
    return f"{path} was changed"


def damage_pixel_with_old_time(manifest: Manifest) -> str:
    path = manifest.folder / "train.beton"
    status = path.stat()
    line = damage_pixel(manifest)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return line


def damage_missing(manifest: Manifest) -> str:
    path = manifest.folder / "test.beton"
    path.unlink()
    return f"{path} is missing"


def damage_manifest_edited(manifest: Manifest) -> str:
    path = manifest.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["counts"]["train"] += 1
    path.write_text(json.dumps(content))
    return f"{path} was changed"


def damage_manifest_of_another_set(manifest: Manifest) -> str:
    other = prepare("mnist", prepared=manifest.folder.parent, synthetic=SMALL)
    path = manifest.folder / "manifest.json"
    shutil.copy(other.folder / "manifest.json", path)
    return f"{path} says dataset='mnist' instead of 'digits'"


def damage_manifest_garbage(manifest: Manifest) -> str:
    path = manifest.folder / "manifest.json"
    path.write_text("[1, 2")
    return f"{path} is not a manifest"


def damage_manifest_missing(manifest: Manifest) -> str:
    path = manifest.folder / "manifest.json"
    path.unlink()
    return f"{path} is missing"


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut,
        damage_pixel,
        damage_pixel_with_old_time,
        damage_missing,
        damage_manifest_edited,
        damage_manifest_of_another_set,
        damage_manifest_garbage,
        damage_manifest_missing,
    ],
)
def test_what_was_changed_is_not_used_and_named_in_one_line(
    damage: Callable[[Manifest], str], small: Manifest
) -> None:
    line = damage(small)
    with pytest.raises(DataError) as caught:
        prepare("digits", prepared=small.folder.parent, synthetic=SMALL)
    message = str(caught.value)
    assert message.startswith(line) and "\n" not in message
    assert message.endswith(f"delete the folder {small.folder} and it is prepared anew")
    shutil.rmtree(small.folder)
    anew = prepare("digits", prepared=small.folder.parent, synthetic=SMALL)
    assert anew.fingerprint == small.fingerprint


@pytest.mark.parametrize("place", ["header", "field", "label", "pointer", "end"])
def test_a_changed_index_is_found_at_every_opening(place: str, small: Manifest) -> None:
    path = small.folder / "train.beton"
    places = {"header": 4, "field": 30, "label": 3160, "pointer": 3152, "end": -20}
    assert small.files["train"].open_index(small.folder).path == path
    flip_bit(path, places[place] % path.stat().st_size)
    with pytest.raises(DataError, match=rf"^{path} .* delete the folder") as caught:
        small.files["train"].open_index(small.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("byte", range(0, 24, 2))
def test_no_changed_byte_of_the_header_ends_in_a_traceback(byte: int, small: Manifest) -> None:
    path = small.folder / "train.beton"
    flip_bit(path, byte)
    with pytest.raises(DataError):
        small.files["train"].open_index(small.folder)


def test_a_large_file_is_hashed_again_only_when_its_time_has_changed(
    small: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.folder / "train.beton"
    line = damage_pixel_with_old_time(small)
    monkeypatch.setattr(prepared_files, "_ALWAYS_HASHED_BYTES", path.stat().st_size - 1)
    assert prepare("digits", prepared=small.folder.parent, synthetic=SMALL).reused
    os.utime(path)
    with pytest.raises(DataError, match=line):
        prepare("digits", prepared=small.folder.parent, synthetic=SMALL)


def test_reuse_and_folder_are_no_part_of_what_is_compared(small: Manifest) -> None:
    assert replace(small, reused=True) == small
    assert json.loads(small.to_json()).keys().isdisjoint({"folder", "reused"})
