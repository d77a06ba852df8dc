"""Codes, codebooks, masks and pattern codes against plain arithmetic, one value at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import ModelError, create_model
from models.masks import WeightMask, random_mask
from models.packing.banks import decode_patterns, encode_patterns, filter_scales
from models.packing.codebook import find_codebook, values_of
from models.packing.codes import (
    INVALID,
    code_bytes,
    decode_digits,
    decode_values,
    encode_digits,
)
from models.packing.masks import describe_mask, read_mask
from models.pattern_layers import FrozenConv2d
from models.storage import CODES, Storage

repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def written(digits: list[int], format: str) -> bytes:
    """The code by its definition, with Python's integers of any length."""
    code = CODES[format]
    if code.weights == 1:  # a stream of bits is one number, its first digit the lowest
        number = sum(digit << code.bits * place for place, digit in enumerate(digits))
        return number.to_bytes(math.ceil(len(digits) * code.bits / 8), "little")
    groups = [digits[i : i + code.weights] for i in range(0, len(digits), code.weights)]
    numbers = (sum(d * code.levels**i for i, d in enumerate(group)) for group in groups)
    return b"".join(number.to_bytes(code.bits // 8, "little") for number in numbers)


@st.composite
def coded_digits(draw: st.DrawFn) -> tuple[str, list[int]]:
    format = draw(st.sampled_from(sorted(CODES)))
    digit = st.integers(0, CODES[format].levels - 1)
    return format, draw(st.lists(digit, max_size=70))


@repeatable
@given(coded_digits())
def test_digits_are_written_as_their_code_says_and_read_again(
    coded: tuple[str, list[int]],
) -> None:
    format, digits = coded
    codes = encode_digits(np.array(digits, np.uint8), format)
    assert codes.tobytes() == written(digits, format)
    assert len(codes) == code_bytes(len(digits), format)
    assert len(codes) == Storage("any", len(digits), levels=2).stored_bytes(format)
    assert decode_digits(codes, format, len(digits)).tolist() == digits
    values = np.linspace(-1, 1, CODES[format].levels, dtype=np.float32)
    read = decode_values(codes, format, len(digits), values)
    assert read.dtype == np.float32
    assert np.array_equal(read, values[digits])


@pytest.mark.parametrize(
    ("format", "word"), [("5-trit", b"\xf3"), ("5-trit", b"\xff"), ("base-9", b"\xa9\xe6")]
)
def test_a_word_that_no_digits_give_is_told(format: str, word: bytes) -> None:
    codes = np.frombuffer(word, np.uint8)
    assert (decode_digits(codes, format, 5) == INVALID).all()
    assert np.isnan(decode_values(codes, format, 5, np.ones(9, np.float32))).all()
    below = int.from_bytes(word, "little") - 1
    if word != b"\xff":  # these are the first that are too large
        largest = np.frombuffer(below.to_bytes(len(word), "little"), np.uint8)
        assert (decode_digits(largest, format, 5) == CODES[format].levels - 1).all()


magnitudes = st.floats(2.0**-20, 2.0**20, width=32)


@st.composite
def quantized_weights(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None, int, int]:
    """A weight, its mask or none, and the levels and scales that its quantizer would state."""
    filters, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["signs", "bits", "magnitudes", "by filter", "free"]))
    terms = draw(st.sampled_from([1, 2, 4]))
    zero = draw(st.booleans())
    by_filter = kind == "by filter"
    tables = []
    for _ in range(filters if by_filter else 1):
        scale = st.lists(magnitudes, min_size=terms, max_size=terms)
        scales = draw(scale if kind != "free" else st.lists(magnitudes, min_size=2, max_size=2))
        if kind == "free":  # two values of any sign
            signs = draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=2, max_size=2))
            tables.append([0.0, *(scale * sign for scale, sign in zip(scales, signs, strict=True))])
        elif kind == "bits":
            tables.append([0.0, 1.0])
        else:
            scales = [1.0] if kind == "signs" else scales
            tables.append([*scales, *(-scale for scale in scales), *([0.0] if zero else [])])
    rows = [
        draw(st.lists(st.sampled_from(tables[row % len(tables)]), min_size=inputs, max_size=inputs))
        for row in range(filters)
    ]
    kept = draw(st.none() | st.lists(st.booleans(), min_size=inputs, max_size=inputs))
    mask = None if kept is None else torch.tensor([kept] * filters)
    levels = {"signs": 2 + zero, "bits": 2, "free": 3}.get(kind, 2 * terms + zero)
    counts = {"signs": 0, "bits": 0, "free": 2, "magnitudes": terms, "by filter": terms * filters}
    return torch.tensor(rows), mask, levels, counts[kind]


@repeatable
@given(quantized_weights())
def test_a_weight_is_the_values_of_its_digits(
    quantized: tuple[torch.Tensor, torch.Tensor | None, int, int],
) -> None:
    weight, mask, levels, scales = quantized
    codebook, found, digits = find_codebook(weight, mask, levels, scales)
    assert len(found) == scales
    table = values_of(codebook, levels, found, len(weight))
    assert table.shape[1] <= levels
    for row, column in itertools.product(*map(range, weight.shape)):
        if mask is None or mask[row, column]:
            digit = int(digits[row, column])
            assert table[row if len(table) > 1 else 0, digit] == weight[row, column]


