"""One image file as the network sees it in an evaluation, without anything being prepared."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.augment import CentralCrop
from data_prep.datasets import DataError, Storage
from data_prep.preparing.images import FORMATS, BadImage, Pixels, seen
from data_prep.reading.resampling import resize


def decode_image(data: bytes, storage: Storage | None, channels: int) -> Pixels:
    """The pixels that preparation would keep of a file, uint8 (H, W, ``channels``).

    Args:
        data: content of the file: 8 bits, upright, without transparency, whatever it was.
        storage: how the images of the data set are kept; None: pixel by pixel.
        channels: 1 (gray; colors by their luma, ITU-R BT.601) or 3 (red, green, blue).

    Raises:
        DataError: with the reason, when the file is no usable image.
    """
    try:
        pixels = seen(data, storage)
    except BadImage as error:
        raise DataError(str(error)) from None
    return as_channels(pixels, channels)


def as_channels(pixels: Pixels, channels: int) -> Pixels:
    """Pixels (H, W), (H, W, 1) or (H, W, 3) as (H, W, ``channels``).

    Raises:
        DataError: for an array that is no image of 8 bits.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise DataError(
            f"an image has pixels of type uint8 and shape (H, W, 1) or (H, W, 3), not of "
            f"{pixels.dtype} and {pixels.shape}"
        )
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (found, channels) == (3, 1):
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., np.newaxis]
    raise DataError(f"images of {found} channels cannot become ones of {channels}")


def view_image(pixels: Pixels, view: CentralCrop, size: int) -> Pixels:
    """The part that an evaluation looks at, resized; the same as from a loader's torch backend.

    Args:
        pixels: uint8 (H, W, C).
        view: what of the image is seen.
        size: height and width of the result, uint8 (size, size, C).
    """
    shape = np.array([pixels.shape[:2]], dtype=np.int32)
    windows, _ = view.geometry(np.zeros(1, dtype=np.int64), shape, seed=0, epoch=0)
    top, left, height, width = windows[0]
    return resize(pixels[top : top + height, left : left + width], size, size)


def is_image_file(path: Path) -> bool:
    """Whether a file begins as an image of a known format does, whatever its name.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            return False
        except Exception:  # whatever the rest of a damaged header provokes in Pillow
            return True
    return True
