from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import DataError, Manifest, convert, get_dataset, loaders, plan, prepare
from data_prep import manifest as prepared_files
from data_prep.__main__ import main
from data_prep.convert import Progress
from data_prep.datasets import one_line_for_os_errors
from data_prep.loaders import open_split
from data_prep.sources import Split, read

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


OrdinaryUser = Callable[[], AbstractContextManager[None]]


def test_no_write_permission_is_one_line(public_folder: Path, without_root: OrdinaryUser) -> None:
    public_folder.chmod(0o555)
    with without_root(), pytest.raises(DataError) as caught:
        prepare("digits", prepared=public_folder, synthetic=SMALL)
    line = str(caught.value)
    assert line.startswith(f"cannot prepare digits: {public_folder}/")
    assert line.endswith(": Permission denied") and "\n" not in line


@pytest.mark.parametrize("work", [prepare, plan])
def test_a_folder_that_cannot_be_looked_into_is_one_line(
    work: Callable[..., object], public_folder: Path, without_root: OrdinaryUser
) -> None:
    locked = public_folder / "locked"
    locked.mkdir(mode=0)
    message = f"^cannot prepare digits: {locked}/.*: Permission denied$"
    with without_root(), pytest.raises(DataError, match=message):
        work("digits", prepared=locked / "prepared", synthetic=SMALL)
    message = f"^cannot prepare mnist: {locked}/.*: Permission denied$"
    with without_root(), pytest.raises(DataError, match=message):
        work("mnist", prepared=public_folder, root=locked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prepared_file_that_cannot_be_read_is_one_line(
    backend: str, public_folder: Path, without_root: OrdinaryUser
) -> None:
    manifest = prepare("digits", prepared=public_folder, backend=backend, synthetic=SMALL)
    path = manifest.folder / manifest.files["test"][0].name
    path.chmod(0)
    message = f"^cannot prepare digits: {path}: Permission denied$"
    with without_root(), pytest.raises(DataError, match=message):
        prepare("digits", prepared=public_folder, backend=backend, synthetic=SMALL)


def test_an_error_without_a_reason_of_the_system_says_its_own(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=f"^cannot read: {tmp_path}: not seekable$"),
        one_line_for_os_errors("cannot read", tmp_path),
    ):
        raise OSError("not seekable")


@pytest.mark.parametrize("work", [prepare, plan])
@pytest.mark.parametrize("counts", [(0, 0), (5, 0), (-1, 5)])
def test_a_split_without_images_is_refused(
    counts: tuple[int, int], work: Callable[..., object], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"cannot generate .* each split needs at least 1"):
        work("digits", prepared=tmp_path, synthetic=counts)
    assert list(tmp_path.iterdir()) == []


Writer = Callable[[Path, str, Split, Progress], list[Path]]
WRITERS = {"ffcv": "_write_beton", "torch": "_write_arrays"}


def wrong_pixel(split: Split) -> Split:
    images = split.images.copy()
    images[-1, -1, -1, -1] ^= 1
    return Split(images, split.labels)


def wrong_label(split: Split) -> Split:
    labels = split.labels.copy()
    labels[-1] ^= 1
    return Split(split.images, labels)


def one_missing(split: Split) -> Split:
    return Split(split.images[:-1], split.labels[:-1])


def one_image_missing(split: Split) -> Split:
    return Split(split.images[:-1], split.labels)


def let_write(monkeypatch: pytest.MonkeyPatch, backend: str, fault: Callable[[Split], Split]):
    """Let the real writer of a backend write something else than it was given."""
    writer: Writer = getattr(convert, WRITERS[backend])

    def faulty(folder: Path, name: str, split: Split, tell: Progress) -> list[Path]:
        return writer(folder, name, fault(split), tell)

    monkeypatch.setattr(convert, WRITERS[backend], faulty)


@pytest.mark.parametrize(
    ("backend", "fault", "line"),
    [
        ("ffcv", wrong_pixel, "train.beton: images 0 to 69 read back are not those written"),
        ("torch", wrong_pixel, "train-images.npy: images 0 to 69 read back are not those written"),
        ("ffcv", wrong_label, "train.beton: the labels read back are not those"),
        ("torch", wrong_label, "train-images.npy: the labels read back are not those"),
        ("ffcv", one_missing, "train.beton: the labels read back are not those"),
        ("torch", one_missing, "train-images.npy: the labels read back are not those"),
        ("torch", one_image_missing, "train-images.npy has 69 images for 70 labels"),
    ],
)
def test_what_a_writer_wrote_wrong_is_found_and_nothing_is_left(
    backend: str,
    fault: Callable[[Split], Split],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_write(monkeypatch, backend, fault)
    with pytest.raises(DataError, match=line):
        prepare("digits", prepared=tmp_path, backend=backend, synthetic=SMALL)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_reader_that_ends_early_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ShortReader(loaders.ArrayReader):
        def read(self, order: loaders.Indices) -> Generator[loaders.Images]:
            return super().read(order[:-1])

    monkeypatch.setattr(loaders, "ArrayReader", ShortReader)
    with pytest.raises(DataError, match="69 images could be read back instead of 70"):
        prepare("digits", prepared=tmp_path, backend="torch", synthetic=SMALL)


def test_large_splits_are_verified_by_samples_over_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_FULLY_VERIFIED_BYTES", 1 << 16)
    monkeypatch.setattr(convert, "_VERIFIED_SAMPLES", 7)
    told: dict[str, int] = {}
    prepare(
        "digits",
        prepared=tmp_path / "right",
        backend="torch",
        synthetic=SMALL,
        progress=lambda stage, done, total: told.update({stage: total}),
    )
    assert told["verify train"] == 7  # 70 images of 1,024 bytes are more than 64 KiB
    assert told["verify test"] == 30  # 30 are not
    let_write(monkeypatch, "torch", wrong_pixel)  # of the last image, which is a sample
    with pytest.raises(DataError, match="images 0 to 69 read back are not those written"):
        prepare("digits", prepared=tmp_path / "wrong", backend="torch", synthetic=SMALL)


def test_a_large_file_is_hashed_again_only_when_its_time_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepare("digits", prepared=tmp_path, backend="torch", synthetic=SMALL)
    path = manifest.folder / manifest.files["test"][0].name
    line = damage_bit_with_old_time(manifest)
    monkeypatch.setattr(prepared_files, "_ALWAYS_HASHED_BYTES", path.stat().st_size - 1)
    assert prepare("digits", prepared=tmp_path, backend="torch", synthetic=SMALL).reused
    os.utime(path)
    with pytest.raises(DataError, match=line):
        prepare("digits", prepared=tmp_path, backend="torch", synthetic=SMALL)


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
