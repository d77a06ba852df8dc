"""Blurring before pixels are skipped (BlurPool; Zhang, ICML 2019, arXiv 1904.11486)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from models.activations import QuantizedActivation
from models.blocks import BlockNetwork
from models.calls import ModelError
from models.layers import CompressedLayer
from models.lowpass import BlurPool2d, blur_input, blur_output
from models.pattern_layers import MixedConv2d
from models.surgery import mark_constant_buffers, set_blueprint

#: Convolutions that read fewer channels, in practice the images, are left as they are.
_FEWEST_CHANNELS = 16


def add_blurpool(model: nn.Module) -> list[str]:
    """Blur, in place, before layers that skip pixels, and return the names of these layers.

    They are the convolutions of stride 2 with at least 16 input channels, whose input is blurred
    first, and the max-pools of stride 2, which take the maximum at every pixel, blur, and skip
    then. Other places stay: what a network slices by itself (the shortcuts of the CIFAR ResNets),
    average pools, which blur already, and the stem, which reads images.

    The layers stay the same objects with the same names and state-dict keys, so weights of the
    network without blur load; the blur is a module `blur` inside of them. It comes before a layer's
    own input quantizer. Folded networks have it too. models.profile counts the multiply-accumulates
    of the filters, which are no parameters and are not stored.

    Apply it after a method: behind activations that a method has made binary or ternary the mean of
    nine would be neither. Raises ModelError there, and when no layer skips pixels.
    """
    if _hands_on_quantized_activations(model):
        raise ModelError(
            f"blurpool would average quantized activations of {type(model).__name__}; "
            "binary(placement=input), or order=CPBA where the network has an order, blurs first"
        )
    found = [
        (name, layer)
        for name, layer in _outermost(model)
        if _skipping_convolution(layer) or _skipping_pool(layer)
    ]
    if not found:
        raise ModelError(
            f"blurpool finds no layer of {type(model).__name__} to change: no max-pool has stride "
            f"2, nor has a convolution with {_FEWEST_CHANNELS} input channels or more"
        )
    for name, layer in found:
        if hasattr(layer, "blur"):
            raise ModelError(f"{name} of {type(model).__name__} blurs already")
    for _, layer in found:
        if isinstance(layer, nn.MaxPool2d):
            layer.stride = 1
            blur_output(layer, BlurPool2d(2, layer.ceil_mode))
        else:
            blur_input(layer, BlurPool2d())
    mark_constant_buffers(model)
    set_blueprint(model, None)
    return [name for name, _ in found]


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules below the root, but for those inside of a mixed bank, which is one layer."""
    mixed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(mixed):
            continue
        if isinstance(module, MixedConv2d):
            mixed += (f"{name}.",)
        yield name, module


def _skipping_convolution(layer: nn.Module) -> bool:
    convolution = layer.bank if isinstance(layer, MixedConv2d) else layer
    return (
        isinstance(convolution, nn.Conv2d)
        and convolution.stride == (2, 2)
        and convolution.in_channels >= _FEWEST_CHANNELS
    )


def _skipping_pool(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MaxPool2d) and layer.stride in (2, (2, 2))


def _hands_on_quantized_activations(model: nn.Module) -> bool:
    """Whether a quantized activation is read by more than the layer that it belongs to."""
    if isinstance(model, BlockNetwork) and model.order == "CPBA":
        return False
    owned = {
        module.input_quantizer for module in model.modules() if isinstance(module, CompressedLayer)
    }
    return any(
        isinstance(module, QuantizedActivation) and module not in owned
        for module in model.modules()
    )
