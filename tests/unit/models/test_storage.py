"""Sizes of stored weights against counting, and against the published sizes of frozen banks."""

from __future__ import annotations

import math

import pytest

from models import ModelError
from models.storage import CODES, FORMATS, Storage


@pytest.mark.parametrize(
    ("levels", "default"),
    [(2, "1-bit"), (3, "2-bit"), (4, "2-bit"), (5, "3-bit"), (9, "4-bit"), (16, "4-bit")],
)
def test_papers_count_the_shortest_code_of_whole_bits(levels: int, default: str) -> None:
    storage = Storage("any", 10, levels=levels)
    assert storage.published_format == default
    assert storage.bits(default) == 10 * math.ceil(math.log2(levels))


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6, 9, 10, 16, None])
def test_the_default_is_the_smallest_format_and_of_two_alike_the_earlier(
    levels: int | None,
) -> None:
    for count in (*range(1, 60), 1000, 2_359_296):
        storage = Storage("any", count, levels=levels)
        sizes = {name: storage.stored_bytes(name) for name in storage.formats}
        smallest = [name for name in FORMATS if sizes.get(name) == min(sizes.values())]
        assert storage.formats[0] == smallest[0]
        assert storage.stored_bytes() == min(sizes.values())


@pytest.mark.parametrize(
    ("levels", "format"), [(2, "1-bit"), (3, "5-trit"), (5, "3-bit"), (9, "base-9"), (16, "4-bit")]
)
def test_a_large_weight_is_stored_in_the_code_nearest_to_its_entropy(
    levels: int, format: str
) -> None:
    assert Storage("any", 36_864, levels=levels).formats[0] == format


@pytest.mark.parametrize("name", CODES)
def test_a_code_has_room_for_its_levels_and_no_bit_to_spare(name: str) -> None:
    code = CODES[name]
    assert 2 ** (code.bits - 1) < code.levels**code.weights <= 2**code.bits


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"2-bit": 1, "5-trit": 1, "3-bit": 1, "4-bit": 1, "base-9": 2, "float32": 4}),
        (5, {"2-bit": 2, "5-trit": 1, "3-bit": 2, "4-bit": 3, "base-9": 2, "float32": 20}),
        (6, {"2-bit": 2, "5-trit": 2, "3-bit": 3, "4-bit": 3, "base-9": 4, "float32": 24}),
        (27, {"2-bit": 7, "5-trit": 6, "3-bit": 11, "4-bit": 14, "base-9": 12, "float32": 108}),
    ],
)
def test_ternary_weights_take_whole_bytes_in_each_format(
    count: int, expected: dict[str, int]
) -> None:
    storage = Storage("ternary", count, levels=3)
    assert set(storage.formats) == set(expected)
    assert {name: storage.stored_bytes(name) for name in expected} == expected


def test_scales_stand_beside_codes_but_not_beside_floats() -> None:
    storage = Storage("ternary-x2", 8, levels=5, scales=2)
    assert storage.stored_bytes() == 3 + 2 * 4
    assert storage.stored_bytes("float32") == 8 * 4


def test_the_description_of_a_mask_is_stored_in_every_format() -> None:
    storage = Storage("sparse+ternary", 8, levels=3, scales=1, bank_bits=72)
    assert storage.stored_bytes() == 2 + 4 + 9
    assert Storage("sparse", 8, bank_bits=9).stored_bytes() == 32 + 2


def test_a_format_that_cannot_hold_the_weight_is_refused_with_those_that_can() -> None:
    with pytest.raises(ModelError, match=r"2-bit cannot hold ternary-x2 weights; .*3-bit, 4-bit"):
        Storage("ternary-x2", 8, levels=5).stored_bytes("2-bit")
    with pytest.raises(ModelError, match=r"seed cannot hold float32 weights; .*: float32$"):
        Storage("float32", 8).bits("seed")
    with pytest.raises(ModelError, match=r"unknown format '2bit' \(did you mean '2-bit'\?\)"):
        Storage("ternary", 8, levels=3).stored_bytes("2bit")
    assert set(Storage("patterns", 8, levels=2, frozen=True, code_bits=7).formats) == set(FORMATS)


def test_published_sizes_of_the_frozen_filters_of_a_step_vgg16() -> None:
    # 774,153 3x3 filters of each family, 7 bits each (STeP); megabytes of the 13,934,754 weights.
    bank = Storage("patterns", 13_934_754, levels=3, frozen=True, code_bits=2 * 774_153 * 7)
    sizes = {name: bank.bits(name) / 8e6 for name in bank.formats}
    assert round(sizes["float32"], 3) == 55.739
    assert round(sizes["2-bit"], 3) == 3.484
    assert round(sizes["5-trit"], 3) == 2.787
    assert round(sizes["patterns"], 3) == 1.355
    assert bank.stored_bytes() == bank.stored_bytes("seed") == 0


def test_a_format_that_is_not_possible_is_none_but_an_unknown_one_is_refused() -> None:
    ternary = Storage("ternary", 8, levels=3)
    assert [ternary.possible(name) for name in ("5-trit", "1-bit", None)] == ["5-trit", None, None]
    with pytest.raises(ModelError, match="unknown format '2bit'"):
        ternary.possible("2bit")
