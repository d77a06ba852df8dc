"""The one place where layers of a network are found and replaced."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from models.calls import ModelError, nearest
from models.layers import Foldable, PlainLayer, QuantizedConv2d, QuantizedLayer, QuantizedLinear

Part = Literal["stem", "head", "shortcut", "body"]
Shape = Literal["spatial", "depthwise", "projection", "linear"]

# Exact types: a subclass from elsewhere may not use its weight in the way we would replace.
_WEIGHT_LAYERS = (nn.Conv2d, nn.Linear, QuantizedConv2d, QuantizedLinear)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a network, and the part it plays there.

    `part` is what the network declares in its attribute `roles`, a mapping from layer names or
    patterns (`layer*.downsample.0`) to stem, head or shortcut; layers it does not mention are
    body. `shape` follows from the weight: a convolution is depthwise when each channel has a group
    of its own, a projection when its kernel is 1x1, else spatial.
    """

    name: str
    module: PlainLayer
    part: Part
    shape: Shape

    @property
    def quantized(self) -> bool:
        """Whether the layer already computes with quantized weights."""
        return isinstance(self.module, QuantizedLayer)


def weight_layers(model: nn.Module) -> list[Layer]:
    """List the convolution and linear layers below a network's root, in order of registration.

    Raises ModelError when the network declares a role for a layer that it does not have.
    """
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if name and type(module) in _WEIGHT_LAYERS
    ]
    parts = _declared_parts(model, [name for name, _ in modules])
    return [
        Layer(name, module, parts.get(name, "body"), _shape(module))
        for name, module in modules
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]


def replace_layers(
    model: nn.Module,
    layers: Iterable[Layer],
    build: Callable[[PlainLayer], nn.Module],
) -> list[str]:
    """Replace layers in place, each by what `build` makes of it, and return their names.

    A layer that the network holds under several names is built once and replaced under all.
    """
    chosen = list(layers)
    _substitute(model, {layer.module: build(layer.module) for layer in chosen})
    return [layer.name for layer in chosen]


def quantized_layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """List the layers with quantized weights and their names, in order of registration."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    ]


def fold(model: nn.Module) -> nn.Module:
    """Return a copy in which every layer of a method is a plain torch layer with equal outputs.

    The copy has the used (for example ternary) weights and no latent ones; the model is unchanged.
    """
    folded = copy.deepcopy(model)
    if isinstance(folded, Foldable):
        return folded.folded()
    _substitute(
        folded,
        {module: module.folded() for module in folded.modules() if isinstance(module, Foldable)},
    )
    return folded


def _substitute(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])


def _declared_parts(model: nn.Module, names: list[str]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for pattern, part in getattr(model, "roles", {}).items():
        if part not in get_args(Part):
            raise ModelError(f"role {part!r} of {pattern!r} is not one of {get_args(Part)}")
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ModelError(
                f"{type(model).__name__} declares {pattern!r} as {part}, "
                f"but has no such layer{nearest(pattern, names)}"
            )
        parts.update(dict.fromkeys(matches, part))
    return parts


def _shape(module: nn.Module) -> Shape:
    if not isinstance(module, nn.Conv2d):
        return "linear"
    if module.groups == module.in_channels > 1:
        return "depthwise"
    return "projection" if module.kernel_size == (1, 1) else "spatial"
