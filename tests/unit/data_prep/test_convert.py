from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import DataError, Manifest, get_dataset, plan, prepare
from data_prep.__main__ import main
from data_prep.loaders import open_split
from data_prep.sources import read

BACKENDS = ["ffcv", "torch"]
SMALL = (70, 30)


def test_labels_and_pixels_read_back_are_those_of_the_source(
    digits: Manifest, tmp_path: Path
) -> None:
    source = read(get_dataset("digits"), None, tmp_path)
    for split in ("train", "test"):
        reader = open_split(digits, split, batch_size=100)
        images = [batch.copy() for batch in reader.read(np.arange(len(reader.labels)))]
        assert np.array_equal(np.concatenate(images), source[split].images)
        assert np.array_equal(reader.labels, source[split].labels)


def test_the_manifest_says_what_is_there(digits: Manifest) -> None:
    assert digits.dataset == "digits" and digits.counts == {"train": 1437, "test": 360}
    assert digits.image_shape == (32, 32, 1) and len(digits.class_names) == 10
    assert sum(digits.class_histogram["train"]) == 1437
    assert digits.bytes == sum(
        path.stat().st_size for path in digits.folder.iterdir() if path.name != "manifest.json"
    )
    assert pickle.loads(pickle.dumps(digits)) == digits
    assert Manifest.read(digits.folder) == digits


def test_both_backends_have_the_same_fingerprint(
    digits_of_both: tuple[Manifest, Manifest],
) -> None:
    beton, arrays = digits_of_both
    assert beton.fingerprint == arrays.fingerprint
    assert beton.folder != arrays.folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_files_are_reused_untouched(backend: str, tmp_path: Path) -> None:
    first = prepare("digits", prepared=tmp_path, backend=backend, synthetic=SMALL)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare("digits", prepared=tmp_path, backend=backend, synthetic=SMALL)
    assert not first.reused and second.reused and first == second
    assert times == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_another_spec_gets_another_folder(tmp_path: Path) -> None:
    row = get_dataset("digits")
    small = prepare(row, prepared=tmp_path, backend="torch", synthetic=SMALL)
    larger = prepare(row, prepared=tmp_path, backend="torch", synthetic=(71, 30))
    scaled = prepare(replace(row, mean=(0.1,)), prepared=tmp_path, backend="torch", synthetic=SMALL)
    assert len({small.folder, larger.folder, scaled.folder}) == 3
    assert small.fingerprint == scaled.fingerprint != larger.fingerprint


def damage_cut(manifest: Manifest) -> str:
    path = manifest.folder / manifest.files["train"][0].name
    os.truncate(path, path.stat().st_size // 2)
    return f"{path} has "


def damage_bit(manifest: Manifest) -> str:
    path = manifest.folder / manifest.files["train"][0].name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    return f"{path} was changed"


def damage_bit_with_old_time(manifest: Manifest) -> str:
    path = manifest.folder / manifest.files["test"][0].name
    status = path.stat()
    line = damage_bit(replace(manifest, files={"train": manifest.files["test"]}))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return line


def damage_missing(manifest: Manifest) -> str:
    path = manifest.folder / manifest.files["test"][0].name
    path.unlink()
    return f"{path} is missing"


def damage_manifest_edited(manifest: Manifest) -> str:
    path = manifest.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["spec"]["counts"]["train"] += 1
    path.write_text(json.dumps(content))
    return f"{path} was changed"


def damage_manifest_of_another_set(manifest: Manifest) -> str:
    other = prepare(
        "mnist", prepared=manifest.folder.parent, backend=manifest.backend, synthetic=SMALL
    )
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


DAMAGES = [
    damage_cut,
    damage_bit,
    damage_bit_with_old_time,
    damage_missing,
    damage_manifest_edited,
    damage_manifest_of_another_set,
    damage_manifest_garbage,
    damage_manifest_missing,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_file_and_the_remedy(
    damage: Callable[[Manifest], str], backend: str, tmp_path: Path
) -> None:
    manifest = prepare("digits", prepared=tmp_path, backend=backend, synthetic=SMALL)
    expected = damage(manifest)
    with pytest.raises(DataError) as caught:
        prepare("digits", prepared=tmp_path, backend=backend, synthetic=SMALL)
    line = str(caught.value)
    assert line.startswith(expected) and "\n" not in line
    assert f"delete the folder {manifest.folder}" in line
    shutil.rmtree(manifest.folder)  # the remedy works
    again = prepare("digits", prepared=tmp_path, backend=backend, synthetic=SMALL)
    assert again.fingerprint == manifest.fingerprint and not again.reused


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_writes_nothing_and_tells_names_and_sizes(backend: str, tmp_path: Path) -> None:
    prepared = tmp_path / "new"
    planned = plan("digits", prepared=prepared, backend=backend)
    assert not prepared.exists() and not planned.ready
    manifest = prepare("digits", prepared=prepared, backend=backend)
    sizes = {file.name: file.bytes for files in manifest.files.values() for file in files}
    assert planned.folder == manifest.folder
    assert planned.files == pytest.approx(sizes, rel=0.01)
    ready = plan("digits", prepared=prepared, backend=backend)
    assert ready.ready and ready.files == sizes


def test_a_plan_says_where_raw_data_comes_from(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    missing = plan("mnist", root=tmp_path, prepared=tmp_path)
    assert missing.source == f"a download of 12 MB to {tmp_path / 'mnist'}"
    raw.mkdir(parents=True)
    for name in get_dataset("mnist").raw_files:
        (tmp_path / "mnist" / name).touch()
    assert plan("mnist", root=tmp_path, prepared=tmp_path).source == str(tmp_path / "mnist")
    assert plan("digits", prepared=tmp_path).source == "an installed package"


def test_progress_tells_the_stages_in_order_and_ends_each(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare("digits", prepared=tmp_path, progress=lambda *event: told.append(event))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == ["read", "write train", "write test", "verify train", "verify test"]
    for stage in stages:
        done = [(done, total) for name, done, total in told if name == stage]
        assert done[-1][0] == done[-1][1] and done == sorted(done)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(DataError, match=f"cannot prepare digits: {blocker}.*: Not a directory"):
        prepare("digits", prepared=blocker / "prepared", synthetic=SMALL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="Permission denied"):
        prepare("digits", prepared=tmp_path, synthetic=SMALL)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data backend 'fcv': valid are ffcv, torch"):
        prepare("digits", prepared=tmp_path, backend="fcv")


def test_the_command_prepares_and_reports_errors_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["data_prep", "digits", "--prepared", str(tmp_path)])
    assert main() == 0
    assert "1437 train, 360 test images, written and verified" in capsys.readouterr().out
    assert main() == 0
    assert "already prepared" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["data_prep", "digit", "--prepared", str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err == "error: unknown data set 'digit': did you mean 'digits'?\n"
