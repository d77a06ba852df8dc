from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.binary_quantizers import BinaryQuantizer, TernarySignQuantizer, binarize
from models.layers import compress
from models.masks import WeightMask
from models.quantizers import WeightQuantizer


def binarize_as_the_authors(x: Tensor) -> Tensor:
    return ((x + 1) / 2).clamp(0, 1).round() * 2 - 1


def ternarize_as_the_authors(x: Tensor, factor: float) -> Tensor:
    threshold = x.abs().sum() / x.numel() * factor
    return (x > threshold).float() - (x < -threshold).float()


def test_zero_is_negative_and_the_dead_zone_is_that_of_float32() -> None:
    values = torch.tensor([-2, -1, -1e-9, -0.0, 0, 1e-45, 1e-9, 2**-24, 6e-8, 1e-3, 1, 2])
    signs = torch.tensor([-1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1]).float()
    assert torch.equal(binarize(values), signs)
    assert torch.equal(binarize(values, dead_zone=True), binarize_as_the_authors(values))
    assert binarize(values, dead_zone=True)[6:9].tolist() == [-1, -1, 1]
    assert binarize(torch.tensor(float("nan"))).isnan()


def test_ternary_signs_of_the_paper() -> None:
    weight = torch.tensor([-0.9, -0.1, 0.1, 0.9, 0.35, 0])
    assert TernarySignQuantizer()(weight).tolist() == [-1, 0, 0, 1, 1, 0]
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TernarySignQuantizer()(weight), ternarize_as_the_authors(weight, 0.7))


@pytest.mark.parametrize("quantizer", [BinaryQuantizer(), TernarySignQuantizer()])
def test_the_gradient_passes_unchanged_also_beyond_one(quantizer: WeightQuantizer) -> None:
    weight = torch.tensor([-3, -1, -0.2, 0, 0.2, 1, 3], requires_grad=True)
    upstream = torch.arange(7.0)
    quantizer(weight).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 7)])
def test_xnor_scale_and_gradient_are_those_of_the_paper(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, upstream = (torch.randn(shape, generator=generator).double() for _ in range(2))
    ours = weight.clone().requires_grad_()
    result = BinaryQuantizer(scale="xnor")(ours)
    result.backward(upstream)
    assert ours.grad is not None
    for one, g, quantized, grad in zip(weight, upstream, result, ours.grad, strict=True):
        alpha = one.abs().mean()
        torch.testing.assert_close(quantized, alpha * one.sign())
        inside = (one.abs() <= 1).double()
        torch.testing.assert_close(grad, g * (1 / one.numel() + inside * alpha))


@pytest.mark.slow
def test_a_compiled_scale_is_rounded_too() -> None:
    torch.compiler.reset()
    quantizer = BinaryQuantizer(scale="xnor", exact_sums=True)
    weight = torch.randn(16, 27, generator=torch.Generator().manual_seed(8))
    result = torch.compile(lambda weight: quantizer(weight), fullgraph=True)(weight)
    assert torch.equal(result, result.bfloat16().float())
    torch.testing.assert_close(result, quantizer(weight), rtol=2**-7, atol=0)


def test_sums_of_rounded_scales_are_exact_in_any_order() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(64, 4608, generator=generator)
    inputs = torch.randn(16, 4608, generator=generator).sign()
    plain = BinaryQuantizer(scale="xnor")(weight)
    rounded = BinaryQuantizer(scale="xnor", exact_sums=True)(weight)
    assert torch.equal(rounded, plain.bfloat16().float())
    order = torch.randperm(4608, generator=generator)
    sums = inputs @ rounded.T
    assert torch.equal(inputs[:, order] @ rounded[:, order].T, sums)
    assert torch.equal(sums == 0, inputs @ binarize(weight).T == 0)
    assert (sums == 0).any()


@pytest.mark.parametrize("quantizer", [BinaryQuantizer(scale="xnor"), TernarySignQuantizer()])
def test_weights_under_a_mask_do_not_count(quantizer: WeightQuantizer) -> None:
    generator = torch.Generator().manual_seed(2)
    kept = torch.zeros(4, 3, 3, 3)
    kept[:, :, 1, 1:] = 1
    mask = WeightMask(kept, filters=4, bank_bits=0)
    layer = compress(nn.Conv2d(3, 4, 3), mask=mask, weight_quantizer=quantizer)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 3, 3, 3, generator=generator) * kept)
    used = layer.used_weight()
    assert used[kept == 0].count_nonzero() == 0
    # The same weights as a dense layer of two taps.
    dense = layer.weight.detach()[:, :, 1:2, 1:].contiguous()
    torch.testing.assert_close(used[:, :, 1:2, 1:], quantizer(dense))


@pytest.mark.parametrize(
    "quantizer", [BinaryQuantizer(), BinaryQuantizer(scale="xnor"), TernarySignQuantizer()]
)
def test_compiled_weights_and_gradients_are_the_eager_ones(quantizer: WeightQuantizer) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda weight: quantizer(weight), fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(3)
    weight, upstream = (torch.randn(9, 7, generator=generator) for _ in range(2))
    eager, traced = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    expected, result = quantizer(eager), compiled(traced)
    assert torch.equal(result, expected)
    expected.backward(upstream)
    result.backward(upstream)
    assert eager.grad is not None and traced.grad is not None
    assert torch.equal(traced.grad, eager.grad)


@pytest.mark.parametrize(
    ("kernel", "height", "width"), [(3, 5, 7), (2, 4, 5), (4, 5, 6), (5, 3, 1)]
)
def test_replicate_same_convolution_is_the_loop_over_clamped_indices(
    kernel: int, height: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    layer = compress(
        nn.Conv2d(2, 3, kernel, padding="same", bias=False),
        weight_quantizer=BinaryQuantizer(),
        padding_mode="replicate",
    )
    images = torch.randn(1, 2, height, width, generator=generator).sign()
    expected = torch.zeros(1, 3, height, width)
    before = (kernel - 1) // 2  # an odd total puts one more row at the bottom, column at the right
    for y in range(height):
        for x in range(width):
            for i in range(kernel):
                for j in range(kernel):
                    row = min(max(y + i - before, 0), height - 1)
                    column = min(max(x + j - before, 0), width - 1)
                    expected[0, :, y, x] += (
                        layer.used_weight()[:, :, i, j] @ images[0, :, row, column]
                    )
    assert torch.equal(layer(images), expected)
