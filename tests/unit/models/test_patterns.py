from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import pytest
from numpy.random import RandomState
from numpy.typing import NDArray

from models.calls import ModelError
from models.patterns import Bank, Family, KeyedPatterns, OriginalPatterns, Shape

RING = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]


def one_by_one(stream: RandomState, family: Family, shape: Shape) -> NDArray[np.int64]:
    """The patterns as the paper's text draws them: number by number, from a plain RandomState."""
    bank = np.zeros(shape, np.int64)
    kernel = shape[2]
    for filter in bank.reshape(-1, kernel, kernel):
        if family == "lbp":
            start, length = stream.randint(0, 9), 1 + stream.randint(0, 4)
            for i in range(length):
                sign = 2 * stream.randint(0, 2) - 1
                filter[RING[(start + i) % 8]] = sign
                filter[RING[(start + i + 4) % 8]] = -sign
        elif family == "haar":
            height, width = stream.randint(1, kernel), stream.randint(1, kernel)
            sign = 2 * stream.randint(0, 2) - 1
            for value in (-sign, sign):
                row, column = stream.randint(0, kernel - 1), stream.randint(0, kernel - 1)
                filter[row : row + height, column : column + width] = value
        elif family == "points":
            filter[:] = 1 - 2 * stream.randint(0, 2, size=(kernel, kernel))
        else:
            low, high = {"ternary": (-1, 2), "binary01": (0, 2)}[family]
            filter[:] = stream.randint(low, high, size=(kernel, kernel))
    return bank


def slices(patterns: NDArray[np.int8]) -> NDArray[np.int8]:
    return patterns.reshape(-1, *patterns.shape[2:])


REFERENCE: list[tuple[Family, Shape, str]] = [
    (
        "lbp",
        (2, 3, 3, 3),
        "-1 1 1 -1 0 1 -1 -1 1  -1 1 1 0 0 0 -1 -1 1  0 0 0 1 0 -1 0 0 0 "
        "1 -1 1 -1 0 1 -1 1 -1  1 1 1 1 0 -1 -1 -1 -1  -1 0 0 0 0 0 0 0 1",
    ),
    (
        "haar",
        (2, 3, 3, 3),
        "1 1 0 -1 -1 0 0 0 0  1 0 0 0 0 0 0 0 0  0 1 0 0 1 0 0 -1 0 "
        "0 0 0 0 1 1 0 0 0  0 1 1 0 -1 -1 0 -1 -1  -1 -1 0 0 0 0 0 0 0",
    ),
    (
        "haar",
        (2, 1, 5, 5),
        "0 0 0 0 0  0 0 0 0 0  0 0 1 1 1  -1 -1 -1 -1 1  -1 -1 -1 -1 1 "
        "0 0 0 0 0  0 0 0 0 0  0 0 1 1 1  0 0 0 0 0  0 0 0 0 0",
    ),
    ("lbp", (1, 1, 5, 5), "-1 1 1 0 0  -1 0 1 0 0  -1 -1 1 0 0  0 0 0 0 0  0 0 0 0 0"),
    ("points", (8, 1, 1, 1), "1 -1 1 1 1 -1 1 1"),
    ("ternary", (2, 8, 1, 1), "1 -1 1 1 -1 -1 1 0  1 1 1 1 -1 1 0 -1"),
]


@pytest.mark.parametrize(("family", "shape", "values"), REFERENCE)
def test_the_original_draws_the_reference_patterns(
    family: Family, shape: Shape, values: str
) -> None:
    patterns = OriginalPatterns(42).draw(family, shape)
    assert patterns.shape == shape
    assert patterns.ravel().tolist() == [int(value) for value in values.split()]


def test_the_stream_begins_with_the_reference_words() -> None:
    expected = [1608637542, 3421126067, 4083286876, 787846414]
    expected += [3143890026, 3348747335, 2571218620, 2563451924]
    assert OriginalPatterns(42).peek(8).tolist() == expected


@pytest.mark.parametrize("seed", [0, 42])
def test_the_original_reads_its_stream_as_one_that_draws_number_by_number(seed: int) -> None:
    source, stream = OriginalPatterns(seed), RandomState(seed)
    families: list[Family] = ["lbp", "haar", "ternary", "binary01", "points"]
    for outputs, family, kernel in product((1, 2, 7, 40), families, (3, 5)):
        shape = (outputs, 3, kernel, kernel)
        expected = one_by_one(stream, family, shape)
        assert (source.draw(family, shape) == expected).all(), (family, shape)
        assert source.peek(1)[0] & (2**31 - 1) == stream.randint(0, 2**31), (family, shape)
        source.draw("points", (1, 1, 1, 1))  # the word that was looked at


