from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import ModelError, apply_method, fold, quantized_layers
from models.layers import CompressedConv2d, CompressedLinear, TrimmedConv2d, compress
from models.masks import WeightMask
from models.ternary_quantizers import TernaryQuantizer

FACTORS = {1: (0.05,), 2: (0.05, 0.10), 4: (0.05, 0.10, 0.15, 0.20)}


def golden_layer() -> nn.Conv2d:
    layer = nn.Conv2d(3, 2, 3, stride=2, padding=1, dtype=torch.float64)
    k = torch.arange(54, dtype=torch.float64)
    ramp = (0.3 * torch.sin(1.7 * k) * torch.cos(0.31 * k)).view(2, 3, 3, 3)
    layer.load_state_dict({"weight": ramp, "bias": torch.tensor([0.25, -0.5], dtype=torch.float64)})
    return layer


@pytest.mark.parametrize(
    ("expansion", "total", "first", "weight_gradient", "bias_gradient"),
    [
        (
            1,
            -2.229163634373723,
            0.10625737725147834,
            0.03097622877,
            [3.94947539979, -8.40780266854],
        ),
        (
            2,
            -4.459096940090435,
            0.3540650612980057,
            1.53794777598,
            [16.20027307289, -34.03666083325],
        ),
        (
            4,
            -8.893896064401318,
            0.7059622297391102,
            11.36370034798,
            [67.96847251066, -139.11964102587],
        ),
    ],
)
def test_golden_convolution_of_the_reference_code(
    expansion: int, total: float, first: float, weight_gradient: float, bias_gradient: list[float]
) -> None:
    net = nn.Sequential(golden_layer())
    apply_method(net, f"ternary(expansion={expansion}, original=true)")
    layer = net[0]
    assert isinstance(layer, CompressedConv2d)
    images = torch.cos(0.37 * torch.arange(75, dtype=torch.float64)).view(1, 3, 5, 5)
    output = net(images)
    output.square().sum().backward()
    assert output.sum().item() == pytest.approx(total, abs=1e-12)
    assert output[0, 0, 0, 0].item() == pytest.approx(first, abs=1e-12)
    assert layer.weight.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert layer.weight.grad.sum().item() == pytest.approx(weight_gradient, abs=1e-10)
    assert layer.bias.grad.tolist() == pytest.approx(bias_gradient, abs=1e-10)


def test_bias_is_added_once_by_default_and_once_per_branch_in_the_original() -> None:
    images = torch.zeros(1, 3, 5, 5, dtype=torch.float64)
    for method, times in (("ternary-x4", 1), ("ternary-x4(original=true)", 4)):
        output = apply_method(nn.Sequential(golden_layer()), method)(images)
        assert output[0, :, 0, 0].tolist() == [0.25 * times, -0.5 * times]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, padding="same", groups=4, bias=False),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 2), dilation=2, padding_mode="circular"),
        nn.Linear(5, 3),
        nn.Linear(5, 3, bias=False),
    ],
)
@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_layer_equals_the_functional_form_with_the_quantized_weight(
    layer: nn.Conv2d | nn.Linear, expansion: int
) -> None:
    quantizer = TernaryQuantizer(FACTORS[expansion])
    result = compress(layer, weight_quantizer=quantizer)
    reference = nn.Sequential(layer)
    shape = (2, 4, 7, 5) if isinstance(layer, nn.Conv2d) else (2, 5)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = {"0.weight": quantizer(layer.weight)}
    expected = torch.func.functional_call(reference, weights, inputs)
    assert torch.equal(result(inputs), expected)
    assert torch.equal(result.folded()(inputs), expected)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(5, 3)])
def test_a_folded_layer_adds_the_bias_as_often_as_forward_did(
    layer: nn.Conv2d | nn.Linear,
) -> None:
    net = apply_method(nn.Sequential(layer), "ternary(expansion=4, original=true)")
    assert layer.bias is not None
    zeros = torch.zeros((1, 4, 3, 3) if isinstance(layer, nn.Conv2d) else (1, 5))
    torch.testing.assert_close(fold(net)(zeros).flatten(), 4 * layer.bias)
    inputs = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fold(net)(inputs), net(inputs))


@pytest.mark.parametrize(("method", "kept"), [("ternary", True), ("ternary(original=true)", False)])
def test_a_weight_at_the_negative_edge_is_kept_but_in_the_original(method: str, kept: bool) -> None:
    layer = nn.Linear(4, 1, bias=False)
    weight = torch.tensor([[1.0, 0.05, -0.05, -0.3]])
    weight[0, 1], weight[0, 2] = 0.05 * weight.max(), -(0.05 * weight.max())
    layer.load_state_dict({"weight": weight})
    ((_, quantized),) = quantized_layers(apply_method(nn.Sequential(layer), method))
    signs = quantized.used_weight().sign()
    assert signs.tolist() == [[1, 1, -1 if kept else 0, -1]]


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3), nn.Linear(4, 5, bias=False)])
def test_a_quantized_layer_owns_the_same_parameters_under_the_same_keys(
    layer: nn.Conv2d | nn.Linear,
) -> None:
    layer.eval()
    result = compress(layer, weight_quantizer=TernaryQuantizer())
    assert list(result.state_dict()) == list(layer.state_dict())
    for ours, theirs in zip(result.parameters(), layer.parameters(), strict=True):
        assert ours is theirs
    assert not result.training
    result.load_state_dict(layer.state_dict(), strict=True)


