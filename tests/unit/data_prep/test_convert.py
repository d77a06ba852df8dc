from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from data_prep import DataError, Manifest, convert, ffcv_available, get_dataset, plan, prepare
from data_prep.beton import JPG
from data_prep.datasets import Storage, one_line_for_os_errors
from data_prep.preparing import images
from data_prep.sources import generate
from tests.pictures import picture, write_class_folders

SMALL = (70, 30)
AS_PIXELS = Storage(side=None, format="raw")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("raw") / "pets")


def read_back(manifest: Manifest, split: str) -> tuple[list[np.ndarray], list[int]]:
    """Images of a prepared split, decoded by Pillow, and labels."""
    index = manifest.files[split].open_index(manifest.folder)
    content = index.path.read_bytes()
    images = []
    for number in range(len(index)):
        start = int(index.pointers[number])
        data = content[start : start + int(index.sizes[number])]
        if index.modes[number] == JPG:
            images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        else:
            shape = (index.heights[number], index.widths[number], index.channels)
            images.append(np.frombuffer(data, np.uint8).reshape(shape))
    return images, index.labels.tolist()


@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [
        (AS_PIXELS, 0),
        (Storage(side=None), 0),
        (Storage(side=None, passthrough=False, quality=95), 12),
        (Storage(side=None, format="mixed"), 0),
    ],
)
def test_class_folders_come_back_with_the_pixels_and_labels_of_torchvision(
    storage: Storage, tolerance: int, folders: Path, tmp_path: Path
) -> None:
    manifest = prepare("folder", raw=folders, prepared=tmp_path, storage=storage)
    for split, source in (("train", "train"), ("test", "val")):
        images, labels = read_back(manifest, split)
        expected = ImageFolder(str(folders / source))
        assert labels == expected.targets
        for image, (shown, _) in zip(images, expected, strict=True):
            assert np.abs(image.astype(int) - np.asarray(shown)).max() <= tolerance
    assert manifest.class_names == ("cat", "dog") and manifest.classes == 2
    assert manifest.counts == {"train": 48, "test": 12}
    assert manifest.class_histogram == {"train": [24, 24], "test": [6, 6]}


def test_larger_images_are_reduced(folders: Path, tmp_path: Path) -> None:
    manifest = prepare("folder", raw=folders, prepared=tmp_path, storage=Storage(side=48))
    images, _ = read_back(manifest, "train")
    for image, (shown, _) in zip(images, ImageFolder(str(folders / "train")), strict=True):
        fitting = ImageOps.contain(shown, (48, 48)) if max(shown.size) > 48 else shown
        assert np.abs(np.array(image.shape[1::-1]) - fitting.size).max() <= 1
        assert max(image.shape[:2]) == max(fitting.size)


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet16"])
def test_arrays_come_back_pixel_by_pixel(name: str, tmp_path: Path) -> None:
    manifest = prepare(name, prepared=tmp_path, synthetic=SMALL)
    for split, source in generate(get_dataset(name), SMALL).items():
        images, labels = read_back(manifest, split)
        assert np.array_equal(images, source.images) and labels == source.labels.tolist()


def test_the_number_of_processes_and_the_folder_change_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_FEW", 10)
    storage = Storage(side=60, format="mixed")
    alone, shared = (
        prepare("folder", raw=folders, prepared=tmp_path / name, storage=storage, processes=count)
        for name, count in (("alone", 1), ("shared", 3))
    )
    assert alone.fingerprint == shared.fingerprint
    assert (alone.mean, alone.std) == (shared.mean, shared.std)
    for split in ("train", "test"):
        files = (manifest.folder / f"{split}.beton" for manifest in (alone, shared))
        assert next(files).read_bytes() == next(files).read_bytes()


def test_mean_and_deviation_are_those_of_all_training_pixels(folders: Path, tmp_path: Path) -> None:
    manifest = prepare("folder", raw=folders, prepared=tmp_path, storage=AS_PIXELS)
    images = [np.asarray(image).reshape(-1, 3) for image, _ in ImageFolder(str(folders / "train"))]
    pixels = np.concatenate(images) / 255
    assert manifest.mean == pytest.approx(pixels.mean(0), rel=1e-12)
    assert manifest.std == pytest.approx(pixels.std(0), rel=1e-9)


