"""Quantizers through torch.compile, against the eager ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from models import ModelError, apply_method, compile_quantizers, fold, quantized_layers

METHODS = [
    "ternary",
    "ternary(expansion=4)",
    "ternary-twn",
    "ternary-ttq",
    "binary-bwn",
    "binary",
    "sparse+ternary",
    "sparse+binary(activations=float)",
    "step+ternary",
]


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    # Of one shape, so of one kernel; the first and the last stay float under some methods.
    convolutions = [nn.Conv2d(8, 8, 3, bias=False) for _ in range(3)]
    plain = nn.Sequential(convolutions[0], nn.ReLU(), *convolutions[1:])
    model = apply_method(plain, method)
    for tensor in model.parameters():
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_quantizers_compute_and_learn_like_the_eager_ones(method: str) -> None:
    torch.compiler.reset()
    eager = network(method).double()
    compiled = copy.deepcopy(eager)
    assert compile_quantizers(compiled) == len(quantized_layers(eager))
    images = torch.randn(4, 8, 8, 8, dtype=torch.float64)
    for _ in range(2):
        outputs, expected = compiled(images), eager(images)
        torch.testing.assert_close(outputs, expected)
        outputs.square().sum().backward()
        expected.square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(fold(compiled)(images), eager(images))
        assert torch.equal(pickle.loads(pickle.dumps(compiled))(images), eager(images))


def test_nothing_to_compile_is_an_error() -> None:
    with pytest.raises(ModelError, match="Sequential has no quantizers to compile"):
        compile_quantizers(network("float"))
