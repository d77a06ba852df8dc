"""Codes of the frozen patterns of STeP: they are read without drawing anything.

A bank's origin (models.patterns.Bank.origin) says how many bits a pattern takes and what they mean:
the number of one of the family's patterns, in the order of `_patterns_of`. The codes of the first
family come first, each in as many bits as it needs, the lowest bit first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.calls import ModelError
from models.packing.codes import Bytes, pack_bits, unpack_bits
from models.pattern_shapes import Patterns, bits_below, boxes, ring_table
from models.patterns import filters_of_families

_CODED = ("lbp", "haar")


def filter_scales(origin: dict[str, Any] | None, shape: tuple[int, ...]) -> Tensor:
    """Return the scale of each filter of a bank, (O, 1, 1, 1) float32."""
    scales = torch.ones(shape[0], 1, 1, 1)
    if origin is not None:
        families = tuple(origin["families"])
        of_families = filters_of_families(families, shape[0], origin["groups"])
        for (_, filters), scale in zip(of_families, origin["scales"], strict=True):
            scales[torch.from_numpy(filters)] = scale
    return scales


def has_pattern_codes(origin: dict[str, Any] | None) -> bool:
    """Return whether the patterns have codes of their own, and not those of single weights."""
    return origin is not None and set(origin["families"]) <= set(_CODED)


def encode_patterns(patterns: Patterns, origin: dict[str, Any]) -> Bytes:
    """Write patterns (O, I, k, k) of a bank as codes. Raises ModelError for one of no family."""
    kernel = patterns.shape[2]
    streams = []
    for family, filters in filters_of_families(
        tuple(origin["families"]), len(patterns), origin["groups"]
    ):
        table, bits = _patterns_of(family, kernel, origin["version"])
        known = _keys(table)
        order = np.argsort(known, kind="stable")  # of equal patterns the first
        keys = _keys(patterns[filters].reshape(-1, kernel, kernel))
        places = np.searchsorted(known[order], keys).clip(max=len(order) - 1)
        numbers = order[places]
        if not np.array_equal(table[numbers].reshape(-1), patterns[filters].reshape(-1)):
            raise ModelError(f"the bank has patterns that are not of the family {family}")
        streams.append(pack_bits(numbers, bits))
    return np.packbits(np.concatenate(streams), bitorder="little")


def decode_patterns(codes: Bytes, origin: dict[str, Any], shape: tuple[int, ...]) -> Patterns:
    """Read the codes of a bank as its patterns (O, I, k, k). Raises ModelError for none."""
    stream = np.unpackbits(codes, bitorder="little")
    bank = np.empty(shape, np.int8)
    taken = 0
    for family, filters in filters_of_families(
        tuple(origin["families"]), shape[0], origin["groups"]
    ):
        table, bits = _patterns_of(family, shape[2], origin["version"])
        length = len(filters) * shape[1] * bits
        numbers = unpack_bits(stream[taken : taken + length], bits)
        taken += length
        if numbers.size and numbers.max() >= len(table):
            raise ModelError(f"{numbers.max()} is the number of no {family} pattern")
        bank[filters] = table[numbers].reshape(len(filters), *shape[1:])
    return bank


@cache
def _patterns_of(family: str, kernel: int, version: str) -> tuple[Patterns, int]:
    """Return the patterns (N, k, k) of a family by their numbers, and the bits of a number."""
    original = version.startswith("original")
    if family == "lbp":
        rings = ring_table(kernel, 0 if original else (kernel - 3) // 2)
        rings = rings.reshape(-1, kernel, kernel)
        first = np.unique(_keys(rings), return_index=True)[1]
        patterns = rings[np.sort(first)]
    else:
        patterns = _original_haar(kernel) if original else _keyed_haar(kernel)
    return patterns, bits_below(len(patterns))


def _original_haar(kernel: int) -> Patterns:
    """Every draw of the original: its sign and six numbers below k - 1, a power of two."""
    bits = bits_below(kernel - 1)
    draws = np.arange(2 ** (1 + 6 * bits))
    sign = (2 * (draws & 1) - 1).astype(np.int8)[:, None, None]
    height, width, *corners = (draws >> 1 + bits * i & kernel - 2 for i in range(6))
    first = boxes(corners[0], corners[1], 1 + height, 1 + width, kernel)
    second = boxes(corners[2], corners[3], 1 + height, 1 + width, kernel)
    return sign * np.where(second, np.int8(1), -first)


def _keyed_haar(kernel: int) -> Patterns:
    """Every pair of different places of a rectangle, of each extent below the kernel's."""
    patterns = []
    for height in range(1, kernel):
        for width in range(1, kernel):
            columns = kernel - width + 1
            places = np.arange((kernel - height + 1) * columns)
            extent = np.full_like(places, height), np.full_like(places, width)
            box = boxes(places // columns, places % columns, *extent, kernel)
            pairs = (box[None] - box[:, None]).reshape(-1, kernel, kernel)
            different = ~np.eye(len(places), dtype=bool).ravel()
            patterns.append(pairs[different])
    return np.concatenate(patterns)


def _keys(patterns: Patterns) -> NDArray[np.uint64]:
    """Return a number for each pattern (N, k, k): its ternary digits, modulo 2**64."""
    digits = (patterns.reshape(len(patterns), -1) + 1).astype(np.uint64)
    keys = np.zeros(len(patterns), np.uint64)
    for column in digits.T:
        keys = keys * np.uint64(3) + column
    return keys
