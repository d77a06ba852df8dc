"""Methods under autocast: the same quantized weights, and losses and gradients that are finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models import create_model, list_methods
from models.layers import StoresWeight

METHODS = [
    *list_methods(),
    "ternary(expansion=4)",
    "ternary-twn",
    "ternary-ttq",
    "binary-bwn",
    "binary(ternary_weights=all, ternary_activations=all)",
    "sparse+ternary",
    "step+ternary",
]
HALVES = [torch.bfloat16, torch.float16]

every_method = pytest.mark.parametrize("method", METHODS)
both_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def build(method: str, backbone: str = "lenet5") -> nn.Module:
    return create_model(backbone, method, num_classes=10, image_size=32)


def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def used_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.used_weight().detach()
        for name, module in model.named_modules()
        if isinstance(module, StoresWeight)
    }


@both_halves
@every_method
def test_weights_are_quantized_in_float32_under_autocast(method: str, dtype: torch.dtype) -> None:
    model = build(method)
    expected = used_weights(model)
    with torch.autocast("cpu", dtype=dtype):
        used = used_weights(model)
    assert bool(used) == (method != "float")
    for name, weight in used.items():
        assert weight.dtype == torch.float32, name
        assert torch.equal(weight, expected[name]), name


@both_halves
@every_method
def test_half_precision_trains_with_finite_float32_gradients(
    method: str, dtype: torch.dtype
) -> None:
    model = build(method)
    with torch.autocast("cpu", dtype=dtype):
        output = model(images())
        loss = nn.functional.cross_entropy(output, torch.arange(8))
    assert output.dtype == dtype
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("mode", "finite"), [("fixed", True), ("original", False)])
def test_fixed_patterns_do_not_overflow_float16_before_norms_know_their_statistics(
    mode: str, finite: bool
) -> None:
    # The original's patterns have a gain of up to 5 C in each layer, which untrained norms hand on.
    model = build(f"step(mode={mode})", "vgg11").eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert bool(model(images()[:2]).isfinite().all()) == finite
