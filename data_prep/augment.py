"""Randomness by counting: every draw is a hash of (seed, epoch, sample index) and nothing else.

So the order of the samples and each image's augmentation are the same for every number of ranks
and loader threads, for both backends, and after a resume in the middle of an epoch. What is drawn
are numbers for a whole batch (where to cut, whether to mirror); the loaders' compiled code cuts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]


class Draw(IntEnum):
    """What a random number is for; each purpose has a stream of its own."""

    ORDER = 0
    SHIFT = 1
    FLIP = 2
    WINDOW_PLACE = 3
    #: The first of ``_ATTEMPTS`` streams.
    WINDOW_SHAPE = 4


#: Shapes of a random window that are tried until one fits, as torchvision does.
_ATTEMPTS = 10

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_64_BITS = (1 << 64) - 1
_HALF = np.uint64(32)
_LOWER = np.uint64(0xFFFFFFFF)


def _mix(values: Bits) -> Bits:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves every output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _key(draw: int, seed: int, epoch: int) -> Bits:
    key = np.zeros(1, dtype=np.uint64)
    for part in (draw, seed, epoch):
        key = _mix((key ^ np.uint64(part & _64_BITS)) + _GOLDEN)
    return key


def random_bits(draw: int, seed: int, epoch: int, indices: Indices) -> Bits:
    """64 random bits for each sample index, shape (N,); seed and epoch count modulo 2**64."""
    return _mix(_mix((_key(draw, seed, epoch) ^ indices.astype(np.uint64)) + _GOLDEN))


def epoch_order(count: int, seed: int, epoch: int) -> Indices:
    """A permutation of ``count`` samples, int64, shape (count,): sorted by their random bits."""
    bits = random_bits(Draw.ORDER, seed, epoch, np.arange(count))
    return np.argsort(bits, kind="stable")


def _below(halves: Bits, counts: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.int64]:
    """32 random bits each, scaled to a whole number from 0 to below ``counts``."""
    return ((halves * counts) >> _HALF).astype(np.int64)


class Geometry(NamedTuple):
    """What is to be seen of each of N images.

    Attributes:
        windows: int32 (N, 4), top, left, height and width, in stored pixels, of the part that is
            resized to the whole image.
        moves: int32 (N, 3), rows and columns by which the resized image is looked at further down
            and right, and 1 where it is mirrored before.
    """

    windows: npt.NDArray[np.int32]
    moves: npt.NDArray[np.int32]


class View(Protocol):
    """How images are cut, for training or for evaluation."""

    @property
    def padding(self) -> Literal["black", "edge"]:
        """What comes in where a move looks beyond the image."""
        ...

    def geometry(
        self, indices: Indices, shapes: npt.NDArray[np.int32], seed: int, epoch: int
    ) -> Geometry:
        """Geometry of the samples ``indices``, whose stored heights and widths are ``shapes``."""
        ...


@dataclass(frozen=True)
class CentralCrop:
    """The view of evaluation: the same at every look.

    Attributes:
        share: side of the central square as a share of the shorter side; 224/256 is the usual
            "resize to 256, crop 224". None: the whole image, whatever its aspect ratio.
    """

    share: float | None = None
    padding: Literal["black", "edge"] = "black"

    def geometry(
        self, indices: Indices, shapes: npt.NDArray[np.int32], seed: int, epoch: int
    ) -> Geometry:
        """See ``View``."""
        moves = np.zeros((len(indices), 3), dtype=np.int32)
        windows = np.zeros((len(indices), 4), dtype=np.int32)
        windows[:, 2:] = shapes
        if self.share is not None:
            side = np.rint(self.share * shapes.min(axis=1)).astype(np.int32).clip(1)[:, np.newaxis]
            windows[:, :2] = (shapes - side) // 2
            windows[:, 2:] = side
        return Geometry(windows, moves)


@dataclass(frozen=True)
class Augmentation:
    """The view of training: random changes of an image that keep its class.

    Attributes:
        shift: at most so many pixels up or down and left or right, each distance equally likely.
            This is a random crop of the image padded by ``shift``.
        padding: what moves in is black, or repeats the border pixel.
        flip: mirror left and right, for half of the images; before the shift.
        crop_area: a random window, its share of the image's area uniform between these two, its
            aspect ratio log-uniform between ``crop_ratio``, resized to the whole image; the
            distribution of torchvision's RandomResizedCrop (Szegedy et al. 2015, section 6). None:
            the whole image.
        crop_ratio: width over height of that window, smallest and largest.
    """

    shift: int = 0
    padding: Literal["black", "edge"] = "black"
    flip: bool = False
    crop_area: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift must be 0 or more pixels, not {self.shift}")
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(
                f"crop_area must be two shares from above 0 to 1, rising, not {self.crop_area}"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(
                f"crop_ratio must be two numbers above 0, rising, not {self.crop_ratio}"
            )

    def geometry(
        self, indices: Indices, shapes: npt.NDArray[np.int32], seed: int, epoch: int
    ) -> Geometry:
        """See ``View``."""
        moves = np.zeros((len(indices), 3), dtype=np.int32)
        if self.shift:
            bits = random_bits(Draw.SHIFT, seed, epoch, indices)
            distances = np.uint64(2 * self.shift + 1)
            moves[:, 0] = _below(bits >> _HALF, distances) - self.shift
            moves[:, 1] = _below(bits & _LOWER, distances) - self.shift
        if self.flip:
            moves[:, 2] = random_bits(Draw.FLIP, seed, epoch, indices) >> np.uint64(63)
        windows = np.zeros((len(indices), 4), dtype=np.int32)
        if self.crop_area is None:
            windows[:, 2:] = shapes
            return Geometry(windows, moves)
        sizes, fits = self._window_sizes(indices, shapes, seed, epoch)
        bits = random_bits(Draw.WINDOW_PLACE, seed, epoch, indices)
        free = (shapes - sizes + 1).astype(np.uint64)
        places = np.stack([_below(bits >> _HALF, free[:, 0]), _below(bits & _LOWER, free[:, 1])])
        windows[:, :2] = np.where(fits[:, np.newaxis], places.T, (shapes - sizes) // 2)
        windows[:, 2:] = sizes
        return Geometry(windows, moves)

    def _window_sizes(
        self, indices: Indices, shapes: npt.NDArray[np.int32], seed: int, epoch: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Heights and widths of random windows, int32 (N, 2), and whether any attempt fitted."""
        assert self.crop_area is not None
        streams = range(Draw.WINDOW_SHAPE, Draw.WINDOW_SHAPE + _ATTEMPTS)
        bits = np.stack([random_bits(stream, seed, epoch, indices) for stream in streams])
        smallest, largest = self.crop_area
        narrow, wide = np.log(self.crop_ratio)
        share = smallest + (largest - smallest) * ((bits >> _HALF) * 2.0**-32)
        ratio = np.exp(narrow + (wide - narrow) * ((bits & _LOWER) * 2.0**-32))
        area = share * (shapes[:, 0].astype(np.float64) * shapes[:, 1])
        heights, widths = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
        fits = (widths > 0) & (widths <= shapes[:, 1]) & (heights > 0) & (heights <= shapes[:, 0])
        first = fits.argmax(axis=0)
        samples = np.arange(len(indices))
        sizes = np.stack([heights[first, samples], widths[first, samples]], axis=1)
        fitted = fits.any(axis=0)
        if not fitted.all():
            sizes[~fitted] = self._largest_windows(shapes[~fitted])
        return sizes.astype(np.int32), fitted

    def _largest_windows(self, shapes: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """The largest window of each image with an aspect ratio that is allowed."""
        heights, widths = shapes[:, 0].astype(np.float64), shapes[:, 1].astype(np.float64)
        narrow, wide = self.crop_ratio
        sizes = np.stack(
            [np.minimum(heights, widths / narrow), np.minimum(widths, heights * wide)], axis=1
        )
        return np.rint(sizes).clip(1)


@dataclass(frozen=True)
class Resolution:
    """Height and width of training images by epoch: small at first, which is faster.

    Progressive resolution as in the ResNet-50 recipes of ffcv-imagenet (Leclerc et al. 2023):
    ``first`` up to the epoch ``ramp[0]``, ``last`` from the epoch ``ramp[1]`` on, in between
    linear and rounded to a multiple of 32.
    """

    first: int
    last: int
    ramp: tuple[float, float]

    @classmethod
    def constant(cls, size: int) -> Resolution:
        """The same in every epoch."""
        return cls(size, size, (0, 0))

    def at(self, epoch: int) -> int:
        """Pixels of each side in this epoch, which counts from 0."""
        begin, end = self.ramp
        if epoch <= begin:
            return self.first
        if epoch >= end:
            return self.last
        size = self.first + (self.last - self.first) * (epoch - begin) / (end - begin)
        return min(max(round(size / 32) * 32, self.first), self.last)
