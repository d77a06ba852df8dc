"""What patterns are made of (see models.patterns): a ring of neighbors, and rectangles."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Patterns = NDArray[np.int8]
_Integers = NDArray[np.int64]

#: The ring of neighbors, clockwise from the top left: (row, column).
_RING = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))


@cache
def ring_table(kernel: int, corner: int) -> Patterns:
    """Every lbp pattern by its start, length - 1 and signs; the ring's top left is at `corner`."""
    table = np.zeros((8, 4, 16, kernel, kernel), np.int8)
    for start, length, signs in np.ndindex(8, 4, 16):
        pattern = table[start, length, signs, corner:, corner:]
        for i in range(length + 1):
            sign = 2 * (signs >> i & 1) - 1
            pattern[_RING[(start + i) % 8]] = sign
            pattern[_RING[(start + i + 4) % 8]] = -sign
    return table


def boxes(
    row: _Integers, column: _Integers, height: _Integers, width: _Integers, kernel: int
) -> Patterns:
    """Fill rectangles with ones, (N, k, k); what lies outside the kernel is cut off."""
    cells = np.arange(kernel)
    rows = (cells >= row[:, None]) & (cells < (row + height)[:, None])
    columns = (cells >= column[:, None]) & (cells < (column + width)[:, None])
    return (rows[:, :, None] & columns[:, None, :]).view(np.int8)


def bits_below(values: int) -> int:
    """Return the bits that tell so many values apart."""
    return (values - 1).bit_length()
