from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from data_prep.augment import (
    Augmentation,
    CentralCrop,
    Draw,
    Geometry,
    Resolution,
    _mix,
    epoch_order,
    random_bits,
)


def shapes(count: int, height: int = 6, width: int = 7) -> np.ndarray:
    return np.tile(np.array([height, width], dtype=np.int32), (count, 1))


def same(first: Geometry, second: Geometry) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


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
            (Draw.WINDOW_PLACE, 0, 0),
            (Draw.WINDOW_SHAPE, 0, 0),
            (Draw.WINDOW_SHAPE + 1, 0, 0),
        ]
    ]
    correlation = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(correlation).max() < 0.04  # four standard deviations
    assert all(abs(stream.mean() - 0.5) < 0.012 for stream in streams)


def test_shifts_are_all_distances_each_equally_often() -> None:
    geometry = Augmentation(shift=2).geometry(np.arange(5000), shapes(5000), seed=1, epoch=2)
    places = np.zeros((5, 5), dtype=int)
    np.add.at(places, (geometry.moves[:, 0] + 2, geometry.moves[:, 1] + 2), 1)
    # Chi-square with 24 degrees of freedom passes 51.2 once in 1,000.
    assert ((places - 200) ** 2 / 200).sum() < 51
    assert geometry.windows.tolist() == [[0, 0, 6, 7]] * 5000


def test_half_of_the_images_are_mirrored() -> None:
    geometry = Augmentation(flip=True).geometry(np.arange(2000), shapes(2000), seed=0, epoch=0)
    assert set(geometry.moves[:, 2].tolist()) == {0, 1}
    assert 900 < geometry.moves[:, 2].sum() < 1100
    assert not geometry.moves[:, :2].any()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 333), (64, 64)])
def test_random_windows_are_distributed_as_those_of_torchvision(height: int, width: int) -> None:
    count, area, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
    view = Augmentation(crop_area=area, crop_ratio=ratio)
    ours = view.geometry(np.arange(count), shapes(count, height, width), 5, 3).windows
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(area), list(ratio)) for _ in range(count)]
    )
    for measure in (
        lambda w: w[:, 2] * w[:, 3],
        lambda w: w[:, 3] / w[:, 2],
        lambda w: w[:, 0],
        lambda w: w[:, 1],
        lambda w: w[:, 0] / (height - w[:, 2] + 1) + w[:, 1] / (width - w[:, 3] + 1),
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(20, 900), (900, 20), (1, 1), (1, 50)])
def test_where_no_window_fits_it_is_the_central_one_of_torchvision(height: int, width: int) -> None:
    view = Augmentation(crop_area=(0.99, 1.0))
    windows = view.geometry(np.arange(50), shapes(50, height, width), 0, 0).windows
    image = torch.empty(1, height, width)
    expected = {RandomResizedCrop.get_params(image, [0.99, 1.0], [3 / 4, 4 / 3]) for _ in range(50)}
    assert {tuple(window) for window in windows.tolist()} == expected


def test_an_image_is_augmented_the_same_in_any_batch_and_differently_in_another_epoch() -> None:
    indices = np.random.RandomState(0).permutation(1000)[:64]
    view = Augmentation(shift=2, flip=True, crop_area=(0.3, 1.0))
    sizes = shapes(64, 40, 50)
    together = view.geometry(indices, sizes, seed=7, epoch=3)
    for place in (0, 13, 63):
        alone = view.geometry(indices[[place]], sizes[[place]], seed=7, epoch=3)
        assert np.array_equal(alone.windows[0], together.windows[place])
        assert np.array_equal(alone.moves[0], together.moves[place])
    for other in (view.geometry(indices, sizes, 7, 4), view.geometry(indices, sizes, 8, 3)):
        assert (other.windows == together.windows).all(axis=1).mean() < 0.1
        assert (other.moves == together.moves).all(axis=1).mean() < 0.2


@pytest.mark.parametrize(("seed", "same_as"), [(-1, 2**64 - 1), (2**64 + 5, 5), (2**100 + 5, 5)])
def test_any_whole_number_is_a_seed(seed: int, same_as: int) -> None:
    assert np.array_equal(epoch_order(100, seed, epoch=0), epoch_order(100, same_as, epoch=0))


def test_without_augmentation_the_whole_image_is_seen_as_it_is() -> None:
    plain = Augmentation().geometry(np.arange(3), shapes(3), seed=0, epoch=0)
    assert plain.windows.tolist() == [[0, 0, 6, 7]] * 3 and not plain.moves.any()
    assert same(plain, CentralCrop().geometry(np.arange(3), shapes(3), seed=1, epoch=1))


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 341), (500, 375), (30, 31)])
def test_a_central_crop_is_that_of_resizing_to_256_and_cutting_224(height: int, width: int) -> None:
    view = CentralCrop(224 / 256)
    (window,) = view.geometry(np.arange(1), shapes(1, height, width), 0, 0).windows
    top, left, tall, wide = window.tolist()
    scale = min(height, width) / 256
    assert tall == wide and abs(tall - 224 * scale) <= 0.5
    assert math.isclose(top + tall / 2, height / 2, abs_tol=0.5)
    assert math.isclose(left + wide / 2, width / 2, abs_tol=0.5)


def test_resolution_grows_in_multiples_of_32_between_two_epochs() -> None:
    growth = Resolution(160, 192, (2, 8))
    # The rule of ffcv-imagenet: linear interpolation, rounded to a multiple of 32.
    expected = [round(float(np.interp(e, [2, 8], [160, 192])) / 32) * 32 for e in range(12)]
    assert [growth.at(epoch) for epoch in range(12)] == expected
    assert set(expected) == {160, 192}
    assert [Resolution(100, 230, (0, 4)).at(epoch) for epoch in range(6)] == [
        100,
        128,
        160,
        192,
        230,
        230,
    ]
    assert Resolution(28, 28, (0, 0)).at(0) == 28
    for first, last in ((40, 48), (16, 20), (160, 180), (112, 120)):
        sizes = [Resolution(first, last, (0, 8)).at(epoch) for epoch in range(10)]
        assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (first, last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": -1}, "shift must be 0 or more pixels, not -1"),
        ({"crop_area": (0.0, 1.0)}, "crop_area must be two shares"),
        ({"crop_area": (0.5, 0.2)}, "crop_area must be two shares"),
        ({"crop_area": (0.5, 1.1)}, "crop_area must be two shares"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be two numbers"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
