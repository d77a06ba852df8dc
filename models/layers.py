"""Layers with quantized weights. They keep the float layer's state-dict keys and parameters."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional

from models.quantizers import WeightQuantizer

PlainLayer = nn.Conv2d | nn.Linear
NewLayer = TypeVar("NewLayer", bound=nn.Conv2d | nn.Linear)


@runtime_checkable
class Foldable(Protocol):
    """A layer of a method that has a plain torch counterpart with the same outputs."""

    def folded(self) -> nn.Module:
        """Return the counterpart. It shares no tensors with this layer."""


class QuantizedLayer(nn.Module):
    """What the quantized layers share: a quantizer between the latent and the used weight.

    `quantize` makes them from plain layers. The parameter `weight` is the latent one, in float.
    `bias_terms` multiplies the bias: the reference code of the ternary method adds it once per
    branch.
    """

    weight: Tensor
    weight_quantizer: WeightQuantizer
    bias_terms: int

    def quantized_weight(self) -> Tensor:
        """Return the weight that forward uses, of the shape of `weight`."""
        return self.weight_quantizer(self.weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weight_quantizer}"

    def _used_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.bias_terms == 1 else bias * self.bias_terms


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d with quantized weights: (N, C, H, W) to (N, out_channels, H', W')."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantized_weight(), self._used_bias(self.bias))

    def folded(self) -> nn.Conv2d:
        """Return a plain convolution with the quantized weight and the bias as it is added."""
        plain = nn.Conv2d(**_conv2d_settings(self))
        return _adopt(plain, self, *_copies(self.quantized_weight(), self._used_bias(self.bias)))


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """nn.Linear with quantized weights: (..., in_features) to (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.quantized_weight(), self._used_bias(self.bias))

    def folded(self) -> nn.Linear:
        """Return a plain linear layer with the quantized weight and the bias as it is added."""
        plain = nn.Linear(**_linear_settings(self))
        return _adopt(plain, self, *_copies(self.quantized_weight(), self._used_bias(self.bias)))


def quantize(
    layer: PlainLayer, weight_quantizer: WeightQuantizer, bias_terms: int = 1
) -> QuantizedConv2d | QuantizedLinear:
    """Return the quantized form of a plain layer; it owns the same parameter objects."""
    new: QuantizedConv2d | QuantizedLinear
    if isinstance(layer, nn.Conv2d):
        new = _adopt(QuantizedConv2d(**_conv2d_settings(layer)), layer, layer.weight, layer.bias)
    else:
        new = _adopt(QuantizedLinear(**_linear_settings(layer)), layer, layer.weight, layer.bias)
    new.weight_quantizer = weight_quantizer
    new.bias_terms = bias_terms
    return new


# A new layer is built on the meta device: its own initial weights cost nothing, draw no random
# numbers, and are replaced at once.


def _conv2d_settings(layer: nn.Conv2d) -> dict[str, Any]:
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "bias": layer.bias is not None,
        "padding_mode": layer.padding_mode,
        "device": "meta",
    }


def _linear_settings(layer: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "device": "meta",
    }


def _adopt(new: NewLayer, old: nn.Module, weight: Tensor, bias: Tensor | None) -> NewLayer:
    """Give a new layer its parameters and the training mode of the old one."""
    new.weight = weight
    if bias is not None:
        new.bias = bias
    new.train(old.training)
    return new


def _copies(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return parameters with the same values, cut from the graph of the latent ones."""
    copied_bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return nn.Parameter(weight.detach().clone()), copied_bias
