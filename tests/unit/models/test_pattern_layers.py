from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import fold, profile
from models.pattern_layers import (
    FrozenConv2d,
    GroupedFrozenConv2d,
    MixedConv2d,
    SplitFrozenConv2d,
    frozen_convolution,
)
from models.patterns import (
    Bank,
    Family,
    KeyedPatterns,
    OriginalPatterns,
    Patterns,
    PatternSource,
    Shape,
)

BOTH: tuple[Family, ...] = ("lbp", "haar")
POINTS: tuple[Family, ...] = ("points",)


def bank_of(source: PatternSource, shape: Shape, groups: int = 1) -> Bank:
    return Bank(source, BOTH, shape, "layer", groups)


def layer_of(bank: Bank, stride: int = 1, padding: int = 1, bias: bool = False) -> FrozenConv2d:
    channels, kernel = bank.shape[1] * bank.groups, bank.shape[2]
    like = nn.Conv2d(channels, bank.shape[0], kernel, stride, padding, bias=bias)
    return frozen_convolution(bank, like.double(), like.bias)


def images(channels: int, size: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    shape = (2, channels, size, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def assert_same_map(ours: Tensor, reference: Tensor, inputs: Tensor) -> None:
    """Equal outputs, and equal gradients of the input."""
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view(ours.shape)
    gradients = [
        torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True)[0]
        for output in (ours, reference)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def two_branches(
    inputs: Tensor, lbp: Patterns, haar: Patterns, stride: int, padding: int, groups: int = 1
) -> Tensor:
    """The original: a convolution of each kind of patterns, and their maps one after the other."""
    weights = [torch.from_numpy(patterns).double() for patterns in (lbp, haar)]
    maps = [functional.conv2d(inputs, w, None, stride, padding, groups=groups) for w in weights]
    return torch.cat(maps, dim=1)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [2, 6, 8, 58, 64])
def test_paired_channels_are_the_two_branches_of_the_original_in_another_order(
    channels: int, stride: int, kernel: int
) -> None:
    groups, padding = channels // 2, kernel // 2
    layer = layer_of(
        bank_of(OriginalPatterns(42), (channels, 2, kernel, kernel), groups), stride, padding
    )
    assert isinstance(layer, GroupedFrozenConv2d) == (channels in (6, 8, 64))
    source = OriginalPatterns(42)
    shape = (groups, 2, kernel, kernel)
    lbp, haar = source.draw("lbp", shape), source.draw("haar", shape)
    inputs = images(channels)
    expected = two_branches(inputs, lbp, haar, stride, padding, groups)
    ours = layer(inputs)
    assert_same_map(torch.cat([ours[:, 0::2], ours[:, 1::2]], dim=1), expected, inputs)
    assert_same_map(layer.folded()(inputs), ours, inputs)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_large_kernel_split_in_two_is_the_whole_one(
    original: bool, padding: int, stride: int
) -> None:
    source = OriginalPatterns(42) if original else KeyedPatterns(42)
    layer = layer_of(bank_of(source, (33, 16, 5, 5)), stride, padding, bias=True)
    assert isinstance(layer, SplitFrozenConv2d) == (original or padding > 0)
    inputs = images(16)
    bias = layer.bias
    expected = functional.conv2d(inputs, layer.weight, bias, stride, padding)
    assert_same_map(layer(inputs), expected, inputs)
    assert_same_map(layer.folded()(inputs), expected, inputs)


@pytest.mark.parametrize("channels", [3, 8, 64])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("outputs", [10, 96])
@pytest.mark.parametrize("mix_groups", [1, 2])
def test_a_mixed_bank_is_the_block_of_the_original_folded_or_not(
    channels: int, kernel: int, outputs: int, mix_groups: int
) -> None:
    half = 3 if channels == 3 else channels // 2
    shape = (2 * half, channels, kernel, kernel)
    families = POINTS if kernel == 1 else BOTH
    bank = layer_of(Bank(OriginalPatterns(42), families, shape, "layer"), padding=1)
    mix = nn.Conv2d(2 * half, outputs, 1, groups=mix_groups, dtype=torch.float64)
    block = MixedConv2d(bank, mix)
    source = OriginalPatterns(42)
    branch = (half, channels, kernel, kernel)
    lbp, haar = (source.draw(family, branch) for family in (families[0], families[-1]))
    inputs = images(channels)
    expected = mix(two_branches(inputs, lbp, haar, stride=1, padding=1))
    assert_same_map(block(inputs), expected, inputs)
    folded = block.folded()
    assert_same_map(folded(inputs), expected, inputs)
    fewer = outputs * channels * kernel**2 <= bank.weight.numel() + mix.weight.numel()
    assert type(folded) is (nn.Conv2d if fewer else nn.Sequential)


def test_training_never_touches_a_bank_nor_keeps_state_for_it() -> None:
    bank = layer_of(bank_of(KeyedPatterns(0), (8, 4, 3, 3)))
    network = nn.Sequential(MixedConv2d(bank, nn.Conv2d(8, 5, 1, dtype=torch.float64)))
    before = bank.weight.clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        optimizer.zero_grad()
        network(images(4)).square().mean().backward()
        optimizer.step()
    assert torch.equal(bank.weight, before)
    assert bank.weight.grad is None
    assert len(optimizer.state) == 2  # the mix and its bias


def test_a_checkpoint_holds_the_digest_of_a_bank_and_not_the_bank() -> None:
    layer = layer_of(bank_of(KeyedPatterns(0), (8, 4, 3, 3)))
    assert {name: value.dtype for name, value in layer.state_dict().items()} == {
        "bank_sha256": torch.uint8
    }
    other = layer_of(bank_of(KeyedPatterns(0), (8, 4, 3, 3)))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize(
    "other",
    [
        bank_of(KeyedPatterns(1), (8, 4, 3, 3)),
        bank_of(OriginalPatterns(0), (8, 4, 3, 3)),
        Bank(KeyedPatterns(0), BOTH, (8, 4, 3, 3), "another"),
        Bank(KeyedPatterns(0), ("haar",), (8, 4, 3, 3), "layer"),
    ],
)
def test_what_was_learned_on_another_bank_is_refused(other: Bank) -> None:
    network = nn.Sequential(layer_of(bank_of(KeyedPatterns(0), (8, 4, 3, 3))))
    stored = nn.Sequential(layer_of(other)).state_dict()
    with pytest.raises(RuntimeError, match="0 was learned on another bank of patterns"):
        network.load_state_dict(stored)
    # The refusal leaves the digest: a second attempt is refused as well.
    with pytest.raises(RuntimeError, match="another bank"):
        network.load_state_dict(stored)


def test_a_network_without_data_draws_no_patterns() -> None:
    source = OriginalPatterns(42)
    with torch.device("meta"):
        like = nn.Conv2d(4, 8, 3, padding=1)
    layer = frozen_convolution(bank_of(source, (8, 4, 3, 3)), like, None)
    assert all(tensor.is_meta for tensor in layer.buffers())
    assert source.peek(1)[0] == 1608637542
    assert layer(torch.empty(1, 4, 6, 6, device="meta")).shape == (1, 8, 6, 6)


def test_copies_and_pickles_keep_the_bank() -> None:
    layer = layer_of(bank_of(KeyedPatterns(0), (8, 2, 3, 3), groups=4))
    inputs = images(8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(inputs), layer(inputs))
        assert torch.equal(twin.used_weight(), layer.used_weight())


def test_a_factor_on_the_bank_changes_nothing_behind_a_norm() -> None:
    layer = layer_of(bank_of(OriginalPatterns(0), (8, 4, 3, 3)))
    mix = nn.Conv2d(8, 6, 1, dtype=torch.float64)
    norm = nn.BatchNorm2d(6, eps=1e-20, dtype=torch.float64)
    block = nn.Sequential(MixedConv2d(layer, mix), norm)
    results = []
    for factor in (1.0, 0.1, 0.1):
        layer.weight.mul_(factor)
        output = block(images(4))
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        results.append((output, torch.autograd.grad((output * weights).sum(), mix.weight)[0]))
    for first, second in pairwise(results):
        torch.testing.assert_close(first[0], second[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(first[1], second[1], rtol=1e-10, atol=1e-10)


def test_storage_tells_that_the_bank_is_frozen_and_what_its_codes_take() -> None:
    storage = layer_of(bank_of(OriginalPatterns(0), (8, 4, 5, 5), 1)).weight_storage()
    assert (storage.scheme, storage.count, storage.levels) == ("patterns", 800, 3)
    assert (storage.frozen, storage.code_bits) == (True, 16 * 7 + 16 * 13)
    points = Bank(OriginalPatterns(0), ("points",), (8, 4, 1, 1), "head")
    assert (points.storage().levels, points.storage().code_bits) == (2, 32)


def test_every_form_compiles_into_one_graph_and_exports_for_any_batch() -> None:
    network = nn.Sequential(
        layer_of(bank_of(KeyedPatterns(0), (16, 2, 3, 3), groups=8)),
        MixedConv2d(
            layer_of(bank_of(KeyedPatterns(0), (16, 16, 5, 5)), padding=2),
            nn.Conv2d(16, 4, 1, groups=2, dtype=torch.float64),
        ),
    )
    assert isinstance(network[0], GroupedFrozenConv2d)
    assert isinstance(network[1].bank, SplitFrozenConv2d)
    inputs = images(16)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_same_map(compiled(inputs), network(inputs), inputs)
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (inputs.detach(),), dynamic_shapes=batch)
    more = torch.cat([inputs, inputs, inputs]).detach()
    torch.testing.assert_close(program.module()(more), network(more))


@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_without_a_bank_takes_no_learned_values(assign: bool) -> None:
    def network() -> nn.Module:
        like = nn.Conv2d(4, 8, 3)
        bank = Bank(KeyedPatterns(0), BOTH, (8, 4, 3, 3), "layer")
        return nn.Sequential(frozen_convolution(bank, like, like.bias))

    stored = network().state_dict()
    with torch.device("meta"):
        empty = network()
    for without_bank in (empty, copy.deepcopy(empty).to_empty(device="cpu")):
        with pytest.raises(RuntimeError, match=r"0 was built without data .* on its device"):
            without_bank.load_state_dict(stored, assign=assign)


@pytest.mark.parametrize("outputs", [4, 96])
def test_a_network_in_channels_last_layout_folds(outputs: int) -> None:
    bank = layer_of(bank_of(KeyedPatterns(0), (8, 4, 3, 3)))
    mix = nn.Conv2d(8, outputs, 1, groups=2, dtype=torch.float64)
    block = MixedConv2d(bank, mix)
    for tensor in (bank.weight, mix.weight):
        tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    inputs = images(4)
    assert_same_map(fold(block)(inputs), block(inputs), inputs)


@pytest.mark.parametrize(("size", "kernel", "macs"), [(1, 3, 32), (2, 5, 4 * 16 * 2 * 9)])
def test_fused_groups_leave_out_taps_that_see_only_padding(
    size: int, kernel: int, macs: int
) -> None:
    layer = layer_of(
        bank_of(KeyedPatterns(0), (16, 2, kernel, kernel), groups=8), padding=kernel // 2
    )
    assert isinstance(layer, GroupedFrozenConv2d)
    inputs = images(16, size)
    expected = functional.conv2d(inputs, layer.weight, padding=kernel // 2, groups=8)
    assert_same_map(layer(inputs), expected, inputs)
    assert profile(nn.Sequential(layer), size).macs == macs
