"""Layers whose weight passes through a method. They keep the float layer's state-dict keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.calls import ModelError
from models.masks import WeightMask
from models.quantizers import LearnsScales, WeightQuantizer
from models.storage import Storage

PlainLayer = nn.Conv2d | nn.Linear
NewLayer = TypeVar("NewLayer", bound=nn.Conv2d | nn.Linear)


@runtime_checkable
class Foldable(Protocol):
    """A module of a method that has a plain torch counterpart with the same outputs."""

    def folded(self) -> nn.Module:
        """Return the counterpart. It shares no tensors with this module."""


@runtime_checkable
class StoresWeight(Protocol):
    """A layer that says how its weight is stored, because it is not stored as float32."""

    def weight_storage(self) -> Storage:
        """Return the form in which the weight is stored."""

    def used_weight(self) -> Tensor:
        """Return the weight that forward computes with."""


class TrimmedConv2d(nn.Conv2d):
    """nn.Conv2d that leaves out the kernel rows and columns that would see only zero padding.

    A 3x3 kernel with padding 1 on a 1x1 map is its centre tap: a ninth of the operations. Outputs
    and gradients are those of nn.Conv2d (the other taps get exactly zero), up to the order of
    summation. Networks use it where their maps can get smaller than their kernels, or where they
    pad by replication (see _convolution).
    """

    def forward(self, input: Tensor) -> Tensor:
        return _convolution(self, input, self.weight, self.bias)

    def folded(self) -> nn.Conv2d:
        """Return the plain convolution."""
        plain = nn.Conv2d(**_conv2d_settings(self))
        return _adopt(plain, self, *_copies(self.weight, self.bias))


class CompressedLayer(nn.Module):
    """What the layers share whose weight passes through a mask, a quantizer or both.

    `compress` makes them from plain layers. The parameter `weight` is the latent one, in float; the
    layer computes with

        used_weight() = mask(quantizer(weight))

    where either may be absent. The weight under the mask is kept at exactly zero, so the mask acts
    on the gradient, and on the value only behind a quantizer that does not map zero to zero.
    `input_quantizer` maps the input first. `bias_terms` multiplies the bias: the reference code of
    the ternary method adds it once per branch. `clip` is the bound that the latent weight and bias
    are held to after each optimizer step, if there is one. `compiled` quantizers go through
    torch.compile where gradients are recorded (see models.compile_quantizers).
    """

    weight: Tensor
    mask: WeightMask | None
    weight_quantizer: WeightQuantizer | None
    input_quantizer: nn.Module | None
    bias_terms: int
    clip: float | None
    compiled: bool = False

    def used_weight(self) -> Tensor:
        """Return the weight that forward computes with, of the shape of `weight`."""
        weight = self.weight if self.mask is None else self.mask.mask_gradient(self.weight)
        if self.weight_quantizer is None:
            return weight
        use_compiled = self.compiled and torch.is_grad_enabled()
        quantize = _compiled_quantize() if use_compiled else _quantize
        quantized = quantize(self.weight_quantizer, weight, self.mask)
        if self.mask is None or self.weight_quantizer.keeps_zeros:
            return quantized
        return self.mask.mask_value(quantized)

    def used_bias(self) -> Tensor | None:
        """Return the bias that forward adds."""
        bias = cast("Tensor | None", self.bias)
        return bias if bias is None or self.bias_terms == 1 else bias * self.bias_terms

    def weight_storage(self) -> Storage:
        """Return the form in which the weight is stored: pre-defined zeros are not."""
        quantizer = self.weight_quantizer
        schemes = [] if self.mask is None else ["sparse"]
        schemes += [] if quantizer is None else [quantizer.scheme]
        return Storage(
            "+".join(schemes) or "float32",
            self.weight.numel() if self.mask is None else self.mask.kept,
            levels=None if quantizer is None else quantizer.levels,
            scales=0 if quantizer is None else quantizer.scales(self.weight),
            bank_bits=0 if self.mask is None else self.mask.bank_bits,
        )

    def extra_repr(self) -> str:
        # A mask, and a quantizer that learns, are modules, which are shown below the layer.
        if self.weight_quantizer is None or isinstance(self.weight_quantizer, nn.Module):
            return super().extra_repr()
        return f"{super().extra_repr()}, {self.weight_quantizer}"

    def _quantized_input(self, input: Tensor) -> Tensor:
        return input if self.input_quantizer is None else self.input_quantizer(input)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as usual, a dense weight under the mask; one of another mask is an error.

        The checkpoint of a float network has no learned scales: they start anew from its weight.
        """
        stored = state_dict.get(f"{prefix}weight")
        if self.mask is not None and stored is not None and stored.shape == self.weight.shape:
            if self.mask.contradicts(stored):
                error_msgs.append(
                    f"{prefix}weight seems to have been trained under another mask: build the "
                    "network with the arguments (kernel, period, full, pattern, seed) that the "
                    "method had in training"
                )
                return
            # The mapping is a copy, its tensors are the caller's: they are not ours to change.
            state_dict[f"{prefix}weight"] = self.mask.mask_value(stored.detach())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.mask is not None and not self.weight.is_meta:
            self.mask.to(self.weight.device)  # a weight that was assigned may lie elsewhere
        scales = f"{prefix}weight_quantizer."
        if isinstance(self.weight_quantizer, LearnsScales) and not any(
            key.startswith(scales) for key in state_dict
        ):
            # Submodules are loaded after this layer, from the same mapping.
            initial = self.weight_quantizer.initial_scales(self.weight)
            state_dict.update({scales + name: value for name, value in initial.items()})


