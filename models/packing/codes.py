"""Digits in bytes: the codes of models.storage, written and read through look-up tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.storage import CODES

Bytes = NDArray[np.uint8]
Digits = NDArray[np.uint8]

#: What a look-up table says of a word that is none, and of the digits that a codebook has not.
INVALID = 255


@dataclass(frozen=True)
class _Words:
    """How a code lies in memory: `digits` digits of a base in words of `size` bytes.

    A word is the sum of digit_i * base**i, little-endian. It is the shortest group of digits that
    ends with a byte.
    """

    base: int
    digits: int
    size: int


def _words(format: str) -> _Words:
    code = CODES[format]
    digits = code.weights if code.weights > 1 else 8 // math.gcd(8, code.bits)
    return _Words(code.levels, digits, digits // code.weights * code.bits // 8)


def code_bytes(count: int, format: str) -> int:
    """Return the bytes of so many digits: whole groups of digits, filled up to a whole byte."""
    code = CODES[format]
    return -(-(-(-count // code.weights) * code.bits) // 8)


def encode_digits(digits: Digits, format: str) -> Bytes:
    """Write digits (n,) below the base of a code as bytes (code_bytes(n),)."""
    words = _words(format)
    rows = np.zeros((-(-len(digits) // words.digits), words.digits), np.uint8)
    rows.ravel()[: len(digits)] = digits
    values: NDArray[Any] = np.zeros(len(rows), (np.uint8, np.uint16, np.uint32)[words.size - 1])
    for place in reversed(range(words.digits)):
        values *= values.dtype.type(words.base)
        values += rows[:, place]
    if words.size == 1:
        codes = values.view(np.uint8)
    else:
        little = values.astype(values.dtype.newbyteorder("<")).view(np.uint8)
        codes = little.reshape(len(rows), values.itemsize)[:, : words.size].ravel()
    return codes[: code_bytes(len(digits), format)]


def decode_digits(codes: Bytes, format: str, count: int) -> Digits:
    """Read bytes as digits (count,); those of a word that is none are INVALID."""
    return _look_up(codes, format, count, np.arange(256, dtype=np.uint8))


def decode_values(
    codes: Bytes, format: str, count: int, values: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Read bytes as the values (count,) that their digits stand for; without one, as NaN."""
    of_digits = np.full(256, np.nan, np.float32)
    of_digits[: len(values)] = values
    return _look_up(codes, format, count, of_digits)


def _look_up(codes: Bytes, format: str, count: int, of_digits: NDArray[Any]) -> NDArray[Any]:
    words = _words(format)
    padded = np.zeros(-(-count // words.digits) * words.size, np.uint8)
    padded[: len(codes)] = codes
    if words.size == 1:
        numbers = padded
    elif words.size == 2:
        numbers = padded.view("<u2")
    else:  # three bytes are two numbers of twelve bits, which have small tables
        first, second, third = padded.reshape(-1, 3).T.astype(np.uint16)
        numbers = np.stack([first | (second & 15) << 8, second >> 4 | third << 4], axis=1).ravel()
    return of_digits[_digit_table(format)].take(numbers, axis=0).reshape(-1)[:count]


@cache
def _digit_table(format: str) -> Digits:
    """Return the digits of every number that a word, or half of one of three bytes, can hold."""
    words = _words(format)
    halves = 2 if words.size == 3 else 1
    digits = words.digits // halves
    numbers = np.arange(2 ** (8 * words.size // halves))
    table = (numbers[:, None] // words.base ** np.arange(digits) % words.base).astype(np.uint8)
    table[words.base**digits :] = INVALID
    return table


def pack_bits(numbers: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Return the low bits of numbers (n,) as ones and zeros (n * bits,), the lowest first."""
    places = np.arange(bits, dtype=np.int64)
    return (numbers.astype(np.int64)[:, None] >> places & 1).astype(np.uint8).ravel()


def unpack_bits(stream: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """Return the numbers (n,) of a stream of ones and zeros (n * bits,)."""
    weights = np.int64(1) << np.arange(bits, dtype=np.int64)
    return stream.reshape(-1, bits).astype(np.int64) @ weights
