from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.activations import ActivationQuantizer, Estimator, QuantizedActivation

ESTIMATORS = get_args(Estimator)


def activation(
    ternary: bool = False, estimator: Estimator = "bnn", original: bool = False
) -> QuantizedActivation:
    return QuantizedActivation(ActivationQuantizer(ternary, estimator, original=original))


def gradient(module: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    values = values.clone().requires_grad_()
    module(values).sum().backward()
    assert values.grad is not None
    return values.grad


def by_the_authors_procedure(values: Tensor, ternary: bool, estimator: Estimator) -> Tensor:
    """h by autograd, then the values swapped behind autograd's back."""
    match estimator:
        case "vanilla":
            output = values * 1
        case "bnn":
            output = functional.hardtanh(values)
        case "bireal":
            output = values.clamp(-1, 1)
            inside = output.detach().abs() != 1
            square = output.square() * -output.detach().sign()
            output = torch.where(inside, 2 * output + square, output)
        case "swish":
            sigmoid = torch.sigmoid(10 * values)
            output = 2 * sigmoid * (1 + 10 * values * (1 - sigmoid)) - 1
            output.data[output.data == 0] = values.data[output.data == 0]
    x = output.data.clone()
    if ternary:
        threshold = 0.4 * x.abs().sum() / x.numel()
        x[x > threshold] = 1
        x[x < -threshold] = -1
        x[x.abs() <= threshold] = 0
    else:
        x = ((x + 1) / 2).clamp(0, 1).round() * 2 - 1
    output.data = x
    return output


@pytest.mark.parametrize(
    ("estimator", "points", "expected"),
    [
        ("vanilla", [-1.5, 0, 1.5], [1, 1, 1]),
        ("bnn", [-1.5, -1, -0.999, 0, 0.999, 1, 1.5], [0, 0, 1, 1, 1, 0, 0]),
        ("bireal", [-1.5, -1, -0.5, 0, 0.25, 0.5, 1, 1.5], [0, 0, 1, 2, 1.5, 1, 0, 0]),
        (
            "swish",
            [0, 0.001, -0.001, 0.25, 0.5, -0.5, 1, -1],
            [10, 9.9995, 9.9995, -0.16924, -0.38998, -0.38998, -0.00726, -0.00726],
        ),
    ],
)
@pytest.mark.parametrize("ternary", [False, True])
def test_gradients_at_the_points_of_the_papers(
    estimator: Estimator, points: list[float], expected: list[float], ternary: bool
) -> None:
    result = gradient(activation(ternary, estimator), torch.tensor(points))
    torch.testing.assert_close(result, torch.tensor(expected).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_slope_is_the_derivative_of_the_transform(estimator: Estimator) -> None:
    quantizer = ActivationQuantizer(estimator=estimator, beta=3.0)
    points = torch.linspace(-1.9, 1.9, 400, dtype=torch.float64)  # no point is 0, 1 or -1
    step = 1e-6
    difference = quantizer.transform(points + step) - quantizer.transform(points - step)
    torch.testing.assert_close(
        quantizer.slope(points).double(), difference / (2 * step), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("ternary", [False, True])
def test_original_is_the_authors_procedure_in_value_and_gradient(
    estimator: Estimator, ternary: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 0.7 * torch.randn(5, 3, 4, 4, generator=generator)
    values.view(-1)[:8] = torch.tensor([0, 1, -1, 2, -2, 1e-9, 2**-24, 6e-8])
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    upstream = torch.randn(values.shape, generator=generator)
    result = activation(ternary, estimator, original=True)(ours)
    expected = by_the_authors_procedure(theirs, ternary, estimator)
    assert torch.equal(result, expected)
    result.backward(upstream)
    expected.backward(upstream)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_binary_values_are_the_signs_whatever_the_estimator(estimator: Estimator) -> None:
    values = torch.tensor([[-3, -1, -1e-9, -0.0, 0.0, 1e-45, 1e-9, 0.5, 1, 3]])
    expected = torch.tensor([[-1.0, -1, -1, -1, -1, 1, 1, 1, 1, 1]])
    assert torch.equal(activation(estimator=estimator)(values), expected)


def test_what_swish_rounds_to_zero_counts_by_its_own_sign_in_the_original() -> None:
    quantizer = ActivationQuantizer(estimator="swish", beta=1e-3, original=True)
    values = torch.tensor([2e-5, -2e-5])
    assert quantizer.transform(values).tolist() == [0, 0]
    assert quantizer.value(values).tolist() == [1, -1]


def test_ternary_values_of_the_paper() -> None:
    values = torch.tensor([[-0.9, -0.2, 0.1, 0.9, 0.2]])
    expected = torch.tensor([[-1.0, -1, 0, 1, 1]])
    for estimator in ("vanilla", "bnn"):
        assert torch.equal(activation(True, estimator)(values), expected)


def test_each_image_has_a_threshold_of_its_own_but_in_the_original() -> None:
    images = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images *= torch.logspace(-3, 0, 6).view(-1, 1, 1, 1)
    ours, original = activation(True), activation(True, original=True)
    alone = torch.cat([ours(image[None]) for image in images])
    assert torch.equal(ours(images), alone)
    assert torch.equal(alone, torch.cat([original(image[None]) for image in images]))
    assert not torch.equal(original(images), alone)


def test_a_threshold_above_one_clears_everything_in_the_original_only() -> None:
    values = torch.tensor([[5, -4, 3, 2.6, -0.1]])
    assert activation(True, "vanilla")(values).tolist() == [[1, -1, 1, 1, 0]]
    assert activation(True, "vanilla", original=True)(values).tolist() == [[0, 0, 0, 0, 0]]


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_a_nan_is_not_hidden(ternary: bool, original: bool) -> None:
    values = torch.tensor([[0.5, float("nan"), -0.1]])
    assert activation(ternary, original=original)(values).isnan().any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("ternary", [False, True])
def test_half_precision_is_computed_in_float32(estimator: Estimator, ternary: bool) -> None:
    module = activation(ternary, estimator)
    values = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    result = module(values)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result.float(), module(values.float()))
    assert torch.equal(gradient(module, values), gradient(module, values.float()).bfloat16())


@pytest.mark.parametrize(
    ("estimator", "ternary", "original"),
    [
        ("vanilla", False, False),
        ("bnn", False, False),
        ("swish", False, True),
        ("bireal", True, False),
        ("bireal", True, True),
    ],
)
def test_compiled_value_and_gradient_are_the_eager_ones(
    estimator: Estimator, ternary: bool, original: bool
) -> None:
    torch.compiler.reset()
    module = activation(ternary, estimator, original=original)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(compiled(values), module(values))
    assert torch.equal(gradient(compiled, values), gradient(module, values))


def test_no_value_is_read_back_to_the_host() -> None:
    for ternary in (False, True):
        for original in (False, True):
            values = torch.empty(2, 3, device="meta", requires_grad=True)
            result = activation(ternary, "swish", original=original)(values)
            result.sum().backward()
            assert result.is_meta and values.grad is not None
