from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data_prep import (
    Augmentation,
    DataError,
    Dataset,
    Loader,
    Manifest,
    get_dataset,
    make_loader,
    prepare,
)
from data_prep.sources import generate, read

AUGMENTATION = Augmentation(shift=2, flip=True)


def training_loader(manifest: Manifest, **options: Any) -> Loader:
    settings: dict[str, Any] = {
        "batch_size": 96,
        "training": True,
        "augmentation": AUGMENTATION,
        "seed": 4,
    }
    return make_loader(manifest, "train", **(settings | options))


Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches_of(loader: Loader, epoch: int = 0, start_step: int = 0) -> Batches:
    with loader.epoch(epoch, start_step) as batches:
        return list(batches)


def same(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True)
    )


def test_both_backends_give_the_same_batches_bit_for_bit(
    digits_of_both: tuple[Manifest, Manifest],
) -> None:
    beton, arrays = digits_of_both
    for epoch in (0, 3):
        assert same(
            batches_of(training_loader(beton), epoch), batches_of(training_loader(arrays), epoch)
        )
    evaluation: dict[str, Any] = {"batch_size": 100, "training": False}
    assert same(
        batches_of(make_loader(beton, "test", **evaluation)),
        batches_of(make_loader(arrays, "test", **evaluation)),
    )


def test_evaluation_batches_are_what_torchvision_makes_of_the_source(
    digits: Manifest, tmp_path: Path
) -> None:
    source = read(get_dataset("digits"), None, tmp_path)["test"]
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(digits.mean), list(digits.std)),
        ]
    )
    expected = torch.stack([transform(image) for image in source.images])
    batches = batches_of(make_loader(digits, "test", batch_size=64, training=False))
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert images.dtype == torch.float32 and images.is_contiguous()
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert labels.dtype == torch.int64 and labels.tolist() == source.labels.tolist()


@pytest.mark.parametrize("backend", ["ffcv", "torch"])
def test_color_images_are_normalized_per_channel(backend: str, tmp_path: Path) -> None:
    row: Dataset = replace(
        get_dataset("digits"), channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
    )
    manifest = prepare(row, prepared=tmp_path, backend=backend, synthetic=(40, 20))
    expected = generate(row, (40, 20))["test"].images.transpose(0, 3, 1, 2) / 255.0
    expected = (expected - np.reshape(row.mean, (3, 1, 1))) / np.reshape(row.std, (3, 1, 1))
    ((images, _),) = batches_of(make_loader(manifest, "test", batch_size=20, training=False))
    assert images.shape == (20, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(images, torch.from_numpy(expected).float(), atol=1e-6)


def test_an_epoch_of_training_is_full_batches_of_different_images(digits: Manifest) -> None:
    source: dict[bytes, int] = {}
    plain = make_loader(digits, "train", batch_size=1437, training=False)
    for image in batches_of(plain)[0][0]:
        source[image.numpy().tobytes()] = source.get(image.numpy().tobytes(), 0) + 1
    loader = training_loader(digits, augmentation=None)
    batches = batches_of(loader, epoch=2)
    assert loader.steps_per_epoch == len(batches) == 1437 // 96
    for images, labels in batches:
        assert len(images) == len(labels) == 96
        for image in images:
            source[image.numpy().tobytes()] -= 1
    assert min(source.values()) >= 0
    assert sum(source.values()) == 1437 % 96
    assert not same(batches, batches_of(loader, epoch=3))
    assert same(batches, batches_of(training_loader(digits, augmentation=None), epoch=2))


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
        return make_loader(
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
    for backend in ("ffcv", "torch"):
        manifest = prepare("digits", prepared=tmp_path, backend=backend, synthetic=(40, 2))
        counts = []
        for rank in range(3):
            loader = make_loader(
                manifest, "test", batch_size=3, training=False, rank=rank, world_size=3
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
    for augmentation in (None, AUGMENTATION):
        with training_loader(digits, augmentation=augmentation).epoch(0) as batches:
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


def test_a_batch_that_cannot_be_shared_is_one_line(digits: Manifest) -> None:
    with pytest.raises(DataError, match="a batch of 10 images cannot be shared by 4 ranks"):
        training_loader(digits, batch_size=10, world_size=4)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_one_line(digits: Manifest, rank: int, world_size: int) -> None:
    with pytest.raises(DataError, match=f"rank {rank} of {world_size}: ranks go from 0 to"):
        training_loader(digits, rank=rank, world_size=world_size)


def test_order_and_augmentation_depend_on_the_seed_of_the_loader(digits: Manifest) -> None:
    def labels(seed: int) -> torch.Tensor:
        plain = training_loader(digits, seed=seed, augmentation=None)
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
    for backend in ("ffcv", "torch"):
        manifest = prepare("digits", prepared=public_folder, backend=backend, synthetic=(40, 20))
        path = manifest.folder / manifest.files["train"][0].name
        path.chmod(0)
        message = f"cannot read the train split: {path}: Permission denied"
        with without_root(), pytest.raises(DataError, match=message):
            training_loader(manifest, batch_size=10)


def test_a_batch_larger_than_the_split_is_one_line(digits: Manifest) -> None:
    with pytest.raises(DataError, match="a batch of 2000 images is more than the 1437"):
        training_loader(digits, batch_size=2000)


def test_an_unknown_split_is_one_line(digits: Manifest) -> None:
    with pytest.raises(DataError, match="unknown split 'val': valid are train, test"):
        make_loader(digits, "val", batch_size=10, training=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_batches_of_the_cpu(digits: Manifest) -> None:
    on_gpu = batches_of(training_loader(digits, device="cuda"), epoch=1)
    assert all(images.is_cuda and labels.is_cuda for images, labels in on_gpu)
    on_cpu = batches_of(training_loader(digits), epoch=1)
    for (gpu, gpu_labels), (cpu, cpu_labels) in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-6)
        assert torch.equal(gpu_labels.cpu(), cpu_labels)
