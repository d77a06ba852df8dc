from __future__ import annotations

import cv2
import numpy as np
import pytest

from data_prep.reading.resampling import resize
from tests.pictures import picture

RANDOM = np.random.RandomState(0)


@pytest.mark.parametrize("size", [17, 32, 64, 160])
def test_it_is_the_area_filter_of_opencv_within_one_level(size: int) -> None:
    for seed in range(12):
        height, width = RANDOM.randint(3, 200, 2).tolist()
        smooth = np.asarray(picture(seed, height, width))
        noise = RANDOM.randint(0, 256, (height, width, 3)).astype(np.uint8)
        for image in (smooth, noise):
            expected = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            assert np.abs(expected.astype(int) - resize(image, size, size)).max() <= 1


def test_halving_is_the_mean_of_four_pixels() -> None:
    image = RANDOM.randint(0, 256, (8, 6, 3)).astype(np.uint8)
    means = image.reshape(4, 2, 3, 2, 3).mean(axis=(1, 3))
    assert np.array_equal(resize(image, 4, 3), np.rint(means))


def test_an_image_that_fits_is_returned_as_it_is() -> None:
    image = RANDOM.randint(0, 256, (5, 7, 1)).astype(np.uint8)
    assert resize(image, 5, 7) is image