def test_what_could_not_be_checked_without_ffcv_is_noted(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare("folder", raw=folders, prepared=tmp_path / "with")
    monkeypatch.setattr(images, "_turbo", lambda: None)
    manifest = prepare("folder", raw=folders, prepared=tmp_path / "without")
    assert manifest.fingerprint == expected.fingerprint
    assert any("damage in the middle of a JPEG was not looked for" in it for it in manifest.notes)
    assert manifest.versions["jpeg decoder"].startswith("pillow ")


@pytest.mark.skipif(not ffcv_available(), reason="FFCV is not installed")
def test_the_manifest_says_which_library_decoded(folders: Path, tmp_path: Path) -> None:
    manifest = prepare("folder", raw=folders, prepared=tmp_path)
    assert manifest.versions["jpeg decoder"] == f"ffcv {version('ffcv')}"


def test_images_of_a_single_color_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20), "gray").save(tmp_path / split / name / "0.png")
    with pytest.raises(DataError, match="all training images have one color"):
        prepare("folder", raw=tmp_path, prepared=tmp_path / "new" / "prepared")
    assert not (tmp_path / "new").exists()


def damaged_copy(folders: Path, target: Path, count: int) -> list[Path]:
    """A copy with so many bad training images, spread over the classes."""
    shutil.copytree(folders, target)
    bad = [target / "train" / ("cat", "dog")[i % 2] / f"{3 * i + 1:03}.jpg" for i in range(count)]
    for number, path in enumerate(bad):
        content = path.read_bytes()
        path.write_bytes([b"", b"text", content[: len(content) // 2]][number % 3])
    return bad


def test_bad_images_are_left_out_and_listed_and_the_rest_stays_in_step(
    folders: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    bad = damaged_copy(folders, raw, 3)
    manifest = prepare(
        "folder", raw=raw, prepared=tmp_path / "new", storage=AS_PIXELS, bad_share=0.1
    )
    assert sorted(file.name for file in manifest.quarantine) == sorted(map(str, bad))
    assert {file.split for file in manifest.quarantine} == {"train"}
    reasons = {file.reason for file in manifest.quarantine}
    assert {"the file is empty"} < reasons and len(reasons) == 3
    assert manifest.counts == {"train": 45, "test": 12}
    whole = ImageFolder(str(folders / "train"))
    names = {str(path.relative_to(raw)) for path in bad}
    kept = [
        number
        for number, (path, _) in enumerate(whole.samples)
        if str(Path(path).relative_to(folders)) not in names
    ]
    images, labels = read_back(manifest, "train")
    assert labels == [whole.targets[number] for number in kept]
    for image, number in zip(images, kept, strict=True):
        assert np.array_equal(image, np.asarray(whole[number][0]))
    assert manifest == Manifest.read(manifest.folder)


@pytest.mark.parametrize(
    ("count", "bad_share", "is_allowed"),
    [(1, 0.001, True), (1, 0.0, False), (2, 0.001, False), (4, 0.1, True), (5, 0.1, False)],
)
def test_too_many_bad_images_stop_the_run(
    count: int, bad_share: float, is_allowed: bool, folders: Path, tmp_path: Path
) -> None:
    raw, prepared = tmp_path / "raw", tmp_path / "new"
    bad = damaged_copy(folders, raw, count)
    if is_allowed:
        assert len(prepare("folder", raw=raw, prepared=prepared, bad_share=bad_share).quarantine)
        return
    with pytest.raises(DataError) as caught:
        prepare("folder", raw=raw, prepared=prepared, bad_share=bad_share)
    line = str(caught.value)
    assert f"more than data.bad_share={bad_share:g} of all" in line and "\n" not in line
    assert line.startswith(f"{count} of the first ") and str(bad[0]) in line
    assert not prepared.exists()


def test_a_share_of_bad_images_is_allowed_or_not_when_files_are_reused_too(
    folders: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    bad = damaged_copy(folders, raw, 4)
    options: dict[str, Any] = {"raw": raw, "prepared": tmp_path / "new"}
    written = prepare("folder", bad_share=0.1, **options)
    assert prepare("folder", bad_share=4 / 48, **options).reused
    for share in (0.0, 0.001, 3.9 / 48):
        with pytest.raises(DataError) as caught:
            prepare("folder", bad_share=share, **options)
        line = str(caught.value)
        assert line.startswith(f"{written.folder} was prepared without 4 bad train images of 48")
        assert f"data.bad_share={share:g} of all" in line and str(bad[0]) in line
        assert "\n" not in line


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_that_loses_all_its_images_is_named(
    split: str, folders: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(folders, raw)
    for path in (raw / split / "dog").iterdir():
        path.write_bytes(b"")
    if split == "val":
        manifest = prepare("folder", raw=raw, prepared=tmp_path / "new", bad_share=0.5)
        assert "all test images of dog are bad" in manifest.notes
        assert manifest.class_histogram["test"] == [6, 0]
        return
    first = raw / "train" / "dog" / "000.jpg"
    message = f"^all train images of dog are bad: {first}: the file is empty$"
    with pytest.raises(DataError, match=message):
        prepare("folder", raw=raw, prepared=tmp_path / "new", bad_share=0.5)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_cannot_be_read_is_no_bad_image(folders: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(folders, raw)
    failing = raw / "train" / "dog" / "003.jpg"
    failing.unlink()
    failing.symlink_to("/proc/self/mem")  # reading it is an input/output error
    with pytest.raises(DataError, match=f"^cannot read {failing}: Input/output error$"):
        prepare("folder", raw=raw, prepared=tmp_path / "new", bad_share=1)
    assert not (tmp_path / "new").exists()


def test_raw_files_that_have_changed_since_are_told_of(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for split in ("train", "val"):
        for number in range(2):
            folder = raw / split / f"n{number:08}"
            folder.mkdir(parents=True)
            picture(number, 40, 40).save(folder / f"{folder.name}_1.JPEG")
    row = replace(get_dataset("imagenet"), classes=2, counts={})
    options: dict[str, Any] = {"raw": raw, "prepared": tmp_path / "new"}
    written = prepare(row, **options)
    reused = prepare(row, **options)
    assert reused.reused and reused == written
    picture(5, 40, 40).save(raw / "train" / "n00000000" / "n00000000_2.JPEG")
    changed = prepare(row, **options)
    note = f"the raw files in {raw} are not those that were prepared: delete {written.folder}"
    assert changed.reused and changed.notes[: len(written.notes)] == written.notes
    assert changed.notes[-1].startswith(note)
    shutil.rmtree(written.folder)
    anew = prepare(row, **options)
    assert anew.counts["train"] == 3 and not any(note in line for line in anew.notes)
    shutil.copytree(raw, tmp_path / "copy")
    assert plan(row, raw=tmp_path / "copy", prepared=tmp_path / "new").folder != anew.folder


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_prepared_files_are_reused_untouched(name: str, folders: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"raw": folders} if name == "folder" else {"synthetic": SMALL}
    first = prepare(name, prepared=tmp_path, **options)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(name, prepared=tmp_path, **options)
    assert not first.reused and second.reused and first == second
    assert list(tmp_path.iterdir()) == [first.folder]
    assert times == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_whatever_decides_the_content_decides_the_folder(folders: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(folders, raw)

    def folder(**options: Any) -> Path:
        return plan("folder", raw=raw, prepared=tmp_path, **options).folder

    found = {folder()}
    for storage in (Storage(side=300), Storage(side=400, quality=80), Storage(format="raw")):
        found.add(folder(storage=storage))
    found.add(folder(max_per_class=3))
    picture(1, 20, 20).save(raw / "train" / "cat" / "new.png")
    found.add(folder())
    picture(2, 21, 20).save(raw / "train" / "cat" / "new.png")
    found.add(folder())
    assert len(found) == 7
    (raw / "train" / "cat" / "new.png").unlink()
    assert folder() in found
    mnist = get_dataset("mnist")
    others = {
        plan(mnist, prepared=tmp_path, synthetic=(70, 30)).folder,
        plan(mnist, prepared=tmp_path, synthetic=(71, 30)).folder,
        plan(mnist, prepared=tmp_path).folder,
        plan(mnist, prepared=tmp_path, check_raw=False).folder,
        plan(replace(mnist, image_size=32), prepared=tmp_path).folder,
    }
    assert len(others) == 5


def test_a_plan_writes_nothing_and_tells_names_and_sizes(folders: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "new"
    for name, raw, tolerance in (("digits", None, 0.01), ("folder", folders, 1.0)):
        planned = plan(name, raw=raw, prepared=prepared)
        assert not planned.ready and not planned.folder.exists()
        manifest = prepare(name, raw=raw, prepared=prepared)
        sizes = {file.name: file.bytes for file in manifest.files.values()}
        assert planned.folder == manifest.folder
        assert planned.files == pytest.approx(sizes, rel=tolerance)
        ready = plan(name, raw=raw, prepared=prepared)
        assert ready.ready and ready.files == sizes


def test_progress_tells_the_stages_in_order_and_ends_each(folders: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare("folder", raw=folders, prepared=tmp_path, progress=lambda *event: told.append(event))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages[-4:] == ["write train", "verify train", "write test", "verify test"]
    for stage in stages[-4:]:
        done = [(done, total) for name, done, total in told if name == stage]
        assert done[-1][0] == done[-1][1] == (48 if "train" in stage else 12)
        assert done == sorted(done)


def test_images_that_may_be_large_travel_in_smaller_parts(folders: Path, tmp_path: Path) -> None:
    for storage, size in ((Storage(side=90), 32), (Storage(), 16), (AS_PIXELS, 16)):
        steps: list[int] = []

        def progress(stage: str, done: int, total: int, steps: list[int] = steps) -> None:
            if stage == "write train":
                steps.append(done)

        prepare("folder", raw=folders, prepared=tmp_path, storage=storage, progress=progress)
        assert steps[:2] == [0, size]


@pytest.mark.parametrize("work", [prepare, plan])
@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("digit", {}, "unknown data set 'digit': did you mean 'digits'?"),
        ("digits", {"synthetic": (5, 0)}, "each split needs at least 1"),
        ("digits", {"synthetic": (-1, 5)}, "each split needs at least 1"),
        ("folder", {"synthetic": (5, 5)}, "it has no classes of its own"),
        ("cifar10", {"storage": Storage()}, "have no effect on cifar10"),
        ("imagenet", {"storage": Storage(side=2)}, "data.side=2: at least 32 pixels"),
        ("imagenet", {"storage": Storage(quality=0)}, "data.quality=0: valid are 10 to 100"),
        ("imagenet", {"max_per_class": 0}, "data.max_per_class=0"),
        ("imagenet", {"raw": Path("/no/such/place")}, "/no/such/place does not exist"),
    ],
)
def test_wrong_settings_are_one_line_and_write_nothing(
    work: Callable[..., object],
    name: str,
    options: dict[str, object],
    line: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError) as caught:
        work(name, prepared=tmp_path / "new", **options)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"bad_share": 1.5}, {"bad_share": -0.1}, {"processes": 0}])
def test_shares_and_processes_out_of_range_are_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data\.(bad_share|processes)="):
        prepare("digits", prepared=tmp_path, **options)


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


def test_a_prepared_file_that_cannot_be_read_is_one_line(
    public_folder: Path, without_root: OrdinaryUser
) -> None:
    manifest = prepare("digits", prepared=public_folder, synthetic=SMALL)
    path = manifest.folder / "test.beton"
    path.chmod(0)
    message = f"^cannot prepare digits: {path}: Permission denied$"
    with without_root(), pytest.raises(DataError, match=message):
        prepare("digits", prepared=public_folder, synthetic=SMALL)


def test_an_image_that_cannot_be_read_is_a_bad_one(
    folders: Path, public_folder: Path, without_root: OrdinaryUser
) -> None:
    raw = public_folder / "raw"
    shutil.copytree(folders, raw)
    raw.chmod(0o777)
    locked = raw / "train" / "dog" / "003.jpg"
    locked.chmod(0)
    with without_root():
        manifest = prepare("folder", raw=raw, prepared=public_folder / "new")
    (bad,) = manifest.quarantine
    assert bad == ("train", str(locked), "cannot be read: Permission denied")


def test_an_error_of_the_system_names_its_own_file_or_the_place(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=f"^cannot read: {tmp_path}/none: No such file"),
        one_line_for_os_errors("cannot read", tmp_path),
    ):
        (tmp_path / "none").read_bytes()
    with (
        pytest.raises(DataError, match=f"^cannot read: {tmp_path}: not seekable$"),
        one_line_for_os_errors("cannot read", tmp_path),
    ):
        raise OSError("not seekable")


@pytest.mark.skipif("TERNFORGE_DATA" not in os.environ, reason="needs the folder of raw data")
def test_real_photographs_come_back_as_torchvision_shows_them(tmp_path: Path) -> None:
    archive = Path(os.environ["TERNFORGE_DATA"]) / "imagenet-sample/imagenette-224-subset.tar"
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (raw,) = (path for path in tmp_path.iterdir() if path.is_dir())
    storage = Storage(passthrough=False)
    manifest = prepare("folder", raw=raw, prepared=tmp_path / "new", storage=storage, processes=1)
    images, labels = read_back(manifest, "test")
    expected = ImageFolder(str(raw / "val"))
    assert labels == expected.targets and manifest.quarantine == ()
    for image, (shown, _) in zip(images, expected, strict=True):
        error = np.mean((image.astype(float) - np.asarray(shown)) ** 2)
        assert 10 * np.log10(255**2 / error) > 24
