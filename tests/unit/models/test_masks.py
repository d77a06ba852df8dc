from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.masks import WeightMask, kernel_supports, periodic_mask, random_mask

SUPPORTS = {
    4: ["110110000", "011011000", "000110110", "000011011"],
    2: ["110000000", "011000000", "000110000", "000011000", "000000110", "000000011"],
    1: [f"{1 << position:09b}" for position in range(8, -1, -1)],
}
# Output and input channels of the convolutions of VGG16 behind the first.
VGG16 = [(64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256)]
VGG16 += [(512, 256)] + 5 * [(512, 512)]


def bank(positions: int, period: int | None) -> Tensor:
    """The supports of each phase, with full kernels if a period is given."""
    supports = kernel_supports((3, 3), positions)
    if period is None:
        return supports.roll(1, 0)
    repeats = supports.repeat(period, 1, 1)
    return torch.cat((torch.ones(1, 3, 3), repeats))[:period]


def bits(kernel: Tensor) -> str:
    return "".join(str(int(value)) for value in kernel.flatten())


def by_rule(filter: int, channel: int, positions: int, period: int | None) -> str:
    """The published rule for one kernel."""
    variants = SUPPORTS[positions]
    phase = (filter + channel + 1) % (period or len(variants))
    if period is not None and phase == 0:
        return "111111111"
    return variants[(phase - 1) % len(variants)]


@pytest.mark.parametrize("positions", [1, 2, 4])
def test_supports_of_a_3x3_kernel_are_those_of_the_paper(positions: int) -> None:
    assert [bits(support) for support in kernel_supports((3, 3), positions)] == SUPPORTS[positions]


def test_supports_of_other_kernels_are_formed_in_the_same_way() -> None:
    assert [len(kernel_supports((5, 5), positions)) for positions in (1, 2, 4)] == [25, 20, 16]
    assert [bits(support) for support in kernel_supports((1, 3), 2)] == ["110", "011"]
    assert len(kernel_supports((1, 7), 4)) == len(kernel_supports((3, 1), 2)) == 0


@pytest.mark.parametrize(("filters", "channels"), [(16, 16), (7, 3), (20, 10), (4, 1)])
@pytest.mark.parametrize(
    ("positions", "period"), [(4, 8), (4, 16), (2, 8), (1, 16), (4, None), (2, None), (1, None)]
)
def test_each_kernel_has_the_support_of_its_phase(
    positions: int, period: int | None, filters: int, channels: int
) -> None:
    mask = periodic_mask(filters, channels, bank(positions, period))
    full = mask.full()
    expected = [[by_rule(o, i, positions, period) for i in range(channels)] for o in range(filters)]
    assert [[bits(kernel) for kernel in row] for row in full] == expected
    ones = [sum(kernel.count("1") for kernel in row) for row in expected]
    assert mask.kept_per_filter().flatten().tolist() == ones
    assert mask.kept == sum(ones)
    assert mask.bank_bits == 9 * (period or len(SUPPORTS[positions]))


def test_published_first_kernels() -> None:
    psd2p8 = periodic_mask(8, 8, bank(2, 8)).full()
    first = [*SUPPORTS[2], "110000000", "111111111"]
    assert [bits(kernel) for kernel in psd2p8[0]] == first
    assert [bits(kernel) for kernel in psd2p8[1]] == first[1:] + first[:1]


@pytest.mark.parametrize(
    ("positions", "period", "kept"), [(2, 8, 4_700_352), (4, 8, 7_560_384), (4, 16, 7_049_664)]
)
def test_published_weights_of_vgg16(positions: int, period: int, kept: int) -> None:
    masks = [periodic_mask(*channels, bank(positions, period)) for channels in VGG16]
    assert 64 * 3 * 9 + sum(mask.kept for mask in masks) == kept


