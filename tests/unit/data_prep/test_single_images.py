from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.augment import CentralCrop
from data_prep.beton import JPG
from data_prep.datasets import DataError, Storage
from data_prep.preparing.images import clean
from data_prep.single_images import as_channels, decode_image, is_image_file, view_image
from tests.pictures import picture


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(50, 60), (150, 120)])
@pytest.mark.parametrize(
    "storage",
    [Storage(side=100), Storage(side=100, passthrough=False, quality=50), Storage(format="raw")],
)
def test_it_has_the_pixels_of_what_preparation_writes(kind, size, storage):
    data = encoded(picture(3, *size), kind)
    stored = clean(data, storage, 0)
    pixels = stored.pixels
    if stored.mode == JPG:
        pixels = np.asarray(Image.open(io.BytesIO(stored.data.tobytes())))
    assert np.array_equal(decode_image(data, storage, 3), pixels)


def test_without_storage_nothing_is_reduced_however_large():
    data = encoded(Image.new("RGB", (1800, 1700)), "BMP")
    assert decode_image(data, None, 3).shape == (1700, 1800, 3)


def test_the_view_is_opencvs_area_filter_on_the_central_square():
    pixels = np.asarray(picture(2, 120, 200))
    found = view_image(pixels, CentralCrop(0.8), 48)
    expected = cv2.resize(pixels[12:108, 52:148], (48, 48), interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.array_equal(view_image(pixels[:48, :48], CentralCrop(), 48), pixels[:48, :48])


def test_colors_become_gray_by_their_luma():
    pixels = np.asarray(picture(4, 9, 8))
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(as_channels(pixels, 1)[..., 0], expected)
    assert np.array_equal(as_channels(expected, 3), np.dstack([expected] * 3))
    assert as_channels(pixels, 3) is pixels


@pytest.mark.parametrize("shape", [(3,), (4, 4, 2), (4, 4, 4), (0, 4, 3)])
def test_other_arrays_are_refused(shape):
    with pytest.raises(DataError):
        as_channels(np.zeros(shape, np.uint8), 3)


def test_a_file_is_an_image_by_its_content(tmp_path):
    path = tmp_path / "file.txt"
    for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        path.write_bytes(encoded(picture(1, 8, 9), kind))
        assert is_image_file(path), kind
    for content in (b"", b"text\n" * 99, b"\x80\x02}."):
        path.write_bytes(content)
        assert not is_image_file(path), content
