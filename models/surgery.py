"""The one place where layers of a network are found and replaced."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from models.calls import ModelError, nearest
from models.layers import (
    CompressedConv2d,
    CompressedLayer,
    CompressedLinear,
    Foldable,
    PlainLayer,
    StoresWeight,
    TrimmedConv2d,
)
from models.lowpass import BlurPool2d, blur_input

Part = Literal["stem", "head", "shortcut", "bottleneck", "projection", "body"]
Shape = Literal["spatial", "depthwise", "pointwise", "linear"]

# Exact types: a subclass from elsewhere may not use its weight in the way we would replace.
_WEIGHT_LAYERS = (nn.Conv2d, nn.Linear, TrimmedConv2d, CompressedConv2d, CompressedLinear)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a network, and the part it plays there.

    `part` is what the network declares in its attribute `roles`, a mapping from layer names or
    patterns (`layer*.downsample.0`):

    - stem, head: the first layer, and the one that gives the logits;
    - shortcut: a convolution on a residual path;
    - bottleneck: a spatial convolution whose output a 1x1 of the network itself mixes, as the 3x3
      between the two 1x1 of a ResNet-50 block (depthwise ones need not be declared);
    - projection: the 1x1, without activation, that closes an inverted residual block.

    Layers it does not mention are body. `shape` follows from the weight: a convolution is depthwise
    when each channel has a group of its own, pointwise when its kernel is 1x1, else spatial.
    """

    name: str
    module: PlainLayer
    part: Part
    shape: Shape

    @property
    def quantized(self) -> bool:
        """Whether the layer already computes with quantized weights."""
        return _is_quantized(self.module)


def weight_layers(model: nn.Module, *, frozen: bool = False) -> list[Layer]:
    """List the convolution and linear layers below a network's root, in order of registration.

    They are nn.Conv2d, nn.Linear and ours. Layers of other types (nn.Conv1d, nn.ConvTranspose2d,
    subclasses from elsewhere) are not among them, so no method touches them: they stay float.

    `frozen` lists those with a frozen weight too, which no method may replace. Raises ModelError
    when the network declares a role for a layer that it does not have.
    """
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if name
        and (type(module) in _WEIGHT_LAYERS or (frozen and isinstance(module, StoresWeight)))
    ]
    parts = _declared_parts(model, [name for name, _ in modules])
    return [
        Layer(name, module, parts.get(name, "body"), _shape(module))
        for name, module in modules
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]


def declared_parts(model: nn.Module) -> set[Part]:
    """Return the parts that a network declares, also of layers that a method has frozen."""
    return set(getattr(model, "roles", {}).values())


def replace_layers(
    model: nn.Module,
    layers: Iterable[Layer],
    build: Callable[[PlainLayer], nn.Module],
) -> list[str]:
    """Replace layers in place, each by what `build` makes of it, and return their names.

    A layer that the network holds under several names is built once and replaced under all.
    """
    chosen = list(layers)
    replace_modules(model, {layer.module: build(layer.module) for layer in chosen})
    return [layer.name for layer in chosen]


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules below a network's root in place, each under all its names.

    What is inside a replaced module goes with it, but for the blur of its input (models.lowpass).
    The network is no longer the one that its blueprint describes.
    """
    set_blueprint(model, None)
    replaced: tuple[str, ...] = ()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements and not name.startswith(replaced):
            model.set_submodule(name, replacements[module])
            replaced += (f"{name}.",)
    for module, new in replacements.items():
        blur = getattr(module, "blur", None)
        if isinstance(blur, BlurPool2d):
            blur_input(new, blur)


def blueprint(model: nn.Module) -> dict[str, Any] | None:
    """Return the arguments with which create_model makes such a network, if it made this one.

    Plain data of the network, no part of its state. Weights apart, it is what the network is: it is
    dropped where layers are replaced afterwards.
    """
    arguments: dict[str, Any] | None = getattr(model, "_blueprint", None)
    return arguments


def set_blueprint(model: nn.Module, arguments: dict[str, Any] | None) -> None:
    """Say how create_model makes such a network, or with None that it does not."""
    object.__setattr__(model, "_blueprint", arguments)


def activation_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the rectifying activations and their names, in order of registration.

    Gates (sigmoids) are not among them, nor are activations with parameters.
    """
    return [
        (name, module) for name, module in model.named_modules() if type(module) in _ACTIVATIONS
    ]


