"""OpenCV's area filter in NumPy, for machines without FFCV; also the yardstick of its tests."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt


@functools.lru_cache(maxsize=4096)
def _weights(source: int, target: int, reducing: bool) -> npt.NDArray[np.float32]:
    """Weights of each of ``source`` pixels in each of ``target`` pixels, float32 (target, source).

    Reducing, a target pixel is the mean of what it covers, pixels in part by their part.
    Otherwise it is interpolated linearly between two neighbors, where each source pixel keeps a
    plateau, as OpenCV does for ``INTER_AREA`` when an image is not reduced in both directions.
    """
    # Rounded where OpenCV rounds: it decides which pixel begins exactly at a border.
    enlargement = target / source
    scale = 1 / enlargement
    weights = np.zeros((target, source), dtype=np.float64)
    for place in range(target):
        begin, end = place * scale, min((place + 1) * scale, source)
        if reducing:
            for pixel in range(int(begin), min(int(np.ceil(end)), source)):
                weights[place, pixel] = min(end, pixel + 1) - max(begin, pixel)
        else:
            pixel = int(np.floor(begin))
            between = max(float(np.float32((place + 1) - (pixel + 1) * enlargement)), 0.0)
            between -= int(between)
            weights[place, pixel] += 1 - between
            weights[place, min(pixel + 1, source - 1)] += between
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Resize an image, uint8 (H, W, C), as ``cv2.resize`` does with ``INTER_AREA``.

    The result differs from OpenCV's by rounding, at most one level.
    """
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    reducing = rows >= height and columns >= width
    down = _weights(rows, height, reducing)
    across = _weights(columns, width, reducing)
    wide = np.tensordot(across, image.astype(np.float32), axes=(1, 1))  # (width, rows, C)
    full = np.tensordot(down, wide, axes=(1, 1))  # (height, width, C)
    return np.rint(full).clip(0, 255).astype(np.uint8)