@pytest.mark.parametrize("source", [OriginalPatterns(1), KeyedPatterns(1)])
def test_lbp_patterns_are_the_72_antisymmetric_ones(source: OriginalPatterns) -> None:
    patterns = slices(source.draw("lbp", (50, 400, 3, 3), "layer"))
    assert (patterns == -patterns[:, ::-1, ::-1]).all()
    assert not patterns[:, 1, 1].any()
    assert not patterns.sum((1, 2)).any()
    assert len(np.unique(patterns, axis=0)) == 72
    assert np.count_nonzero(patterns) / len(patterns) == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize(
    ("source", "shares"),
    [(OriginalPatterns(3), [2 / 9] + 7 * [1 / 9]), (KeyedPatterns(3), 8 * [1 / 8])],
)
def test_starts_of_lbp_rings_are_alike_but_for_the_original_s_first(
    source: OriginalPatterns, shares: list[float]
) -> None:
    # A pattern of two cells tells where it starts: its sign and its cell, or the opposite ones.
    patterns = slices(source.draw("lbp", (80, 500, 3, 3), "layer"))
    pairs = patterns[np.abs(patterns).sum((1, 2)) == 2]
    at_start = [np.count_nonzero(pairs[:, row, column]) for row, column in RING[:4]]
    expected = [len(pairs) * (shares[cell] + shares[cell + 4]) for cell in range(4)]
    chi_square = sum((a - b) ** 2 / b for a, b in zip(at_start, expected, strict=True))
    assert chi_square < 16.3  # p = 0.001 with three degrees of freedom


def test_haar_patterns_of_the_original_are_as_its_text_counts_them() -> None:
    source = OriginalPatterns(5)
    before = source.peek(8 * 7 + 1)[-1]
    source.draw("haar", (4, 2, 3, 3))
    assert source.peek(1)[0] == before  # seven words each
    patterns = slices(source.draw("haar", (50, 400, 3, 3)))
    assert len(np.unique(patterns, axis=0)) == 100
    assert np.count_nonzero(patterns) / len(patterns) == pytest.approx(3.5, abs=0.05)
    one_signed = (patterns.min((1, 2)) == 0) | (patterns.max((1, 2)) == 0)
    assert one_signed.mean() == pytest.approx(0.25, abs=0.015)
    assert (patterns.sum((1, 2)) == 0).mean() == pytest.approx(0.4375, abs=0.015)
    assert (patterns != 0).mean(0)[[0, 1, 2], [0, 1, 2]] == pytest.approx(
        [0.4375, 0.7344, 0.1094], abs=0.015
    )


@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
def test_repaired_haar_patterns_have_two_signs_no_mean_and_no_favorite_side(kernel: int) -> None:
    patterns = slices(KeyedPatterns(5).draw("haar", (40, 500, kernel, kernel), "layer"))
    assert not patterns.sum((1, 2)).any()
    assert (patterns.max((1, 2)) == 1).all() and (patterns.min((1, 2)) == -1).all()
    share = (patterns != 0).mean(0)
    for turned in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - turned).max() < 0.02


def test_the_repaired_ring_is_in_the_middle_of_a_larger_kernel() -> None:
    small = KeyedPatterns(9).draw("lbp", (4, 4, 3, 3), "layer")
    large = KeyedPatterns(9).draw("lbp", (4, 4, 7, 7), "layer")
    assert (large[:, :, 2:5, 2:5] == small).all()
    assert np.count_nonzero(large) == np.count_nonzero(small)


@pytest.mark.parametrize(
    ("family", "values"), [("ternary", [-1, 0, 1]), ("binary01", [0, 1]), ("points", [-1, 1])]
)
def test_single_weights_are_alike(family: Family, values: list[int]) -> None:
    for source in (OriginalPatterns(0), KeyedPatterns(0)):
        found, counts = np.unique(source.draw(family, (300, 300, 1, 1), "a"), return_counts=True)
        assert found.tolist() == values
        assert counts / counts.sum() == pytest.approx(1 / len(values), abs=0.01)


