from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data_prep import (
    Augmentation,
    CentralCrop,
    DataError,
    Dataset,
    Loader,
    Manifest,
    Reading,
    Resolution,
    get_dataset,
    make_loader,
    prepare,
)
from data_prep.augment import Geometry, Indices
from data_prep.beton import JPG, RAW, BetonWriter
from data_prep.datasets import NORMALIZATIONS, Normalization
from data_prep.manifest import PreparedFile
from data_prep.reading.ffcv_reader import FFCVReader
from data_prep.reading.readers import Look
from data_prep.sources import ArraySplit, generate, open_raw, raw_place

BACKENDS = ["ffcv", "torch"]
VIEW = Augmentation(shift=2, flip=True)
WINDOW = Augmentation(shift=3, padding="edge", flip=True, crop_area=(0.2, 1.0))


def training_loader(manifest: Manifest, **options: Any) -> Loader:
    settings: dict[str, Any] = {"batch_size": 96, "training": True, "view": VIEW, "seed": 4}
    return loader_of(manifest, "train", **(settings | options))


def loader_of(manifest: Manifest, split: str, **options: Any) -> Loader:
    keys = [key for key in ("backend", "threads", "cache") if key in options]
    reading = Reading(**{key: options.pop(key) for key in keys})
    return make_loader(manifest, split, reading=reading, **options)


Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches_of(loader: Loader, epoch: int = 0, start_step: int = 0) -> Batches:
    with loader.epoch(epoch, start_step) as batches:
        return list(batches)


def same(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True)
    )


