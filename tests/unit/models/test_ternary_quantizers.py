from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.masks import WeightMask
from models.quantizers import WeightQuantizer
from models.ternary_quantizers import (
    TernaryQuantizer,
    TernaryWeightNetworkQuantizer,
    TrainedTernaryQuantizer,
)

FACTORS = {1: (0.05,), 2: (0.05, 0.10), 4: (0.05, 0.10, 0.15, 0.20)}
GOLDEN_WEIGHT = [-1, -0.21, -0.16, -0.12, -0.07, -0.03, 0, 0.03, 0.07, 0.12, 0.16, 0.21, 1]


def by_loop(weight: Tensor, factor: float) -> Tensor:
    """The definition, entry by entry, in double precision."""
    values = weight.double().flatten().tolist()
    # Delta is formed in the weight's own precision, since entries may lie exactly on it.
    delta = float(factor * weight.abs().max())
    kept = [abs(value) for value in values if abs(value) >= delta]
    scale = sum(kept) / len(kept)
    ternary = [scale if v >= delta else -scale if v <= -delta else 0.0 for v in values]
    return torch.tensor(ternary, dtype=torch.float64).view(weight.shape)


def straight_through_branch(weight: Tensor, factor: float) -> Tensor:
    """One ternary branch by the detach trick: value of the definition, gradient masked at 1."""
    inside = (weight.detach().abs() < 1).to(weight.dtype)
    identity = weight * inside
    return by_loop(weight.detach(), factor).to(weight.dtype) + identity - identity.detach()


@pytest.mark.parametrize("shape", [(7, 11), (4, 3, 3, 3)])
@pytest.mark.parametrize("factor", [0.05, 0.1, 0.15, 0.2])
def test_ternary_weight_is_the_definition_taken_entry_by_entry(
    shape: tuple[int, ...], factor: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = TernaryQuantizer((factor,))(weight)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), by_loop(weight, factor), rtol=0, atol=2e-7)
    exact = TernaryQuantizer((factor,))(weight.double())
    torch.testing.assert_close(exact, by_loop(weight.double(), factor), rtol=0, atol=1e-15)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("factor", [0.05, 0.1, 0.15, 0.2])
def test_entries_on_both_edges_count_and_are_kept_but_for_the_negative_one_if_strict(
    factor: float, strict: bool
) -> None:
    weight = 0.05 * torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(2))
    delta = factor * weight.abs().max()
    weight[0, 0, 0, 0], weight[0, 0, 0, 1] = delta, -delta
    expected = by_loop(weight, factor)
    assert expected[0, 0, 0, 0] == -expected[0, 0, 0, 1] > 0
    if strict:
        expected[0, 0, 0, 1] = 0
    result = TernaryQuantizer((factor,), strict_negative_edge=strict)(weight)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1.5e-8)


def test_golden_scales_of_the_single_thresholds() -> None:
    weight = torch.tensor(GOLDEN_WEIGHT, dtype=torch.float64)
    scales = [TernaryQuantizer((b,))(weight).max().item() for b in FACTORS[4]]
    assert scales == pytest.approx([0.312, 0.3725, 1.37 / 3, 0.605], abs=1e-12)


@pytest.mark.parametrize(
    ("expansion", "positive_half"),
    [
        (1, [0, 0, 0.312, 0.312, 0.312, 0.312, 0.312]),
        (2, [0, 0, 0.312, 0.6845, 0.6845, 0.6845, 0.6845]),
        (4, [0, 0, 0.312, 0.6845, 0.6845 + 1.37 / 3, 1.2895 + 1.37 / 3, 1.2895 + 1.37 / 3]),
    ],
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_golden_summed_kernels(
    expansion: int, positive_half: list[float], dtype: torch.dtype, atol: float
) -> None:
    weight = torch.tensor(GOLDEN_WEIGHT, dtype=dtype)
    expected = torch.tensor([-v for v in positive_half[:0:-1]] + positive_half, dtype=dtype)
    result = TernaryQuantizer(FACTORS[expansion])(weight)
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)
    assert result.unique().numel() == 2 * expansion + 1


@pytest.mark.parametrize(
    ("factor", "scale", "nonzero"),
    [
        (0.05, 0.14382496235, 46),
        (0.10, 0.14952032015, 44),
        (0.15, 0.15487567684, 42),
        (0.20, 0.16595103116, 38),
    ],
)
def test_golden_ramp(factor: float, scale: float, nonzero: int) -> None:
    k = torch.arange(54, dtype=torch.float64)
    weight = (0.3 * torch.sin(1.7 * k) * torch.cos(0.31 * k)).view(2, 3, 3, 3)
    result = TernaryQuantizer((factor,))(weight)
    assert result.max().item() == pytest.approx(scale, abs=1e-11)
    assert int(result.count_nonzero()) == nonzero