def test_a_random_mask_keeps_as_many_positions_of_every_kernel_and_follows_its_seed() -> None:
    shape = torch.Size((24, 10, 3, 3))
    one, same, other = (
        random_mask(shape, 2, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert one.full().shape == shape
    assert one.full().sum((2, 3)).eq(2).all()
    assert one.kept == 480
    assert torch.equal(one.full(), same.full())
    assert not torch.equal(one.full(), other.full())
    assert one.bank_bits == 240 * 6  # an index into 36 pairs of positions
    share = one.full().mean((0, 1)).flatten()
    assert share.sub(2 / 9).abs().max() < 0.1  # every position alike


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("filters", [16, 12])
def test_the_mask_acts_on_the_gradient_and_leaves_value_and_layout(
    filters: int, layout: torch.memory_format
) -> None:
    mask = periodic_mask(filters, 6, bank(2, 8))
    weight = torch.randn(filters, 6, 3, 3).contiguous(memory_format=layout).requires_grad_()
    same = mask.mask_gradient(weight)
    assert same.data_ptr() == weight.data_ptr()
    images = torch.randn(2, 6, 5, 5).contiguous(memory_format=layout)
    functional.conv2d(images, same).square().sum().backward()
    plain = weight.detach().clone().requires_grad_()
    functional.conv2d(images, plain).square().sum().backward()
    assert weight.grad is not None
    assert plain.grad is not None
    assert torch.equal(weight.grad, plain.grad * mask.full())
    assert weight.grad.stride() == weight.stride()


def test_masking_the_gradient_leaves_the_incoming_one_alone() -> None:
    mask = periodic_mask(8, 8, bank(1, 8))
    upstream = torch.ones(8, 8, 3, 3)
    mask.mask_gradient(torch.randn(8, 8, 3, 3, requires_grad=True)).backward(upstream)
    assert upstream.eq(1).all()


@pytest.mark.parametrize("filters", [16, 12])
def test_masked_values_and_masking_in_place_are_the_product(filters: int) -> None:
    mask = periodic_mask(filters, 5, bank(4, 8))
    weight = torch.randn(filters, 5, 3, 3)
    expected = weight * mask.full()
    assert torch.equal(mask.mask_value(weight), expected)
    mask.mask_in_place(weight)
    assert torch.equal(weight, expected)


def test_compiled_gradient_is_the_eager_one() -> None:
    torch.compiler.reset()
    mask = periodic_mask(8, 4, bank(4, 4))
    compiled = torch.compile(
        lambda weight: mask.mask_gradient(weight).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    compiled(weight).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * weight.detach() * mask.full())


def test_a_mask_is_not_saved_and_survives_copies_and_precision() -> None:
    mask = periodic_mask(8, 4, bank(2, None))
    assert mask.state_dict() == {}
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(other.full(), mask.full())
        assert other.kept == mask.kept
    assert mask.double().full().dtype == torch.float64


def test_kept_weights_are_known_without_memory_for_the_weights() -> None:
    with torch.device("meta"):
        periodic = periodic_mask(16, 16, kernel_supports((3, 3), 4))
        drawn = random_mask(torch.Size((4, 4, 3, 3)), 1, torch.Generator().manual_seed(0))
    assert (periodic.kept, drawn.kept) == (1024, 16)


def test_a_mask_keeps_its_values_when_the_network_loses_its_own() -> None:
    mask = periodic_mask(16, 16, kernel_supports((3, 3), 4))
    full = mask.full()
    assert torch.equal(mask.to("meta").full(), full)
    assert torch.equal(mask.to_empty(device="cpu").full(), full)
    assert mask.half().full().dtype == torch.float16


@pytest.mark.parametrize(("kernel", "positions"), [((1, 3), 2), ((2, 2), 2), ((3, 3), 4)])
def test_the_masks_with_the_fewest_zeros_contradict_another_one_and_dense_weights_none(
    kernel: tuple[int, int], positions: int
) -> None:
    supports = kernel_supports(kernel, positions)
    full = torch.ones_like(supports[:1])
    mask = periodic_mask(8, 8, torch.cat((full, supports[:1])))
    other = periodic_mask(8, 8, torch.cat((full, supports[-1:])))
    weight = torch.randn(8, 8, *kernel)
    assert not other.contradicts(weight)
    assert not mask.contradicts(mask.mask_value(weight))
    assert other.contradicts(mask.mask_value(weight))


def test_a_period_that_does_not_divide_the_filters_is_cut() -> None:
    period = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1)
    assert WeightMask(period, 4, bank_bits=3).full().flatten().tolist() == [1, 0, 0, 1]