def test_a_folded_layer_is_plain_and_shares_no_memory() -> None:
    layer = compress(nn.Linear(4, 5), weight_quantizer=TernaryQuantizer())
    plain = layer.folded()
    assert type(plain) is nn.Linear
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_making_a_layer_draws_no_random_numbers() -> None:
    layer = nn.Conv2d(2, 3, 3)
    state = torch.get_rng_state()
    compress(layer, weight_quantizer=TernaryQuantizer()).folded()
    assert torch.equal(torch.get_rng_state(), state)


def test_input_gradient_uses_the_used_weight() -> None:
    layer = compress(nn.Linear(4, 3, bias=False), weight_quantizer=TernaryQuantizer())
    inputs = torch.randn(2, 4, requires_grad=True)
    upstream = torch.randn(2, 3)
    layer(inputs).backward(upstream)
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, upstream @ layer.used_weight().detach())


def test_channels_last_weights_stay_channels_last() -> None:
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    kernel = compress(layer, weight_quantizer=TernaryQuantizer()).used_weight()
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_step_of_training_is_the_step_on_the_latent_weight() -> None:
    layer = compress(nn.Linear(3, 2, bias=False), weight_quantizer=TernaryQuantizer())
    assert isinstance(layer, CompressedLinear)
    before = layer.weight.detach().clone()
    inputs, upstream = torch.randn(5, 3), torch.randn(5, 2)
    layer(inputs).backward(upstream)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    expected: Tensor = before - 0.1 * functional.linear(upstream.T, inputs.T)
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (2, 1), (5, 5)])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 3), (5, 1, 1), (7, 2, 1)]
)
def test_a_trimmed_convolution_is_the_plain_one_in_value_and_gradient(
    size: tuple[int, int], kernel: int, stride: int, groups: int
) -> None:
    layer = TrimmedConv2d(
        3, 6, kernel, stride, padding=kernel // 2, groups=groups, dtype=torch.float64
    )
    plain, ternary = layer.folded(), compress(layer, weight_quantizer=TernaryQuantizer())
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for ours, theirs in ((layer, plain), (ternary, ternary.folded())):
        torch.testing.assert_close(ours(images), theirs(images))
    layer(images).square().sum().backward()
    plain(images).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
    assert type(plain) is nn.Conv2d


def test_a_layer_takes_one_quantizer() -> None:
    layer = compress(nn.Linear(3, 2), weight_quantizer=TernaryQuantizer())
    with pytest.raises(ModelError, match="already has a weight quantizer"):
        compress(layer, weight_quantizer=TernaryQuantizer())


def test_a_mask_that_is_added_leaves_what_the_layer_has_and_is_told_in_one_line_if_it_has_one() -> (
    None
):
    mask = WeightMask(torch.tensor([1.0, 0, 1, 0]).view(1, 4, 1, 1), filters=2, bank_bits=4)
    quantizer = TernaryQuantizer((0.05, 0.1))
    layer = compress(nn.Conv2d(4, 2, 1), weight_quantizer=quantizer, bias_terms=2, clip=1.0)
    masked = compress(layer, mask=mask)
    assert (masked.weight_quantizer, masked.bias_terms, masked.clip) == (quantizer, 2, 1.0)
    with pytest.raises(ModelError, match="already has a mask") as caught:
        compress(masked, mask=mask)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("padding", [1, (0, 2), (3, 1), "same"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_replicated_borders_are_those_of_torch_in_value_and_gradient(
    padding: int | str | tuple[int, int], kernel: int | tuple[int, int]
) -> None:
    layer = TrimmedConv2d(
        3, 4, kernel, padding=padding, padding_mode="replicate", dtype=torch.float64
    )
    plain = layer.folded()
    assert type(plain) is nn.Conv2d
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(images), plain(images)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, [images, *layer.parameters()], upstream),
        torch.autograd.grad(theirs, [images, *plain.parameters()], upstream),
    )
    torch.testing.assert_close(layer(images[0]), plain(images[0]))


@pytest.mark.slow
def test_replicated_borders_have_a_gradient_under_the_default_compiler() -> None:
    torch.compiler.reset()
    first = nn.Conv2d(4, 4, 3)
    second = TrimmedConv2d(4, 4, 3, padding=1, padding_mode="replicate")
    model = nn.Sequential(first, second)
    images = torch.randn(2, 4, 9, 9)
    eager = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    traced = torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)