@pytest.mark.parametrize(("strict", "at_negative_edge"), [(True, 0.0), (False, -0.32)])
def test_an_entry_at_minus_delta_is_kept_unless_the_edge_is_strict(
    strict: bool, at_negative_edge: float
) -> None:
    weight = torch.tensor([1, 0.05, -0.05, 0.049, -0.049, -0.2, 0.3])
    weight[1], weight[2] = 0.05 * weight.max(), -(0.05 * weight.max())
    result = TernaryQuantizer(strict_negative_edge=strict)(weight)
    expected = torch.tensor([0.32, 0.32, at_negative_edge, 0, 0, -0.32, 0.32])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_the_largest_magnitude_may_be_negative() -> None:
    result = TernaryQuantizer()(torch.tensor([-2, 0.11, -0.11, 0.09, 0.5]))
    expected = torch.tensor([-0.68, 0.68, -0.68, 0, 0.68])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("factors", FACTORS.values())
def test_an_all_zero_weight_stays_zero(factors: tuple[float, ...], strict: bool) -> None:
    result = TernaryQuantizer(factors, strict)(torch.zeros(3, 4))
    assert torch.equal(result, torch.zeros(3, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_not_hidden(bad: float) -> None:
    result = TernaryQuantizer()(torch.tensor([0.5, bad, -0.1]))
    assert not result.isfinite().all()


def test_quantizing_a_ternary_kernel_again_changes_nothing() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kernel = TernaryQuantizer()(weight)
    torch.testing.assert_close(TernaryQuantizer()(kernel), kernel, rtol=0, atol=1e-12)


@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_gradient_is_passed_strictly_inside_one_and_scaled_by_the_branches(
    expansion: int,
) -> None:
    weight = torch.tensor([-1.5, -1, -0.999, -0.3, 0, 0.01, 0.3, 0.999, 1, 1.5])
    weight.requires_grad_()
    upstream = torch.arange(1.0, 11.0)
    TernaryQuantizer(FACTORS[expansion])(weight).backward(upstream)
    expected = expansion * torch.tensor([0.0, 0, 3, 4, 5, 6, 7, 8, 0, 0])
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("expansion", [2, 4])
def test_one_summed_kernel_equals_separate_branches_in_value_and_gradient(expansion: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64) * 0.6
    images = torch.randn(2, 4, 9, 9, generator=generator, dtype=torch.float64)
    ours = weight.clone().requires_grad_()
    theirs = weight.clone().requires_grad_()
    output = functional.conv2d(images, TernaryQuantizer(FACTORS[expansion])(ours))
    branches = [
        functional.conv2d(images, straight_through_branch(theirs, b)) for b in FACTORS[expansion]
    ]
    reference = torch.stack(branches).sum(0)
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-12)
    output.relu().square().sum().backward()
    reference.relu().square().sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_autocast_and_half_weights_are_quantized_in_float32() -> None:
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = TernaryQuantizer()(weight)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, TernaryQuantizer()(weight))
    half = weight.bfloat16()
    result = TernaryQuantizer()(half)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, TernaryQuantizer()(half.float()).bfloat16())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("factors", FACTORS.values())
def test_compiled_value_and_gradient_are_the_eager_ones(
    factors: tuple[float, ...], strict: bool
) -> None:
    quantizer = TernaryQuantizer(factors, strict)
    compiled = torch.compile(lambda weight: quantizer(weight), fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(5)
    weight, upstream = (torch.randn(9, 7, generator=generator) for _ in range(2))
    eager, traced = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    kernel, expected = compiled(traced), quantizer(eager)
    assert torch.equal(kernel, expected)
    kernel.backward(upstream)
    expected.backward(upstream)
    assert eager.grad is not None
    assert traced.grad is not None
    assert torch.equal(traced.grad, eager.grad)


def test_no_value_is_read_back_to_the_host() -> None:
    meta = torch.empty(8, 3, 3, 3, device="meta", requires_grad=True)
    kernel = TernaryQuantizer(FACTORS[4])(meta)
    kernel.sum().backward()
    assert kernel.is_meta
    assert meta.grad is not None


@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_each_branch_adds_two_levels_and_a_scale(expansion: int) -> None:
    quantizer = TernaryQuantizer(FACTORS[expansion])
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(6))
    assert quantizer.levels == quantizer(weight).unique().numel() == 2 * expansion + 1
    assert quantizer.scales(weight) == expansion


def mean_rule_by_loop(weight: Tensor) -> Tensor:
    """The rule of ternary weight networks, entry by entry."""
    values = weight.flatten().tolist()
    delta = 0.7 * sum(map(abs, values)) / len(values)
    kept = [abs(value) for value in values if abs(value) > delta]
    alpha = sum(kept) / len(kept)
    ternary = [alpha if v > delta else -alpha if v < -delta else 0.0 for v in values]
    return torch.tensor(ternary, dtype=weight.dtype).view(weight.shape)