def test_a_keyed_bank_depends_on_seed_name_and_family_and_on_nothing_else() -> None:
    def draw(seed: int, name: str, family: Family, rows: int = 6) -> list[int]:
        return KeyedPatterns(seed).draw(family, (rows, 7, 3, 3), name).ravel().tolist()

    first = draw(1, "a", "ternary")
    source = KeyedPatterns(1)
    source.draw("haar", (3, 3, 3, 3), "b")
    assert source.draw("ternary", (6, 7, 3, 3), "a").ravel().tolist() == first
    assert first not in (draw(2, "a", "ternary"), draw(1, "b", "ternary"))
    assert draw(1, "a", "lbp") != draw(1, "b", "lbp")


@pytest.mark.parametrize(
    ("family", "digest"),
    [("lbp", "4183a24c55b5ec13"), ("haar", "c4ced9bac79d7edc"), ("ternary", "777d369ffa868a87")],
)
def test_keyed_banks_never_change_since_checkpoints_hold_none(family: Family, digest: str) -> None:
    patterns = KeyedPatterns(42).draw(family, (16, 8, 3, 3), "layer1.0.conv1")
    assert hashlib.sha256(patterns.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("families", "groups", "names"),
    [
        (("lbp", "haar"), 1, "LLLHHH"),
        (("lbp", "haar"), 3, "LHLHLH"),
        (("lbp", "haar"), 6, "LHLHLH"),
        (("lbp", "haar"), 2, "LLHLHH"),
        (("haar",), 2, "HHHHHH"),
    ],
)
def test_filters_of_a_bank_stand_half_and_half_in_each_group(
    families: tuple[Family, ...], groups: int, names: str
) -> None:
    bank = Bank(KeyedPatterns(0), families, (6, 9, 3, 3), "layer", groups).draw()
    antisymmetric = (bank == -bank[:, :, ::-1, ::-1]).all((1, 2, 3))
    assert ["L" if is_lbp else "H" for is_lbp in antisymmetric] == list(names)


def test_unit_gain_is_a_power_of_two_and_the_original_has_none() -> None:
    for families in (("lbp", "haar"), ("ternary",)):
        bank = Bank(KeyedPatterns(0), families, (32, 100, 3, 3), "layer")
        scales = bank.scales(patterns := bank.draw())
        assert (np.log2(scales) % 1 == 0).all()
        gain = np.square(patterns * scales).sum((1, 2, 3)).mean()
        assert 0.5 <= gain <= 2
    original = Bank(OriginalPatterns(0), ("lbp", "haar"), (4, 100, 3, 3), "layer")
    assert (original.scales(original.draw()) == 1).all()


def test_code_bits_are_those_of_the_published_networks() -> None:
    source = OriginalPatterns(42)
    filters = 774_153  # of each kind in VGG16
    bits = sum(source.code_bits(family, (filters, 1, 3, 3)) for family in ("lbp", "haar"))
    assert round(bits / 8e6, 3) == 1.355
    assert source.code_bits("haar", (1, 1, 5, 5)) == 13
    assert source.code_bits("points", (128, 256, 1, 1)) == 128 * 256
    assert source.code_bits("ternary", (10, 10, 1, 1)) == 160


@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_code_bits_of_repaired_patterns_can_tell_all_of_them_apart(kernel: int) -> None:
    source = KeyedPatterns(0)
    for family in ("lbp", "haar"):
        drawn = np.unique(slices(source.draw(family, (40, 1000, kernel, kernel), "a")), axis=0)
        assert len(drawn) <= 2 ** source.code_bits(family, (1, 1, kernel, kernel))


def test_kernels_without_patterns_are_refused() -> None:
    with pytest.raises(ModelError, match="the original has haar patterns of 3x3 and 5x5, not 7x7"):
        Bank(OriginalPatterns(0), ("haar",), (2, 2, 7, 7), "layer")
    with pytest.raises(ModelError, match="there are no lbp patterns of 2x2"):
        Bank(KeyedPatterns(0), ("lbp", "haar"), (2, 2, 2, 2), "layer")
    with pytest.raises(ModelError, match="seed of the original"):
        OriginalPatterns(-1)


def test_the_digest_tells_scales_patterns_and_rules_apart() -> None:
    bank = Bank(KeyedPatterns(0), ("lbp", "haar"), (4, 4, 3, 3), "layer")
    grouped = Bank(KeyedPatterns(0), ("lbp", "haar"), (4, 4, 3, 3), "layer", groups=2)
    patterns = bank.draw()
    scales = bank.scales(patterns)
    digests = {
        bank.digest(patterns, scales),
        bank.digest(patterns, 2 * scales),
        bank.digest(-patterns, scales),
        grouped.digest(patterns, scales),
    }
    assert len(digests) == 4