class CompressedConv2d(CompressedLayer, nn.Conv2d):
    """nn.Conv2d on the used weight: (N, C, H, W) to (N, out_channels, H', W')."""

    def forward(self, input: Tensor) -> Tensor:
        return _convolution(
            self, self._quantized_input(input), self.used_weight(), self.used_bias()
        )

    def folded(self) -> nn.Module:
        """Return a plain convolution with the used weight and the bias as it is added."""
        plain = nn.Conv2d(**_conv2d_settings(self))
        return _behind(
            self.input_quantizer,
            _adopt(plain, self, *_copies(self.used_weight(), self.used_bias())),
        )


class CompressedLinear(CompressedLayer, nn.Linear):
    """nn.Linear on the used weight: (..., in_features) to (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(self._quantized_input(input), self.used_weight(), self.used_bias())

    def folded(self) -> nn.Module:
        """Return a plain linear layer with the used weight and the bias as it is added."""
        plain = nn.Linear(**_linear_settings(self))
        return _behind(
            self.input_quantizer,
            _adopt(plain, self, *_copies(self.used_weight(), self.used_bias())),
        )


def compress(
    layer: PlainLayer,
    *,
    mask: WeightMask | None = None,
    weight_quantizer: WeightQuantizer | None = None,
    input_quantizer: nn.Module | None = None,
    bias_terms: int = 1,
    clip: float | None = None,
    padding_mode: str | None = None,
) -> CompressedConv2d | CompressedLinear:
    """Return a layer with the same parameter objects that computes with the compressed weight.

    What the layer already has from an earlier method stays; `bias_terms` multiplies its own. A
    masked weight is set to zero under its mask at once. `padding_mode` replaces that of a
    convolution. Raises ModelError for a layer that already has what is to be added.
    """
    new: CompressedConv2d | CompressedLinear
    if isinstance(layer, nn.Conv2d):
        settings = _conv2d_settings(layer) | (
            {"padding_mode": padding_mode} if padding_mode else {}
        )
        new = _adopt(CompressedConv2d(**settings), layer, layer.weight, layer.bias)
    else:
        new = _adopt(CompressedLinear(**_linear_settings(layer)), layer, layer.weight, layer.bias)
    new.mask = _only_one("mask", layer, mask)
    new.weight_quantizer = _only_one("weight_quantizer", layer, weight_quantizer)
    new.input_quantizer = _only_one("input_quantizer", layer, input_quantizer)
    new.bias_terms = bias_terms * getattr(layer, "bias_terms", 1)
    new.clip = _only_one("clip", layer, clip)
    if mask is not None:
        mask.mask_in_place(new.weight)
    return new


def _quantize(quantizer: WeightQuantizer, weight: Tensor, mask: WeightMask | None) -> Tensor:
    return quantizer(weight, mask)


@cache
def _compiled_quantize() -> Callable[[WeightQuantizer, Tensor, WeightMask | None], Tensor]:
    # A kernel for each shape: those for any shape are slower than the eager quantizers.
    return torch.compile(_quantize, fullgraph=True, dynamic=False)


def _only_one(kind: str, layer: PlainLayer, added: Any) -> Any:
    present = getattr(layer, kind, None)
    if present is not None and added is not None:
        raise ModelError(
            f"a layer ({type(layer).__name__}) already has a {kind.replace('_', ' ')}: "
            "apply the method to a network that has none"
        )
    return present if added is None else added


def _convolution(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with a layer's settings, without the taps that would see only zero padding."""
    if layer.padding_mode == "replicate":
        padded = _ReplicatedBorders.apply(input, tuple(layer._reversed_padding_repeated_twice))
        return functional.conv2d(
            padded, weight, bias, layer.stride, 0, layer.dilation, layer.groups
        )
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return layer._conv_forward(input, weight, bias)
    padding = [*layer.padding]
    for axis in (0, 1):
        # Where the output has the size of the input, a tap further from the centre than the input
        # is long reaches beyond it from every position.
        kernel, size = layer.kernel_size[axis], input.shape[axis + 2]
        same = layer.dilation[axis] == 1 and 2 * padding[axis] == kernel - 1
        idle = max(0, padding[axis] - (size - 1)) if same else 0
        if idle:
            weight = weight.narrow(axis + 2, idle, kernel - 2 * idle)
            padding[axis] -= idle
    return functional.conv2d(
        input, weight, bias, layer.stride, padding, layer.dilation, layer.groups
    )


class _ReplicatedBorders(torch.autograd.Function):
    """Replication padding by (left, right, top, bottom), with a gradient of its own.

    That of torch (2.11) fails where torch.compile has chosen the channels-last layout.
    """

    @staticmethod
    def forward(maps: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
        return functional.pad(maps, padding, mode="replicate")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.padding = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        left, right, top, bottom = ctx.padding
        inner = _summed_borders(gradient, -2, top, bottom)
        return _summed_borders(inner, -1, left, right), None


def _summed_borders(gradient: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Leave out the borders of an axis, after they have been added to its first and last entry."""
    size = gradient.shape[axis] - before - after
    inner = gradient.narrow(axis, before, size).clone()
    inner.narrow(axis, 0, 1).add_(gradient.narrow(axis, 0, before).sum(axis, keepdim=True))
    border = gradient.narrow(axis, before + size, after)
    inner.narrow(axis, size - 1, 1).add_(border.sum(axis, keepdim=True))
    return inner


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


def _behind(input_quantizer: nn.Module | None, plain: nn.Module) -> nn.Module:
    """Put a folded layer behind the map of its input, if it has one."""
    if input_quantizer is None:
        return plain
    folded = input_quantizer.folded() if isinstance(input_quantizer, Foldable) else input_quantizer
    return nn.Sequential(folded, plain)