@pytest.mark.parametrize("shape", [(7, 11), (4, 3, 3, 3)])
def test_the_rule_of_ternary_weight_networks_entry_by_entry(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weight.requires_grad_()
    kernel = TernaryWeightNetworkQuantizer()(weight)
    torch.testing.assert_close(kernel, mean_rule_by_loop(weight), rtol=0, atol=1e-14)
    upstream = torch.randn(shape, dtype=torch.float64)
    kernel.backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


def test_golden_ternary_weight_network() -> None:
    # Mean 0.5, so Delta 0.35: kept are 1, -0.6 and 0.8, with mean 0.8.
    weight = torch.tensor([1.0, -0.6, 0.8, 0.3, -0.3, 0.0], dtype=torch.float64)
    kernel = TernaryWeightNetworkQuantizer()(weight)
    expected = torch.tensor([0.8, -0.8, 0.8, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-15)


def test_weights_under_a_mask_do_not_count_in_the_mean() -> None:
    period = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 3)
    weight = torch.randn(8, 1, 1, 3, generator=torch.Generator().manual_seed(8)) * period
    kernel = TernaryWeightNetworkQuantizer()(weight, WeightMask(period, 8, bank_bits=3))
    assert kernel[..., 2].eq(0).all()
    torch.testing.assert_close(kernel[..., :2], mean_rule_by_loop(weight[..., :2]))


def trained(weight: Tensor, positive: float, negative: float) -> TrainedTernaryQuantizer:
    quantizer = TrainedTernaryQuantizer(weight)
    scales = {"positive": torch.tensor(positive), "negative": torch.tensor(negative)}
    quantizer.load_state_dict(scales)
    return quantizer


def test_trained_scales_start_at_the_mean_magnitude_of_their_side() -> None:
    weight = torch.tensor([1.0, 0.5, 0.05, -0.05, -0.2, 0.0])  # Delta 0.05 is outside both sides
    quantizer = TrainedTernaryQuantizer(weight)
    assert quantizer.positive.item() == pytest.approx(0.75)
    assert quantizer.negative.item() == pytest.approx(0.2)
    assert TrainedTernaryQuantizer(weight.abs()).negative.item() == 0


def test_golden_trained_ternary_value_and_gradients() -> None:
    weight = torch.tensor([1.0, 0.5, 0.04, 0.0, -0.04, -0.5, -1.0], requires_grad=True)
    quantizer = trained(weight, positive=3.0, negative=2.0)
    kernel = quantizer(weight)
    assert kernel.tolist() == [3, 3, 0, 0, 0, -2, -2]
    kernel.backward(torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [3, 6, 3, 4, 5, 12, 14]
    assert quantizer.positive.grad == 3
    assert quantizer.negative.grad == -13


def test_gradients_of_the_trained_scales_are_finite_differences() -> None:
    generator = torch.Generator().manual_seed(9)
    weight, upstream = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    quantizer = TrainedTernaryQuantizer(weight)

    def loss(positive: Tensor, negative: Tensor) -> Tensor:
        scales = {"positive": positive, "negative": negative}
        kernel = torch.func.functional_call(quantizer, scales, weight)
        return (upstream * kernel).sum()

    scales = [p.detach().clone().requires_grad_() for p in quantizer.parameters()]
    assert torch.autograd.gradcheck(loss, scales)


OTHER_RULES: dict[str, Callable[[Tensor], WeightQuantizer]] = {
    "twn": lambda weight: TernaryWeightNetworkQuantizer(),
    "ttq": TrainedTernaryQuantizer,
}


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_the_other_rules_hide_nothing_keep_zeros_and_compute_in_float32(rule: str) -> None:
    zeros = torch.zeros(3, 4)
    assert torch.equal(OTHER_RULES[rule](zeros)(zeros), zeros)
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = torch.tensor([0.5, bad, -0.1])
        assert not OTHER_RULES[rule](torch.ones(3))(weight).isfinite().all()
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(10)).bfloat16()
    quantizer = OTHER_RULES[rule](weight.float())
    result = quantizer(weight)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, quantizer(weight.float()).bfloat16())
    assert result.unique().numel() == quantizer.levels == 3


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_the_other_rules_compile_to_their_eager_value_and_gradient(rule: str) -> None:
    generator = torch.Generator().manual_seed(11)
    weight, upstream = (torch.randn(9, 7, generator=generator) for _ in range(2))
    quantizer = OTHER_RULES[rule](weight)
    compiled = torch.compile(lambda weight: quantizer(weight), fullgraph=True, backend="eager")
    eager, traced = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    kernel, expected = compiled(traced), quantizer(eager)
    assert torch.equal(kernel, expected)
    kernel.backward(upstream)
    expected.backward(upstream)
    assert eager.grad is not None
    assert traced.grad is not None
    assert torch.equal(traced.grad, eager.grad)


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_the_other_rules_read_no_value_back_to_the_host(rule: str) -> None:
    meta = torch.empty(8, 3, 3, 3, device="meta", requires_grad=True)
    kernel = OTHER_RULES[rule](meta)(meta)
    kernel.sum().backward()
    assert kernel.is_meta
    assert meta.grad is not None