def levels_apart(first: Batches, second: Batches) -> float:
    """Largest difference between batches of pixels in [0, 1], in levels of 256."""
    pairs = list(zip(first, second, strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in pairs)
    return max(255 * float((a[0] - b[0]).abs().max()) for a, b in pairs)


def test_both_backends_give_the_same_batches_bit_for_bit(digits: Manifest) -> None:
    for view in (VIEW, replace(VIEW, padding="edge")):
        for epoch in (0, 3):
            first, second = (
                batches_of(training_loader(digits, backend=backend, view=view), epoch)
                for backend in BACKENDS
            )
            assert same(first, second)
    first, second = (
        batches_of(loader_of(digits, "test", batch_size=100, training=False, backend=backend))
        for backend in BACKENDS
    )
    assert same(first, second)


@pytest.mark.parametrize("view", [WINDOW, CentralCrop(0.875), CentralCrop()])
@pytest.mark.parametrize("size", [16, 64])
def test_both_backends_cut_the_same_windows_of_photographs(
    photographs: Manifest, view: Any, size: int
) -> None:
    options: dict[str, Any] = {
        "batch_size": 16,
        "view": view,
        "normalize": "unit",
        "resolution": Resolution(size, size, (0, 0)),
    }
    first, second = (
        batches_of(training_loader(photographs, backend=backend, **options), 2)
        for backend in BACKENDS
    )
    assert first[0][0].shape == (16, 3, size, size)
    assert levels_apart(first, second) < 1.01


def test_shifts_and_mirrors_are_those_of_a_loop_over_pixels(digits: Manifest) -> None:
    plain = loader_of(digits, "train", batch_size=40, training=False, normalize="unit")
    with plain.epoch(0) as batches:
        source = next(batches)[0].numpy()[:, 0]
    indices, shapes = np.arange(40), np.full((40, 2), 32, dtype=np.int32)
    for padding in ("black", "edge"):
        view = Augmentation(shift=3, flip=True, padding=padding)
        moves = view.geometry(indices, shapes, seed=1, epoch=6).moves
        loader = training_loader(
            digits, batch_size=40, training=False, normalize="unit", view=view, seed=1
        )
        with loader.epoch(6) as batches:
            moved = next(batches)[0].numpy()[:, 0]
        for image, result, (down, right, mirrored) in zip(source, moved, moves, strict=True):
            for y in range(32):
                for x in range(32):
                    row, column = y + down, x + right
                    inside = 0 <= row < 32 and 0 <= column < 32
                    row, column = min(max(row, 0), 31), min(max(column, 0), 31)
                    pixel = image[row, 31 - column if mirrored else column]
                    assert result[y, x] == (pixel if inside or padding == "edge" else 0)


def test_photographs_are_what_pillow_and_opencv_make_of_the_files(photographs: Manifest) -> None:
    index = photographs.files["train"].open_index(photographs.folder)
    data = index.path.read_bytes()
    assert set(index.modes.tolist()) == {JPG}
    view = Augmentation(flip=True, crop_area=(0.2, 1.0))
    loader = training_loader(
        photographs,
        batch_size=8,
        training=False,
        view=view,
        normalize="unit",
        resolution=Resolution(48, 48, (0, 0)),
    )
    results = torch.cat([images for images, _ in batches_of(loader, 1)])
    shapes = np.stack([index.heights, index.widths], axis=1)
    windows, moves = view.geometry(np.arange(len(index)), shapes, seed=4, epoch=1)
    for sample, image in enumerate(results):
        stored = data[int(index.pointers[sample]) :][: int(index.sizes[sample])]
        path = photographs.folder / "sample.jpg"
        path.write_bytes(stored)
        top, left, height, width = windows[sample]
        pixels = np.asarray(Image.open(path))[top : top + height, left : left + width]
        path.unlink()
        expected = cv2.resize(pixels, (48, 48), interpolation=cv2.INTER_AREA)
        expected = expected[:, ::-1] if moves[sample, 2] else expected
        seen = 255 * image.permute(1, 2, 0).numpy()
        assert np.abs(seen - expected).max() < 1.01


def test_evaluation_batches_are_what_torchvision_makes_of_the_source(
    digits: Manifest, tmp_path: Path
) -> None:
    row = get_dataset("digits")
    raw = open_raw(row, raw_place(row, None, None), tmp_path, tell=lambda *_: None)
    source = raw.splits["test"]
    assert isinstance(source, ArraySplit)
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(digits.mean), list(digits.std)),
        ]
    )
    expected = torch.stack([transform(image) for image in source.images])
    batches = batches_of(loader_of(digits, "test", batch_size=64, training=False))
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert images.dtype == torch.float32 and images.is_contiguous()
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert labels.dtype == torch.int64 and labels.tolist() == source.labels.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_color_images_are_normalized_per_channel(backend: str, tmp_path: Path) -> None:
    own = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    row: Dataset = replace(get_dataset("digits"), channels=3, normalization=own)
    manifest = prepare(row, prepared=tmp_path, synthetic=(40, 20))
    source = generate(row, (40, 20))["test"].images.transpose(0, 3, 1, 2) / 255.0
    for name, (mean, std) in {"dataset": own, "imagenet": NORMALIZATIONS["imagenet"]}.items():
        expected = (source - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        loader = loader_of(
            manifest, "test", batch_size=20, training=False, backend=backend, normalize=name
        )
        ((images, _),) = batches_of(loader)
        torch.testing.assert_close(images, torch.from_numpy(expected).float(), rtol=0, atol=1e-6)
    assert images.shape == (20, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_of_training_is_full_batches_of_different_images(digits: Manifest) -> None:
    source: dict[bytes, int] = {}
    plain = loader_of(digits, "train", batch_size=1437, training=False)
    for image in batches_of(plain)[0][0]:
        source[image.numpy().tobytes()] = source.get(image.numpy().tobytes(), 0) + 1
    loader = training_loader(digits, view=None)
    batches = batches_of(loader, epoch=2)
    assert loader.steps_per_epoch == len(batches) == 1437 // 96
    for images, labels in batches:
        assert len(images) == len(labels) == 96
        for image in images:
            source[image.numpy().tobytes()] -= 1
    assert min(source.values()) >= 0
    assert sum(source.values()) == 1437 % 96
    assert not same(batches, batches_of(loader, epoch=3))
    assert same(batches, batches_of(training_loader(digits, view=None), epoch=2))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_number_of_ranks_has_the_same_global_batches(
    digits: Manifest, world_size: int
) -> None:
    whole = batches_of(training_loader(digits), epoch=1)
    ranks = [
        batches_of(training_loader(digits, rank=rank, world_size=world_size), epoch=1)
        for rank in range(world_size)
    ]
    joined = [
        (torch.cat([images for images, _ in step]), torch.cat([labels for _, labels in step]))
        for step in zip(*ranks, strict=True)
    ]
    assert same(whole, joined)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_has_each_image_exactly_once_over_all_ranks(
    digits: Manifest, world_size: int
) -> None:
    def loader(rank: int, size: int, batch_size: int) -> Loader:
        return loader_of(
            digits, "test", batch_size=batch_size, training=False, rank=rank, world_size=size
        )

    ((whole, labels),) = batches_of(loader(0, 1, 360))
    parts = []
    for rank in range(world_size):
        share = loader(rank, world_size, 21 * world_size)
        batches = batches_of(share)
        assert len(batches) == share.steps_per_epoch
        parts += batches
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert torch.equal(torch.cat([targets for _, targets in parts]), labels)


def test_a_rank_without_images_has_no_steps(tmp_path: Path) -> None:
    manifest = prepare("digits", prepared=tmp_path, synthetic=(40, 2))
    for backend in BACKENDS:
        counts = []
        for rank in range(3):
            loader = loader_of(
                manifest,
                "test",
                batch_size=3,
                training=False,
                rank=rank,
                world_size=3,
                backend=backend,
            )
            counts.append(sum(len(labels) for _, labels in batches_of(loader)))
            assert loader.steps_per_epoch == counts[-1]
        assert sum(counts) == 2


def test_an_epoch_resumes_at_each_step(digits: Manifest) -> None:
    loader = training_loader(digits, rank=1, world_size=2)
    whole = batches_of(loader, epoch=5)
    for step in range(len(whole) + 1):
        assert same(batches_of(loader, 5, start_step=step), whole[step:])


def test_a_batch_stays_as_it_was_while_later_ones_are_read(digits: Manifest) -> None:
    for view in (None, VIEW):
        with training_loader(digits, view=view).epoch(0) as batches:
            images, labels = next(batches)
            before = images.clone(), labels.clone()
            for _ in batches:
                pass
        assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


def test_torch_keeps_its_thread_count(digits: Manifest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches_of(training_loader(digits))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_one_line(digits: Manifest, rank: int, world_size: int) -> None:
    with pytest.raises(DataError, match=f"rank {rank} of {world_size}: ranks go from 0 to"):
        training_loader(digits, rank=rank, world_size=world_size)


def test_order_and_augmentation_depend_on_the_seed_of_the_loader(digits: Manifest) -> None:
    def labels(seed: int) -> torch.Tensor:
        plain = training_loader(digits, seed=seed, view=None)
        return torch.cat([labels for _, labels in batches_of(plain)])

    assert torch.equal(labels(4), labels(4)) and not torch.equal(labels(4), labels(5))
    in_order = {"training": False, "batch_size": 64}
    first, again, other = (
        batches_of(training_loader(digits, seed=seed, **in_order)) for seed in (4, 4, 5)
    )
    assert same(first, again) and not same(first, other)


def test_an_unreadable_file_is_one_line(
    public_folder: Path, without_root: Callable[[], AbstractContextManager[None]]
) -> None:
    manifest = prepare("digits", prepared=public_folder, synthetic=(40, 20))
    path = manifest.folder / manifest.files["train"].name
    path.chmod(0)
    message = f"cannot read the train split: {path}: Permission denied"
    for backend in BACKENDS:
        with without_root(), pytest.raises(DataError, match=message):
            training_loader(manifest, batch_size=10, backend=backend)


def test_a_batch_larger_than_the_split_is_one_line(digits: Manifest) -> None:
    with pytest.raises(DataError, match="a batch of 2000 images is more than the 1437"):
        training_loader(digits, batch_size=2000)


def test_an_unknown_split_is_one_line(digits: Manifest) -> None:
    with pytest.raises(DataError, match="unknown split 'val': valid are train, test"):
        loader_of(digits, "val", batch_size=10, training=False)


def test_an_unknown_backend_or_normalization_is_one_line(digits: Manifest) -> None:
    with pytest.raises(DataError, match="unknown data backend 'dali': valid are ffcv, torch"):
        training_loader(digits, backend="dali")
    with pytest.raises(DataError, match="unknown normalization 'x': valid are dataset, unit"):
        training_loader(digits, normalize="x")
    with pytest.raises(DataError, match="'imagenet' is of 3 channels and the images have 1"):
        training_loader(digits, normalize="imagenet")


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_cache_change_no_batch(photographs: Manifest, backend: str) -> None:
    options: dict[str, Any] = {"batch_size": 16, "view": WINDOW, "backend": backend}
    alone = batches_of(training_loader(photographs, threads=1, cache="page", **options), 1)
    for threads, cache in ((1, "process"), (3, "page"), (16, "process")):
        loader = training_loader(photographs, threads=threads, cache=cache, **options)
        assert same(alone, batches_of(loader, 1))


def test_every_number_of_ranks_sees_the_same_photographs(photographs: Manifest) -> None:
    whole = batches_of(training_loader(photographs, batch_size=16, view=WINDOW), 3)
    for world_size in (2, 4):
        ranks = [
            batches_of(
                training_loader(
                    photographs, batch_size=16, view=WINDOW, rank=rank, world_size=world_size
                ),
                3,
            )
            for rank in range(world_size)
        ]
        joined = [
            (torch.cat([images for images, _ in step]), torch.cat([labels for _, labels in step]))
            for step in zip(*ranks, strict=True)
        ]
        assert same(whole, joined)


def test_photographs_resume_at_each_step(photographs: Manifest) -> None:
    loader = training_loader(photographs, batch_size=8, view=WINDOW)
    whole = batches_of(loader, 5)
    for step in range(len(whole) + 1):
        assert same(batches_of(loader, 5, start_step=step), whole[step:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_grow_with_the_epochs(photographs: Manifest, backend: str) -> None:
    growth = Resolution(16, 64, (0, 2))
    loader = training_loader(photographs, batch_size=16, resolution=growth, backend=backend)
    sizes = [batches_of(loader, epoch)[0][0].shape[-1] for epoch in range(4)]
    assert sizes == [16, 32, 64, 64]


def write_mixed(path: Path, images: list[np.ndarray]) -> None:
    """A file in which every second image is a JPEG."""
    with BetonWriter(path, len(images)) as writer:
        for number, image in enumerate(images):
            data, mode = np.ascontiguousarray(image).reshape(-1), RAW
            if number % 2:
                data, mode = cv2.imencode(".jpg", image[:, :, ::-1])[1].reshape(-1), JPG
            height, width = image.shape[:2]
            writer.append(number % 2, data, height, width, mode)


@pytest.fixture
def mixed(photographs: Manifest, tmp_path: Path) -> Manifest:
    random = np.random.RandomState(0)
    smooth = [
        cv2.resize(random.randint(0, 256, (4, 4, 3)).astype(np.uint8), (30 + n, 50 - n))
        for n in range(12)
    ]
    files = {}
    for split in ("train", "test"):
        write_mixed(tmp_path / f"{split}.beton", smooth)
        files[split] = PreparedFile.measure(tmp_path / f"{split}.beton")
    return replace(photographs, folder=tmp_path, files=files)


def test_raw_and_jpeg_images_may_be_in_one_file(mixed: Manifest) -> None:
    options: dict[str, Any] = {"batch_size": 5, "view": WINDOW, "normalize": "unit"}
    options["resolution"] = Resolution(24, 24, (0, 0))
    first, second = (
        batches_of(training_loader(mixed, backend=backend, **options)) for backend in BACKENDS
    )
    assert levels_apart(first, second) < 1.01


def damage(manifest: Manifest, sample: int, place: int = 100) -> Path:
    """Change one bit of a stored image behind the manifest's back."""
    index = manifest.files["train"].open_index(manifest.folder)
    with index.path.open("r+b") as file:
        file.seek(int(index.pointers[sample]) + place)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    return index.path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sample", [4, 7])
def test_one_changed_bit_is_an_error_that_names_the_sample(
    mixed: Manifest, sample: int, backend: str
) -> None:
    path = damage(mixed, sample)
    loader = training_loader(mixed, batch_size=3, training=False, backend=backend)
    step = sample // 3
    message = rf"epoch 1, step {step}: {path}: sample {sample} is damaged: its checksum is wrong"
    seen = 0
    with pytest.raises(DataError, match=message), loader.epoch(0) as batches:
        for _ in batches:
            seen += 1
    assert seen == step


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_that_are_no_image_are_an_error_that_names_the_sample(
    mixed: Manifest, tmp_path: Path, backend: str
) -> None:
    path = tmp_path / "train.beton"
    with BetonWriter(path, 3) as writer:
        for number in range(3):
            writer.append(0, np.full(500, number, dtype=np.uint8), 20, 30, JPG)
    broken = replace(mixed, files={"train": PreparedFile.measure(path)})
    loader = training_loader(broken, batch_size=1, training=False, backend=backend)
    with pytest.raises(DataError, match=r"epoch 1, step 0: .*: sample 0 is no image"):
        batches_of(loader)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_is_cut_while_it_is_read_is_an_error_that_names_the_sample(
    mixed: Manifest, backend: str
) -> None:
    loader = training_loader(mixed, batch_size=2, training=False, backend=backend)
    index = mixed.files["train"].open_index(mixed.folder)
    os.truncate(index.path, int(index.pointers[5]) + 10)
    with pytest.raises(DataError, match=r"epoch 2, step 2: .*: sample 5 cannot be read"):
        batches_of(loader, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_batches_of_the_cpu(digits: Manifest) -> None:
    on_gpu = batches_of(training_loader(digits, device="cuda"), epoch=1)
    assert all(images.is_cuda and labels.is_cuda for images, labels in on_gpu)
    on_cpu = batches_of(training_loader(digits), epoch=1)
    for (gpu, gpu_labels), (cpu, cpu_labels) in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-6)
        assert torch.equal(gpu_labels.cpu(), cpu_labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpu_that_computes_is_not_waited_for(photographs: Manifest, backend: str) -> None:
    """Batches come while the GPU is busy, and what is computed with them is right nevertheless."""
    options: dict[str, Any] = {"batch_size": 8, "view": WINDOW, "backend": backend}
    loader = training_loader(photographs, device="cuda", **options)
    expected = [float(images.double().sum()) for images, _ in batches_of(loader)]
    sums = []
    torch.cuda.synchronize()
    with loader.epoch(0) as batches:
        for images, _ in batches:
            torch.cuda._sleep(400_000_000)  # cycles: a fifth of a second
            sums.append(images.double().sum())
        queued = torch.cuda.current_stream().record_event()
        assert not queued.query(), "the loader waited for the computation"
    assert [float(value) for value in sums] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_for_a_gpu_are_decoded_into_page_locked_memory(photographs: Manifest) -> None:
    index = photographs.files["train"].open_index(photographs.folder)

    def geometry(indices: Indices, shapes: np.ndarray) -> Geometry:
        return CentralCrop().geometry(indices, shapes, 0, 0)

    look = Look(geometry, edge=False, size=32, mean=None, std=None)
    with closing(FFCVReader(index, 8, 1, "page").read(np.arange(16), look)) as batches:
        assert all(torch.from_numpy(images).is_pinned() for images in batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_epoch_on_a_gpu_may_be_left_early(digits: Manifest) -> None:
    loader = training_loader(digits, device="cuda")
    whole = batches_of(loader)
    with loader.epoch(0) as batches:
        images, labels = next(batches)
    assert torch.equal(images, whole[0][0]) and torch.equal(labels, whole[0][1])
    assert same(batches_of(loader, start_step=3), whole[3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"view": CentralCrop(0.875)},
        {"view": Augmentation(crop_area=(0.3, 0.9))},
        {"resolution": Resolution(64, 64, (0, 0))},
        {"resolution": Resolution(16, 16, (0, 0))},
    ],
)
def test_gray_images_are_never_resized(digits: Manifest, backend: str, options: dict) -> None:
    settings: dict[str, Any] = {"batch_size": 32, "view": None, "backend": backend}
    with pytest.raises(DataError, match=r"the gray images of .* are not resized"):
        batches_of(training_loader(digits, **(settings | options)))


class Outside(Augmentation):
    """A view with a mistake: its windows begin above the images."""

    def geometry(self, indices: Any, shapes: Any, seed: int, epoch: int) -> Any:
        geometry = super().geometry(indices, shapes, seed, epoch)
        geometry.windows[3, 0] -= 1
        return geometry


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_outside_of_its_image_is_an_error(photographs: Manifest, backend: str) -> None:
    loader = training_loader(
        photographs, batch_size=8, training=False, view=Outside(), backend=backend
    )
    with pytest.raises(DataError, match=r"sample 3: the window \[-1, 0, \d+, \d+\] is not within"):
        batches_of(loader)


@pytest.mark.parametrize("padding", ["black", "edge"])
@pytest.mark.parametrize("shift", [31, 32, 33, 60])
def test_shifts_beyond_the_image_are_the_same_with_both_backends(
    digits: Manifest, shift: int, padding: Any
) -> None:
    view = Augmentation(shift=shift, flip=True, padding=padding)
    first, second = (
        batches_of(training_loader(digits, view=view, backend=backend)) for backend in BACKENDS
    )
    assert same(first, second)


def test_two_epochs_at_a_time_do_not_disturb_each_other(photographs: Manifest) -> None:
    growth = Resolution(32, 64, (0, 1))
    loader = training_loader(photographs, batch_size=8, view=WINDOW, resolution=growth)
    alone = [batches_of(loader, epoch) for epoch in (0, 1)]
    with loader.epoch(0) as first, loader.epoch(1) as second:
        together = list(zip(first, second, strict=True))
    for side, batches in enumerate(alone):
        assert same(batches, [pair[side] for pair in together])


@pytest.mark.parametrize("step", [-1, 99])
def test_a_step_that_no_epoch_has_is_one_line(digits: Manifest, step: int) -> None:
    with pytest.raises(DataError, match=f"start_step={step}: an epoch has 14 steps"):
        batches_of(training_loader(digits), start_step=step)


def test_a_device_that_nobody_copies_to_is_refused(digits: Manifest) -> None:
    with pytest.raises(DataError, match="no batches for a device of type 'meta'"):
        training_loader(digits, device="meta")
