"""Randomness by counting: every draw is a hash of (seed, epoch, sample index) and nothing else.

So the order of the samples and each image's augmentation are the same for every number of ranks,
for both backends, and after a resume in the middle of an epoch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Draw(IntEnum):
    """What a random number is for; each purpose has a stream of its own."""

    ORDER = 0
    SHIFT = 1
    FLIP = 2


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_64_BITS = (1 << 64) - 1


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves every output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=16)
def _key(draw: Draw, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    key = np.zeros(1, dtype=np.uint64)
    for part in (draw, seed, epoch):
        key = _mix((key ^ np.uint64(part & _64_BITS)) + _GOLDEN)
    return key


def random_bits(
    draw: Draw, seed: int, epoch: int, indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """64 random bits for each sample index, shape (N,); seed and epoch count modulo 2**64."""
    return _mix(_mix((_key(draw, seed, epoch) ^ indices.astype(np.uint64)) + _GOLDEN))


def epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of ``count`` samples, int64, shape (count,): sorted by their random bits."""
    bits = random_bits(Draw.ORDER, seed, epoch, np.arange(count))
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image that keep its class.

    Attributes:
        shift: at most so many pixels up or down and left or right, each distance equally likely;
            what moves in is black. This is a random crop of the image padded by ``shift``.
        flip: mirror left and right, for half of the images.
    """

    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift must be 0 or more pixels, not {self.shift}")

    def apply(
        self, images: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], seed: int, epoch: int
    ) -> npt.NDArray[np.uint8]:
        """Augment the images, uint8 (N, H, W, C), of the samples ``indices``; the input is kept.

        NumPy, not torch: at these sizes torch would spend longer on waking its threads.
        """
        if self.flip:
            bits = random_bits(Draw.FLIP, seed, epoch, indices)
            mirrored = np.flatnonzero(bits >> np.uint64(63))
            images = images.copy()
            images[mirrored] = images[mirrored, :, ::-1]
        if self.shift:
            images = self._shifted(images, random_bits(Draw.SHIFT, seed, epoch, indices))
        return images

    def _shifted(
        self, images: npt.NDArray[np.uint8], bits: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        count, height, width, channels = images.shape
        border, places = self.shift, np.uint64(2 * self.shift + 1)
        padded = np.zeros(
            (count, height + 2 * border, width + 2 * border, channels), dtype=np.uint8
        )
        padded[:, border : border + height, border : border + width] = images
        # The upper and the lower 32 bits, each scaled to a place in 0..2*shift.
        half = np.uint64(32)
        top = ((bits >> half) * places) >> half
        left = ((bits & np.uint64(0xFFFFFFFF)) * places) >> half
        windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], axis=(1, 2, 3))
        return windows[np.arange(count), top, left, 0]