def quantized_layers(model: nn.Module) -> list[tuple[str, CompressedLayer]]:
    """List the layers with quantized weights and their names, in order of registration."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, CompressedLayer) and _is_quantized(module)
    ]


def constant_buffers(model: nn.Module) -> list[str]:
    """List the buffers that no checkpoint holds: masks and frozen banks, which each process makes.

    They must be neither broadcast, reduced nor averaged between processes.
    """
    persistent = model.state_dict(keep_vars=True)
    return [name for name, _ in model.named_buffers() if name not in persistent]


def mark_constant_buffers(model: nn.Module) -> None:
    """Tell DistributedDataParallel, which reads it off the network, to leave them alone."""
    object.__setattr__(model, "_ddp_params_and_buffers_to_ignore", constant_buffers(model))


def after_step(model: nn.Module) -> Callable[[], None]:
    """Return what must be called after each optimizer step: it clips the latent values.

    Binary layers hold their latent weights, and biases, to [-1, 1]; for a network without such
    layers it does nothing.
    """
    bounds: dict[float, list[CompressedLayer]] = {}
    for module in model.modules():
        if isinstance(module, CompressedLayer) and module.clip is not None:
            bounds.setdefault(module.clip, []).append(module)

    @torch.no_grad()
    def clip() -> None:
        for bound, layers in bounds.items():
            # Read anew: loading with assign=True and moving a network may change the parameters.
            latents: list[Tensor] = [
                latent for layer in layers for latent in layer.parameters(recurse=False)
            ]
            torch._foreach_clamp_min_(latents, -bound)
            torch._foreach_clamp_max_(latents, bound)

    return clip


def compile_quantizers(model: nn.Module) -> int:
    """Let torch.compile make the quantizers of a network faster, and return how many there are.

    Only they are compiled, each by itself, so a network that torch.compile cannot take as a whole
    may gain too, and gradients reach DistributedDataParallel layer by layer as before. The first
    training step compiles one kernel for each shape of weight, a few seconds each. Values may
    differ from the eager ones in the order of summation, so in the last bit of a scale. Call it
    after the methods. Raises ModelError for a network without quantized weights.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no quantizers to compile")
    # Of one function torch.compile keeps eight variants, for all networks together, then it fails.
    torch._dynamo.config.recompile_limit += len(layers)
    for layer in layers:
        layer.compiled = True
    return len(layers)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Return a copy in which every layer of a method is a plain torch layer with equal outputs.

    The copy has the used (for example ternary) weights and no latent ones; the model is unchanged.
    Activations that a method has quantized (models.activations.QuantizedActivation) have no plain
    counterpart and stay.
    """
    folded = copy.deepcopy(model)
    if isinstance(folded, Foldable):
        return folded.folded()
    replace_modules(
        folded,
        {module: module.folded() for module in folded.modules() if isinstance(module, Foldable)},
    )
    mark_constant_buffers(folded)
    return folded


def _declared_parts(model: nn.Module, layers: list[str]) -> dict[str, Part]:
    """Find the parts of the layers for which the network declares one.

    Where a method has put several layers in the place of one, they play its part; where it has put
    none but frozen ones, the declaration stands for nothing.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, StoresWeight)]
    for layer in layers:
        steps = layer.split(".")
        names += [".".join(steps[:depth]) for depth in range(1, len(steps) + 1)]
    parts: dict[str, Part] = {}
    for pattern, part in getattr(model, "roles", {}).items():
        if part not in get_args(Part):
            raise ModelError(f"role {part!r} of {pattern!r} is not one of {get_args(Part)}")
        matches = set(fnmatch.filter(names, pattern))
        if not matches:
            raise ModelError(
                f"{type(model).__name__} declares {pattern!r} as {part}, "
                f"but has no such layer{nearest(pattern, layers)}"
            )
        parts.update(
            (layer, part)
            for layer in layers
            if any(layer == match or layer.startswith(f"{match}.") for match in matches)
        )
    return parts


def _shape(module: nn.Module) -> Shape:
    if not isinstance(module, nn.Conv2d):
        return "linear"
    if module.groups == module.in_channels > 1:
        return "depthwise"
    return "pointwise" if module.kernel_size == (1, 1) else "spatial"


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, CompressedLayer) and module.weight_quantizer is not None
