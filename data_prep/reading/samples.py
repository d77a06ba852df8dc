"""Which images of a file make a split, and which of those are a rank's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_prep.augment import Indices
from data_prep.datasets import VALIDATION, DataError


def rank_share(count: int, rank: int, world_size: int) -> slice:
    """Which of ``count`` images in a row are a rank's; the first ranks have one more if need be."""
    least, left = divmod(count, world_size)
    first = rank * least + min(rank, left)
    return slice(first, first + least + (rank < left))


def samples_of(split: str, labels: npt.NDArray[np.int64], held_out: int, dataset: str) -> Indices:
    """Indices, in their file, of the images that make a split, rising.

    Args:
        split: its name; ``train`` and ``validation`` share a file.
        labels: int64 (N,), of all images in that file.
        held_out: images that ``train`` leaves to ``validation``.
        dataset: its name, for errors.

    Raises:
        DataError: when none of the images are left to train with, or none are held out to make
            the validation split.
    """
    everything = np.arange(len(labels))
    if split not in ("train", VALIDATION):
        return everything
    if not 0 <= held_out < len(labels):
        raise DataError(
            f"held_out={held_out}: {dataset} has {len(labels)} training images, of which some "
            "have to be left to train with"
        )
    if held_out == 0:
        if split == VALIDATION:
            raise DataError(f"no training images of {dataset} are held out to validate with")
        return everything
    chosen = held_out_samples(labels, held_out)
    return chosen if split == VALIDATION else np.delete(everything, chosen)


def held_out_samples(labels: npt.NDArray[np.int64], count: int) -> Indices:
    """Which training images are held out to validate with: always the same ones.

    The last of the file, as the binary networks of Stadtmann et al. (2020) leave 50,000 of MNIST
    and 45,000 of CIFAR-10 to train with. Of a file that is sorted by class, in equal steps over
    the whole file, so that each class gives its share.

    Args:
        labels: int64 (N,), of all training images, in the order of the file.
        count: from 1 to N.

    Returns:
        Indices of the images, int64 (count,), rising.
    """
    is_sorted = bool((np.diff(labels) >= 0).all())
    if not is_sorted:
        return np.arange(len(labels) - count, len(labels))
    return (2 * np.arange(count) + 1) * len(labels) // (2 * count)
