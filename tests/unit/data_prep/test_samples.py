from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_prep import (
    Augmentation,
    CentralCrop,
    DataError,
    Loader,
    Manifest,
    Reading,
    Resolution,
    make_loader,
)
from data_prep.augment import epoch_order
from data_prep.reading.samples import held_out_samples, rank_share

VIEW = Augmentation(shift=2, flip=True)
WINDOW = Augmentation(flip=True, crop_area=(0.2, 1.0))
SEED, EPOCH = 4, 2

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def loader_of(manifest: Manifest, split: str = "train", **options: Any) -> Loader:
    reading = Reading(options.pop("backend", "torch"))
    settings: dict[str, Any] = {"batch_size": 50, "training": True, "view": VIEW, "seed": SEED}
    settings["resolution"] = Resolution.constant(32)
    return make_loader(manifest, split, reading=reading, **(settings | options))


def batches_of(loader: Loader, epoch: int = EPOCH, start_step: int = 0) -> Batches:
    with loader.epoch(epoch, start_step) as batches:
        return list(batches)


def in_file_order(manifest: Manifest, view: Any, **options: Any) -> tuple[Any, Any]:
    """All training images as they are seen in this epoch, and their labels."""
    ((images, labels),) = batches_of(
        loader_of(manifest, view=view, training=False, batch_size=1437, **options)
    )
    return images, labels


@pytest.mark.parametrize("world_size", range(1, 8))
def test_ranks_share_every_batch_as_numpy_splits_it(digits: Manifest, world_size: int) -> None:
    images, labels = in_file_order(digits, VIEW)
    order = epoch_order(1437, SEED, EPOCH)
    batches = np.split(order[:1400], 28)
    shares = [np.array_split(batch, world_size) for batch in batches]
    for rank in range(world_size):
        loader = loader_of(digits, rank=rank, world_size=world_size)
        seen = batches_of(loader)
        assert loader.steps_per_epoch == len(seen) == 28
        for step, (pixels, targets) in enumerate(seen):
            expected = shares[step][rank]
            assert loader.images_per_step == len(expected) == len(targets)
            assert torch.equal(pixels, images[expected])
            assert torch.equal(targets, labels[expected])


def test_uneven_shares_are_the_same_with_both_backends_and_after_a_resume(
    photographs: Manifest,
) -> None:
    for rank in range(3):
        place: dict[str, Any] = {"batch_size": 10, "rank": rank, "world_size": 3, "view": WINDOW}
        ours = loader_of(photographs, backend="ffcv", **place)
        whole = batches_of(ours)
        assert [len(labels) for _, labels in whole] == [4 if rank == 0 else 3] * 4
        theirs = batches_of(loader_of(photographs, **place))
        assert [a[1].tolist() for a in whole] == [b[1].tolist() for b in theirs]
        for step in range(5):
            rest = batches_of(ours, start_step=step)
            assert len(rest) == 4 - step
            for (first, _), (second, _) in zip(rest, whole[step:], strict=True):
                assert torch.equal(first, second)


@pytest.mark.parametrize("count", [0, 1, 5, 7, 360])
def test_the_shares_of_all_ranks_are_everything_once(count: int) -> None:
    for world_size in range(1, 8):
        shares = [rank_share(count, rank, world_size) for rank in range(world_size)]
        parts = [np.arange(count)[share] for share in shares]
        expected = np.array_split(np.arange(count), world_size)
        assert [part.tolist() for part in parts] == [part.tolist() for part in expected]


def test_a_batch_smaller_than_the_world_is_one_line(digits: Manifest) -> None:
    message = "a batch of 3 images cannot be shared by 4 ranks: take 4 or more"
    with pytest.raises(DataError, match=message):
        loader_of(digits, batch_size=3, world_size=4)


@pytest.mark.parametrize(("images", "count", "first"), [(60_000, 10_000, 50_000), (50, 5, 45)])
def test_the_last_images_are_held_out_as_in_the_papers(images: int, count: int, first: int) -> None:
    labels = np.arange(images) % 10
    assert held_out_samples(labels, count).tolist() == list(range(first, images))


@pytest.mark.parametrize("count", [10, 37, 250, 1000])
def test_each_class_of_a_sorted_file_gives_its_share(count: int) -> None:
    of_class = [300, 1, 200, 40, 459]
    labels = np.repeat(np.arange(5), of_class)
    chosen = held_out_samples(labels, count)
    assert len(set(chosen.tolist())) == count and (np.diff(chosen) > 0).all()
    found = np.bincount(labels[chosen], minlength=5)
    exact = np.array(of_class) * count / 1000
    assert (np.abs(found - exact) <= 1).all()


@pytest.mark.parametrize("manifest_name", ["digits", "photographs"])
def test_training_and_validation_share_the_training_images(
    manifest_name: str, request: pytest.FixtureRequest
) -> None:
    manifest = request.getfixturevalue(manifest_name)
    count, held_out = manifest.counts["train"], manifest.counts["train"] // 5
    labels = manifest.files["train"].open_index(manifest.folder).labels
    chosen = held_out_samples(labels, held_out)
    rest = np.setdiff1d(np.arange(count), chosen)

    plain, _ = in_file_order(manifest, CentralCrop())
    validation = {"training": False, "view": CentralCrop(), "held_out": held_out}
    for world_size in (1, 3):
        parts = []
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "batch_size": 21}
            parts += batches_of(loader_of(manifest, "validation", **validation, **place), epoch=0)
        assert torch.equal(torch.cat([images for images, _ in parts]), plain[chosen])
        assert torch.cat([targets for _, targets in parts]).tolist() == labels[chosen].tolist()

    # An image is augmented as it is without the others being held out.
    augmented, _ = in_file_order(manifest, VIEW)
    training = loader_of(manifest, held_out=held_out, batch_size=len(rest) // 3)
    order = rest[epoch_order(len(rest), SEED, EPOCH)]
    seen = batches_of(training)
    assert training.steps_per_epoch == len(seen) == 3
    images = torch.cat([images for images, _ in seen])
    assert torch.equal(images, augmented[order[: len(images)]])


def test_nothing_is_held_out_of_the_test_split(digits: Manifest) -> None:
    loader = loader_of(digits, "test", training=False, held_out=500)
    assert sum(len(labels) for _, labels in batches_of(loader)) == 360


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("train", {"held_out": 1437}, "held_out=1437: digits has 1437 training images, of which"),
        ("train", {"held_out": -1}, "held_out=-1: digits has 1437 training images"),
        ("train", {"held_out": 1400}, "a batch of 50 images is more than the 37 of the train"),
        ("validation", {}, "no training images of digits are held out to validate with"),
        ("val", {}, "unknown split 'val': valid are train, test, validation"),
    ],
)
def test_a_split_without_images_is_one_line(
    digits: Manifest, split: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        loader_of(digits, split, **options)
