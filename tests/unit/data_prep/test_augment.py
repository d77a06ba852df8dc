from __future__ import annotations

import numpy as np
import pytest

from data_prep.augment import Augmentation, Draw, _mix, epoch_order, random_bits

RANDOM = np.random.RandomState(0)


def test_the_hash_gives_the_published_outputs_of_splitmix64() -> None:
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + golden * step) % 2**64 for step in (1, 2, 3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _mix(np.array(states, dtype=np.uint64)).tolist() == expected


@pytest.mark.parametrize("count", [1, 7, 1437])
def test_the_order_of_an_epoch_is_a_permutation_that_seed_and_epoch_choose(count: int) -> None:
    order = epoch_order(count, seed=3, epoch=5)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(count, seed=3, epoch=5))
    if count > 100:
        for other in (epoch_order(count, 3, 6), epoch_order(count, 4, 5), epoch_order(count, 5, 3)):
            assert np.mean(order == other) < 0.02


def test_each_place_of_the_order_gets_each_sample_equally_often() -> None:
    orders = np.stack([epoch_order(10, seed=0, epoch=epoch) for epoch in range(5000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=10) for place in range(10)])
    # Chi-square with 9 degrees of freedom passes 27.9 once in 1,000.
    assert ((counts - 500) ** 2 / 500).sum(axis=1).max() < 35


def test_streams_are_not_correlated() -> None:
    indices = np.arange(10_000)
    streams = [
        random_bits(draw, seed, epoch, indices) / 2.0**64
        for draw, seed, epoch in [
            (Draw.ORDER, 0, 0),
            (Draw.FLIP, 0, 0),
            (Draw.FLIP, 0, 1),
            (Draw.FLIP, 1, 0),
            (Draw.SHIFT, 1, 0),
        ]
    ]
    correlation = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(correlation).max() < 0.04  # four standard deviations
    assert all(abs(stream.mean() - 0.5) < 0.012 for stream in streams)


@pytest.mark.parametrize("channels", [1, 3])
def test_shift_is_one_of_all_crops_of_the_padded_image_each_equally_often(channels: int) -> None:
    images = RANDOM.randint(1, 256, (5000, 6, 7, channels)).astype(np.uint8)
    shifted = Augmentation(shift=2).apply(images, np.arange(5000), seed=1, epoch=2)
    assert shifted.shape == images.shape and shifted.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = np.zeros((5, 5), dtype=int)
    for top in range(5):
        for left in range(5):
            crop = padded[:, top : top + 6, left : left + 7]
            places[top, left] = (crop == shifted).all(axis=(1, 2, 3)).sum()
    assert places.sum() == 5000
    # Chi-square with 24 degrees of freedom passes 51.2 once in 1,000.
    assert ((places - 200) ** 2 / 200).sum() < 51


def test_flip_mirrors_half_of_the_images_and_keeps_the_input() -> None:
    images = RANDOM.randint(0, 256, (2000, 4, 5, 1)).astype(np.uint8)
    before = images.copy()
    flipped = Augmentation(flip=True).apply(images, np.arange(2000), seed=0, epoch=0)
    mirrored = (flipped == before[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (flipped == before).all(axis=(1, 2, 3))).all()
    assert 900 < mirrored.sum() < 1100
    assert np.array_equal(images, before)


def test_an_image_is_augmented_the_same_in_any_batch_and_differently_in_another_epoch() -> None:
    images = RANDOM.randint(0, 256, (64, 8, 8, 1)).astype(np.uint8)
    indices = RANDOM.permutation(1000)[:64]
    augmentation = Augmentation(shift=2, flip=True)
    together = augmentation.apply(images, indices, seed=7, epoch=3)
    for place in (0, 13, 63):
        alone = augmentation.apply(images[[place]], indices[[place]], seed=7, epoch=3)
        assert np.array_equal(alone[0], together[place])
    other = augmentation.apply(images, indices, seed=7, epoch=4)
    assert (other == together).all(axis=(1, 2, 3)).mean() < 0.2


def test_augmentation_depends_on_the_seed() -> None:
    images = RANDOM.randint(0, 256, (64, 8, 8, 1)).astype(np.uint8)
    for augmentation in (Augmentation(shift=2), Augmentation(flip=True)):
        one, other = (augmentation.apply(images, np.arange(64), seed, epoch=3) for seed in (7, 8))
        assert (one == other).all(axis=(1, 2, 3)).mean() < 0.8


@pytest.mark.parametrize(("seed", "same"), [(-1, 2**64 - 1), (2**64 + 5, 5), (2**100 + 5, 5)])
def test_any_whole_number_is_a_seed(seed: int, same: int) -> None:
    assert np.array_equal(epoch_order(100, seed, epoch=0), epoch_order(100, same, epoch=0))


def test_no_augmentation_changes_nothing() -> None:
    images = RANDOM.randint(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    assert Augmentation().apply(images, np.arange(3), seed=0, epoch=0) is images


def test_a_negative_shift_is_refused() -> None:
    with pytest.raises(ValueError, match="shift must be 0 or more pixels, not -1"):
        Augmentation(shift=-1)
