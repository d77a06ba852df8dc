"""Pictures that tests make: smooth, in color, each different, in folders of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Waves in each channel: a JPEG keeps them well, and each seed gives another picture."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width] / 16
    waves = [
        np.sin(x * random.uniform(0.3, 1.5) + y * random.uniform(-1.5, 1.5) + random.uniform(0, 6))
        for _ in range(3)
    ]
    pixels = (127.5 * (1 + np.stack(waves, axis=-1))).round().astype(np.uint8)
    return Image.fromarray(pixels)


def write_class_folders(
    folder: Path,
    train: int = 24,
    val: int = 6,
    classes: tuple[str, ...] = ("cat", "dog"),
    scale: int = 1,
) -> Path:
    """Write ``{train,val}/<class>/<number>.jpg``: so many of each, sides 40 to 90 times scale."""
    seed = 0
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                seed += 1
                height, width = 40 + seed * 7 % 51, 40 + seed * 13 % 51
                path = folder / split / name / f"{number:03}.jpg"
                picture(seed, height * scale, width * scale).save(path, quality=95)
    return folder