@pytest.mark.parametrize(
    ("weight", "levels", "scales"),
    [
        ([[0.5, -0.25, 0.0]], 3, 1),  # two magnitudes and one scale
        ([[0.5, 0.25, 0.0, 0.125]], 3, 2),  # three values and two scales
        ([[0.5, 0.0, -0.5]], 2, 1),  # zero is a third level
        ([[1.0, 0.5, -1.0]], 3, 0),  # no scale, and not signs
        ([[1.0, 2.0], [3.0, 1.0]], 2, 2),
        ([[float("nan"), 1.0]], 3, 1),
    ],
)
def test_a_weight_with_other_values_than_it_states_is_refused(
    weight: list[list[float]], levels: int, scales: int
) -> None:
    with pytest.raises(ModelError, match="the weight has other values than"):
        find_codebook(torch.tensor(weight), None, levels, scales)


SPARSE = ["sparse", "sparse-psd2p16", "sparse-ps1p9", "sparse-psc4", "sparse-psc2", "sparse-psc1"]


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("backbone", ["lenet5", "mobilenetv2(width=0.25)"])
def test_a_mask_goes_round_in_the_bits_that_it_states(backbone: str, method: str) -> None:
    network = create_model(backbone, method, num_classes=10, image_size=32)
    masks = [module for module in network.modules() if isinstance(module, WeightMask)]
    assert masks
    for mask in masks:
        kind, description = describe_mask(mask)
        assert kind["kind"] == ("random" if "psc" in method else "periodic")
        assert len(description) == math.ceil(mask.bank_bits / 8)
        read = read_mask(kind, description, tuple(mask.full().shape), mask.bank_bits)
        assert torch.equal(read.float(), mask.full())


@pytest.mark.parametrize(("kernel", "positions"), [(3, 1), (3, 2), (3, 4), (5, 2)])
def test_the_index_of_a_random_kernel_is_its_place_among_all_subsets(
    kernel: int, positions: int
) -> None:
    shape = torch.Size((4, 3, kernel, kernel))
    mask = random_mask(shape, positions, torch.Generator().manual_seed(0))
    # Subsets by their largest position, those alike by their second largest, and so on.
    subsets = itertools.combinations(range(kernel**2), positions)
    places = {subset: i for i, subset in enumerate(sorted(subsets, key=lambda s: s[::-1]))}
    bits = (len(places) - 1).bit_length()
    stream = int.from_bytes(describe_mask(mask)[1].tobytes(), "little")
    for number, kernel_mask in enumerate(mask.full().reshape(12, -1)):
        index = stream >> number * bits & (1 << bits) - 1
        assert index == places[tuple(kernel_mask.nonzero().flatten().tolist())]


def test_a_mask_of_no_known_kind_is_refused() -> None:
    period = torch.ones(2, 3, 3, 3)
    period[0, 1, 2, 2] = 0
    with pytest.raises(ModelError, match="the mask is not one that 18 bits describe"):
        describe_mask(WeightMask(period, 4, bank_bits=18))


BANKS = [
    ("vgg11", "step"),
    ("vgg11", "step(mode=original)"),
    ("mobilenetv2(width=0.25)", "step"),
    pytest.param("alexnet", "step(families=haar, stem=plain)", marks=pytest.mark.slow),  # 11x11
    ("stepnet(original=true)", "step(mode=original)"),
    ("lenet5", "step(families=lbp)"),
    ("lenet5", "step(mode=original)"),
]


@pytest.mark.parametrize(("backbone", "method"), BANKS)
def test_pattern_codes_take_the_bits_that_they_state_and_give_the_bank(
    backbone: str, method: str
) -> None:
    size = 64 if backbone == "alexnet" else 32
    network = create_model(backbone, method, num_classes=10, image_size=size)
    banks: list[nn.Module] = [m for m in network.modules() if isinstance(m, FrozenConv2d)]
    coded = 0
    for bank in banks:
        assert isinstance(bank, FrozenConv2d) and bank.origin is not None
        if not set(bank.origin["families"]) <= {"lbp", "haar"}:
            continue
        coded += 1
        scales = filter_scales(bank.origin, len(bank.weight))
        patterns = (bank.weight / scales).to(torch.int8).numpy()
        codes = encode_patterns(patterns, bank.origin)
        bits = bank.weight_storage().code_bits
        assert bits is not None and len(codes) == math.ceil(bits / 8)
        read = torch.from_numpy(decode_patterns(codes, bank.origin, patterns.shape))
        assert torch.equal(read * scales, bank.weight)
    assert coded


def test_a_bank_with_a_pattern_of_no_family_is_refused() -> None:
    network = create_model("lenet5", "step", num_classes=10, image_size=32)
    bank = next(m for m in network.modules() if isinstance(m, FrozenConv2d))
    assert bank.origin is not None
    patterns = np.ones(bank.weight.shape, np.int8)
    with pytest.raises(ModelError, match="patterns that are not of the family lbp"):
        encode_patterns(patterns, bank.origin)
