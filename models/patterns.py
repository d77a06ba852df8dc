"""Ternary patterns: where the frozen filters of STeP come from.

C. Kyrkou, "Toward Efficient Convolutional Neural Networks With Structured Ternary Patterns",
IEEE TNNLS 2024, doi 10.1109/TNNLS.2024.3380827, arXiv 2407.14831, and its code (STeP_Models on
GitHub). A bank of filters is int8 (O, I, k, k) with values -1, 0, +1; each of its O * I slices is
a pattern drawn on its own. The families:

- lbp, centre-symmetric local binary patterns: the eight neighbors of the centre form a ring, number
  p opposite to p + 4. From a start s on, L = 1..4 neighbors get a random sign each, and their
  opposites the other sign:

      pattern = sum over i < L of sign_i * (e[s + i] - e[s + i + 4])        (indices modulo 8)

  72 patterns, antisymmetric, so they sum to zero. Kernels larger than 3x3 hold the same ring;
- haar: a rectangle of -sign and another of +sign, of one random size and at random positions;
- ternary: each weight -1, 0 or +1 alike; binary01: each weight 0 or 1 alike;
- points, what lbp and haar become in a 1x1 kernel: each weight -1 or +1 alike.

Two sources draw from them: OriginalPatterns bit for bit as the code of the paper, KeyedPatterns
with its quirks repaired and each layer independent of all others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.calls import ModelError
from models.pattern_shapes import Patterns, bits_below, boxes, ring_table
from models.storage import Storage

Family = Literal["lbp", "haar", "ternary", "binary01", "points"]
Shape = tuple[int, int, int, int]
_Integers = NDArray[np.int64]


class PatternSource(Protocol):
    """What patterns are drawn from."""

    @property
    def version(self) -> str:
        """Name of the rules by which patterns are drawn; it changes whenever they do."""

    @property
    def seed(self) -> int:
        """Seed of all draws."""

    @property
    def position(self) -> int:
        """Words taken from the stream so far, where layer after layer reads the same one."""

    @property
    def unit_gain(self) -> bool:
        """Whether banks are scaled so that their outputs have about the variance of their input."""

    def check(self, family: Family, kernel: int) -> None:
        """Raise ModelError if there are no patterns of a family in a kernel."""

    def ring_corner(self, kernel: int) -> int:
        """Return the row and column at which the 3x3 ring of lbp patterns begins in a kernel."""

    def draw(self, family: Family, shape: Shape, key: str) -> Patterns:
        """Return patterns (O, I, k, k). `key` names the layer, where that decides."""

    def code_bits(self, family: Family, shape: Shape) -> int:
        """Return the bits that the codes of so many patterns take."""


@dataclass(frozen=True)
class Bank:
    """Frozen filters (O, I, k, k) of a layer, described but not drawn yet.

    Each group of filters begins with those of the first family and ends with those of the second,
    half and half; where a group has an odd number of filters, the first family gets the odd one in
    every other group. So a layer without groups has its lbp maps first and its haar maps last, and
    one with two filters per group has them in turn.

    `input_order` says for each input channel which one it is in the order of the source.
    """

    source: PatternSource
    families: tuple[Family, ...]
    shape: Shape
    key: str
    groups: int = 1
    input_order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for family in self.families:
            self.source.check(family, self.shape[2])

    def draw(self) -> Patterns:
        """Take the patterns from the source."""
        bank = np.empty(self.shape, np.int8)
        for family, filters in self.family_filters():
            shape = (len(filters), *self.shape[1:])
            bank[filters] = self.source.draw(family, shape, self.key)
        return bank if self.input_order is None else bank[:, list(self.input_order)]

    def scales(self, patterns: Patterns) -> NDArray[np.float32]:
        """Return the scale of each filter, (O, 1, 1, 1): ones, or powers of two for unit gain.

        Powers of two are exact in every float format. White input of unit variance gives outputs
        of variance 1/2 to 2, on average over a family.
        """
        scales = np.ones((self.shape[0], 1, 1, 1), np.float32)
        if self.source.unit_gain:
            for _, filters in self.family_filters():
                energy = np.square(patterns[filters]).sum((1, 2, 3), dtype=np.int64).mean()
                scales[filters] = 2.0 ** -np.round(np.log2(max(energy, 1.0)) / 2)
        return scales

    def digest(self, patterns: Patterns, scales: NDArray[np.float32]) -> bytes:
        """Return the SHA-256 of the patterns, their scales and the rules that made them."""
        return bank_digest(self.source.version, self.families, self.groups, patterns, scales)

    def origin(self, position: int, scales: NDArray[np.float32]) -> dict[str, Any]:
        """Return where a bank comes from that was drawn at a position of the source's stream.

        It is plain data: what draws the bank again, and what its codes need to be read without
        drawing. `scales` has one entry for each family.
        """
        return {
            "version": self.source.version,
            "seed": self.source.seed,
            "key": self.key,
            "position": position,
            "families": list(self.families),
            "groups": self.groups,
            "scales": [float(scales[filters[0]].item()) for _, filters in self.family_filters()],
        }

    def storage(self) -> Storage:
        """Return the form in which the bank is stored, if not as its seed."""
        outputs, inputs, rows, columns = self.shape
        binary = self.families[0] in ("binary01", "points")
        codes = [
            self.source.code_bits(family, (len(filters), *self.shape[1:]))
            for family, filters in self.family_filters()
        ]
        return Storage(
            "patterns" if self.families[0] in ("lbp", "haar") else self.families[0],
            outputs * inputs * rows * columns,
            levels=2 if binary else 3,
            frozen=True,
            code_bits=sum(codes),
        )

    def source_order(self) -> tuple[int, ...]:
        """Return for each filter its place among them in the order in which they are drawn."""
        drawn = np.concatenate([filters for _, filters in self.family_filters()])
        return tuple(np.argsort(drawn).tolist())

    def family_filters(self) -> Iterator[tuple[Family, NDArray[np.intp]]]:
        """Yield each family with the filters that it has."""
        return filters_of_families(self.families, self.shape[0], self.groups)


def bank_digest(
    version: str,
    families: tuple[str, ...],
    groups: int,
    patterns: Patterns,
    scales: NDArray[np.float32],
) -> bytes:
    """Return the SHA-256 of patterns (O, I, k, k), of their scales (O, 1, 1, 1) and their rules."""
    rules = f"{version} {','.join(families)} {patterns.shape} {groups} "
    values = scales.astype("<f4").tobytes() + patterns.tobytes()
    return hashlib.sha256(rules.encode() + values).digest()


def filters_of_families(
    families: tuple[Family, ...], filters: int, groups: int
) -> Iterator[tuple[Family, NDArray[np.intp]]]:
    """Yield each family with its filters, as Bank says."""
    if len(families) == 1:
        yield families[0], np.arange(filters)
        return
    per_group = filters // groups
    group, place = np.divmod(np.arange(filters), per_group)
    is_first = place < (per_group + (group + 1) % 2) // 2
    yield families[0], np.flatnonzero(is_first)
    yield families[1], np.flatnonzero(~is_first)


class OriginalPatterns:
    """The patterns of the paper's code, bit for bit: one stream, read by layer after layer.

    The stream is that of numpy.random.RandomState(seed), whose "integer below n" takes 32-bit
    words, keeps the low bits that n - 1 needs, and drops a word whose value is not below n. So the
    filters of a layer depend on all that was drawn before; `key` is ignored.

    Quirks, which KeyedPatterns repairs: the start of an lbp ring is drawn from nine values, of
    which the last is the first again; in a kernel larger than 3x3 the ring lies in the top left
    corner; the position of a haar rectangle ignores its size, so the last row and column are used
    less and larger kernels cut it off; the second rectangle covers the first, which leaves a
    quarter of the 3x3 filters with one sign.
    """

    version = "original-1"
    unit_gain = False

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**32:
            raise ModelError(f"seed of the original patterns is 0 to {2**32 - 1}, not {seed}")
        self.seed = seed
        self.position = 0
        self._generator = np.random.RandomState(seed)
        self._ahead = np.empty(0, np.uint32)

    def check(self, family: Family, kernel: int) -> None:
        """Raise ModelError for a kernel that no network of the paper has."""
        if family in ("lbp", "haar") and kernel not in (3, 5):
            raise ModelError(
                f"the original has {family} patterns of 3x3 and 5x5, not {kernel}x{kernel}; "
                "mode=fixed has them"
            )

    def ring_corner(self, kernel: int) -> int:
        """The ring is in the top left corner."""
        return 0

    def draw(self, family: Family, shape: Shape, key: str = "") -> Patterns:
        """Return the next patterns of the stream."""
        filters, kernel = shape[0] * shape[1], shape[2]
        draw: dict[Family, Callable[[], Patterns]] = {
            "lbp": lambda: self._local_binary(filters, kernel),
            "haar": lambda: self._haar(filters, kernel),
            "ternary": lambda: self._ternary(filters * kernel**2),
            "binary01": lambda: self._bits(filters * kernel**2),
            "points": lambda: 1 - 2 * self._bits(filters * kernel**2),
        }
        return draw[family]().reshape(shape)

    def code_bits(self, family: Family, shape: Shape) -> int:
        """Return the bits of the codes: for haar patterns, the bits of their draws."""
        if family == "haar":
            return shape[0] * shape[1] * (1 + 6 * bits_below(shape[2] - 1))
        return _code_bits(family, shape)

    def peek(self, words: int) -> NDArray[np.uint32]:
        """Return the next words of the stream, and leave them in it."""
        missing = words - len(self._ahead)
        if missing > 0:
            # All of uint32 is the one range for which RandomState gives its words as they are.
            more = self._generator.randint(0, 2**32, size=missing, dtype=np.uint32)
            self._ahead = np.concatenate([self._ahead, more])
        return self._ahead[:words]

    def _take(self, words: int) -> NDArray[np.uint32]:
        taken = self.peek(words)
        self.position += words
        self._ahead = self._ahead[words:]
        return taken

    def _bits(self, count: int) -> Patterns:
        return (self._take(count) & 1).astype(np.int8)

    def _ternary(self, count: int) -> Patterns:
        """Take words until enough of them have low bits 0, 1 or 2; 3 is dropped."""
        words = count
        accepted = np.empty(0, np.intp)
        while len(accepted) < count:
            words += words // 2 + 16
            values = (self.peek(words) & 3).astype(np.int8)
            accepted = np.flatnonzero(values < 3)[:count]
        self._take(int(accepted[-1]) + 1)
        return values[accepted] - 1

    def _local_binary(self, filters: int, kernel: int) -> Patterns:
        """Per filter: words until the start is below nine, a word of length, as many of signs."""
        words = 6 * filters + 64
        while (starts := self._starts(self.peek(words), filters)) is None:
            words *= 2
        stream = self.peek(words)
        start, length = stream[starts] & 7, stream[starts + 1] & 3
        signs = sum((stream[starts + 2 + i] & 1) << i for i in range(4))
        self._take(int(starts[-1] + 3 + length[-1]))
        return ring_table(kernel, self.ring_corner(kernel))[start, length, signs]

    @staticmethod
    def _starts(stream: NDArray[np.uint32], filters: int) -> NDArray[np.intp] | None:
        """Find the word that starts each filter, or None where the words do not reach so far."""
        end = len(stream) - 6  # from here on, words of a filter may be missing
        positions = np.arange(len(stream), dtype=np.int32)
        accepted = np.where((stream & 15) < 9, positions, np.int32(len(stream)))
        accepted = np.minimum.accumulate(accepted[::-1])[::-1]
        # Where the filter after one that starts at a position starts.
        following = accepted[positions[3 : end + 3] + (stream[1 : end + 1] & 3)].tolist()
        starts = []
        position = int(accepted[0])
        for _ in range(filters):
            if position >= end:
                return None
            starts.append(position)
            position = following[position]
        return np.array(starts)

    def _haar(self, filters: int, kernel: int) -> Patterns:
        """Per filter seven words: height, width, sign, and a row and a column of each rectangle."""
        draws = self._take(7 * filters).reshape(filters, 7).astype(np.int64)
        sign = (2 * (draws[:, 2] & 1) - 1).astype(np.int8)[:, None, None]
        draws &= kernel - 2  # kernel - 1 is a power of two: no word is dropped
        height, width = 1 + draws[:, 0], 1 + draws[:, 1]
        first = boxes(draws[:, 3], draws[:, 4], height, width, kernel)
        second = boxes(draws[:, 5], draws[:, 6], height, width, kernel)
        return sign * np.where(second, np.int8(1), -first)


class KeyedPatterns:
    """Patterns with the original's quirks repaired, from a generator of their own for each layer.

    The generator is Philox, keyed by the seed, the name of the layer and the family: a bank does
    not depend on what else is drawn, nor on the order. Repaired: all eight starts of an lbp ring
    are alike; the ring lies in the middle of a larger kernel; a haar rectangle lies anywhere in the
    kernel; the two rectangles differ, and cancel where they overlap, so each filter has both signs
    and sums to zero. Banks are scaled to unit gain.
    """

    version = "keyed-1"
    unit_gain = True
    position = 0

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def check(self, family: Family, kernel: int) -> None:
        """Raise ModelError for a kernel too small for the family."""
        if kernel < {"lbp": 3, "haar": 2}.get(family, 1):
            raise ModelError(f"there are no {family} patterns of {kernel}x{kernel}")

    def ring_corner(self, kernel: int) -> int:
        """The ring is in the middle."""
        return (kernel - 3) // 2

    def draw(self, family: Family, shape: Shape, key: str) -> Patterns:
        """Return the patterns of a layer."""
        filters, kernel = shape[0] * shape[1], shape[2]
        draws_per_filter = {"lbp": 1, "haar": 4}.get(family, kernel**2)
        draws = self._draws(filters * draws_per_filter, f"{family} {key}")
        if family == "lbp":
            table = ring_table(kernel, self.ring_corner(kernel))
            patterns = table[draws & 7, draws >> 3 & 3, draws >> 5 & 15]
        elif family == "haar":
            patterns = self._haar(draws.reshape(4, filters), kernel)
        elif family == "ternary":
            patterns = (_below(3, draws) - 1).astype(np.int8)
        elif family == "binary01":
            patterns = _below(2, draws).astype(np.int8)
        else:
            patterns = (1 - 2 * _below(2, draws)).astype(np.int8)
        return patterns.reshape(shape)

    def code_bits(self, family: Family, shape: Shape) -> int:
        """Return the bits of the codes: for haar patterns, the number of the pair of rectangles."""
        if family == "haar":
            sides = range(2, shape[2] + 1)  # the number of places for each extent
            places = [rows * columns for rows in sides for columns in sides]
            return shape[0] * shape[1] * bits_below(sum(n * (n - 1) for n in places))
        return _code_bits(family, shape)

    def _draws(self, count: int, key: str) -> _Integers:
        """Return numbers below 2**16, from the raw words of Philox, which NumPy will not change."""
        digest = hashlib.sha256(f"{self.version} {self.seed} {key}".encode()).digest()
        generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        words = generator.random_raw(-(-count // 4))
        shifts = np.array([0, 16, 32, 48], np.uint64)
        return (words[:, None] >> shifts & np.uint64(0xFFFF)).astype(np.int64).ravel()[:count]

    @staticmethod
    def _haar(draws: _Integers, kernel: int) -> Patterns:
        height = 1 + _below(kernel - 1, draws[0])
        width = 1 + _below(kernel - 1, draws[1])
        columns = kernel - width + 1
        places = (kernel - height + 1) * columns
        first = _below(places, draws[2])
        second = (first + 1 + _below(places - 1, draws[3])) % places
        box = [boxes(p // columns, p % columns, height, width, kernel) for p in (first, second)]
        return box[1] - box[0]


def _below(bound: int | _Integers, draws: _Integers) -> _Integers:
    """Map numbers below 2**16 to numbers below a bound, all alike to 1 in 2**16 / bound."""
    return draws * bound >> 16


def _code_bits(family: Family, shape: Shape) -> int:
    outputs, inputs, rows, columns = shape
    if family == "lbp":
        return 7 * outputs * inputs  # the number of one of 72 patterns
    weights = outputs * inputs * rows * columns
    return -(-8 * weights // 5) if family == "ternary" else weights  # five trits in a byte
