"""Frozen banks of STeP: where they come from, checked, and codes of their patterns.

A bank is described by its origin (models.patterns.Bank.origin) and the SHA-256 of its patterns. Its
codes are read without drawing anything: each is the number of one of the family's patterns, and
what a number means follows from the version of the rules by which the bank was drawn. The codes of
the first family come first, each in as many bits as it needs, the lowest bit first.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.calls import ModelError
from models.packing.codes import Bytes, pack_bits, unpack_bits
from models.pattern_shapes import Patterns, bits_below, boxes, ring_table
from models.patterns import Family, bank_digest, filters_of_families

_CODED = ("lbp", "haar")

#: The versions of models.patterns.OriginalPatterns and KeyedPatterns whose codes are known.
_ORIGINAL, _KEYED = "original-1", "keyed-1"

_Numbers = NDArray[np.int64]


def is_bank(bank: Any, shape: tuple[int, ...]) -> bool:
    """Return whether plain data describes a bank (O, I, k, k)."""
    match bank:
        case {
            "sha256": str(sha256),
            "version": str(),
            "seed": int(),
            "key": str(),
            "position": int(),
            "families": [*families],
            "groups": int(groups),
            "scales": [*scales],
            **rest,
        } if not rest:
            return (
                len(sha256) == 64
                and set(sha256) <= set("0123456789abcdef")
                and 0 < len(families) == len(scales) <= 2
                and all(family in get_args(Family) for family in families)
                and all(isinstance(scale, float) and 2.0**-60 < scale < 2.0**60 for scale in scales)
                and len(shape) == 4
                and groups >= 1
                and shape[0] % groups == 0
                and shape[0] >= max(groups, len(families))
            )
    return False


def filter_scales(bank: dict[str, Any], filters: int) -> Tensor:
    """Return the scale of each filter of a bank, (O, 1, 1, 1) float32."""
    scales = torch.empty(filters, 1, 1, 1)
    for (_, chosen), scale in zip(_filters(bank, filters), bank["scales"], strict=True):
        scales[torch.from_numpy(chosen)] = scale
    return scales


def patterns_in(weight: Tensor, bank: dict[str, Any]) -> Patterns:
    """Return the patterns (O, I, k, k) of a frozen weight.

    Raises ModelError where they are not those of which the bank has the digest.
    """
    scales = filter_scales(bank, len(weight))
    patterns = (weight / scales).to(torch.int8)
    version, families = bank["version"], tuple(bank["families"])
    digest = bank_digest(version, families, bank["groups"], patterns.numpy(), scales.numpy())
    if digest.hex() != bank["sha256"] or not torch.equal(patterns * scales, weight):
        raise ModelError(f"its patterns are not those with the SHA-256 {bank['sha256']}")
    return patterns.numpy()


def has_pattern_codes(bank: dict[str, Any] | None) -> bool:
    """Return whether the patterns have codes of their own, and not those of single weights."""
    return bank is not None and set(bank["families"]) <= set(_CODED)


def encode_patterns(patterns: Patterns, bank: dict[str, Any]) -> Bytes:
    """Write patterns (O, I, k, k) of a bank as codes. Raises ModelError for one of no family."""
    kernel, version = patterns.shape[2], bank["version"]
    streams = []
    for family, filters in _filters(bank, len(patterns)):
        count = _count(family, kernel, version)
        known, order = _sorted_keys(family, kernel, version)
        chosen = patterns[filters].reshape(-1, kernel, kernel)
        places = np.searchsorted(known, _keys(chosen)).clip(max=count - 1)
        numbers = order[places]  # of equal patterns the first
        if not np.array_equal(_patterns(family, numbers, kernel, version), chosen):
            raise ModelError(f"the bank has patterns that are not of the family {family}")
        streams.append(pack_bits(numbers, bits_below(count)))
    return np.packbits(np.concatenate(streams), bitorder="little")


def decode_patterns(codes: Bytes, bank: dict[str, Any], shape: tuple[int, ...]) -> Patterns:
    """Read the codes of a bank as its patterns (O, I, k, k). Raises ModelError for none."""
    stream = np.unpackbits(codes, bitorder="little")
    patterns = np.empty(shape, np.int8)
    for family, filters in _filters(bank, shape[0]):
        count = _count(family, shape[2], bank["version"])
        length = len(filters) * shape[1] * bits_below(count)
        if length > len(stream):
            raise ModelError(f"its codes are too short for {shape[0]} filters")
        numbers, stream = unpack_bits(stream[:length], bits_below(count)), stream[length:]
        if numbers.max() >= count:
            raise ModelError(f"{numbers.max()} is the number of no {family} pattern")
        drawn = _patterns(family, numbers, shape[2], bank["version"])
        patterns[filters] = drawn.reshape(len(filters), *shape[1:])
    return patterns


def _filters(bank: dict[str, Any], filters: int) -> list[tuple[Family, NDArray[np.intp]]]:
    return list(filters_of_families(tuple(bank["families"]), filters, bank["groups"]))


def _count(family: str, kernel: int, version: str) -> int:
    """Return how many patterns of a family have a number."""
    if version not in (_ORIGINAL, _KEYED):
        raise ModelError(f"the codes of patterns of version {version} are not known here")
    if family == "lbp" and kernel >= 3:
        return len(_rings())
    if family == "haar" and version == _KEYED and kernel >= 2:
        return sum(pairs for *_, pairs in _extents(kernel))
    if family == "haar" and version == _ORIGINAL and kernel in (3, 5):
        return 2 ** (1 + 6 * bits_below(kernel - 1))
    raise ModelError(f"there are no {family} patterns of {kernel}x{kernel} in version {version}")


def _patterns(family: str, numbers: _Numbers, kernel: int, version: str) -> Patterns:
    """Return the patterns (n, k, k) of a family by their numbers (n,)."""
    if family == "lbp":
        corner = 0 if version == _ORIGINAL else (kernel - 3) // 2
        patterns = np.zeros((len(numbers), kernel, kernel), np.int8)
        patterns[:, corner : corner + 3, corner : corner + 3] = _rings()[numbers]
        return patterns
    return (_original_haar if version == _ORIGINAL else _keyed_haar)(numbers, kernel)


@cache
def _rings() -> Patterns:
    """The different lbp patterns of 3x3 in the order of ring_table."""
    rings = ring_table(3, 0).reshape(-1, 3, 3)
    return rings[np.sort(np.unique(_keys(rings), return_index=True)[1])]


def _original_haar(numbers: _Numbers, kernel: int) -> Patterns:
    """A number is a draw of the original: a sign, and six numbers below k - 1, a power of two."""
    bits = bits_below(kernel - 1)
    sign = (2 * (numbers & 1) - 1).astype(np.int8)[:, None, None]
    height, width, *corners = (numbers >> 1 + bits * i & kernel - 2 for i in range(6))
    first = boxes(corners[0], corners[1], 1 + height, 1 + width, kernel)
    second = boxes(corners[2], corners[3], 1 + height, 1 + width, kernel)
    return sign * np.where(second, np.int8(1), -first)


def _keyed_haar(numbers: _Numbers, kernel: int) -> Patterns:
    """Numbers count the pairs of different places of a rectangle, extent after extent."""
    heights, widths, pairs = np.array(_extents(kernel)).T
    before = np.cumsum(pairs) - pairs
    extent = np.searchsorted(before, numbers, side="right") - 1
    height, width = heights[extent], widths[extent]
    columns = kernel - width + 1
    others = (kernel - height + 1) * columns - 1
    first, second = np.divmod(numbers - before[extent], others)
    second = second + (second >= first)
    box = [boxes(p // columns, p % columns, height, width, kernel) for p in (first, second)]
    return box[1] - box[0]


def _extents(kernel: int) -> list[tuple[int, int, int]]:
    """Return the heights and widths of rectangles below a kernel's, and their pairs of places."""
    extents = []
    for height in range(1, kernel):
        for width in range(1, kernel):
            places = (kernel - height + 1) * (kernel - width + 1)
            extents.append((height, width, places * (places - 1)))
    return extents


@cache
def _sorted_keys(family: str, kernel: int, version: str) -> tuple[NDArray[np.uint64], _Numbers]:
    """Return the keys of all patterns of a family in rising order, and the number of each."""
    numbers = np.arange(_count(family, kernel, version))
    keys = _keys(_patterns(family, numbers, kernel, version))
    order = np.argsort(keys, kind="stable")
    return keys[order], order


def _keys(patterns: Patterns) -> NDArray[np.uint64]:
    """Return a number for each pattern (N, k, k): its ternary digits, modulo 2**64."""
    digits = (patterns.reshape(len(patterns), -1) + 1).astype(np.uint64)
    keys = np.zeros(len(patterns), np.uint64)
    for column in digits.T:
        keys = keys * np.uint64(3) + column
    return keys
