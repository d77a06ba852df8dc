"""Frozen banks of structured ternary patterns in place of learned spatial convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from models.calls import ModelError
from models.layers import CompressedLayer
from models.methods import Kind, Method, method
from models.pattern_layers import FrozenConv2d, MixedConv2d, frozen_convolution
from models.patterns import Bank, Family, KeyedPatterns, OriginalPatterns, PatternSource
from models.surgery import (
    Layer,
    Part,
    activation_modules,
    replace_layers,
    replace_modules,
    weight_layers,
)

_FAMILIES: Mapping[str, tuple[Family, ...]] = {
    "both": ("lbp", "haar"),
    "lbp": ("lbp",),
    "haar": ("haar",),
    "ternary": ("ternary",),
    "binary01": ("binary01",),
}


@method("step")
@dataclass(frozen=True, kw_only=True)
class StructuredTernaryPatterns(Method):
    """Structured ternary patterns (STeP) of Kyrkou (TNNLS 2024, arXiv 2407.14831).

    A bank of frozen ternary filters takes the place of a learned convolution; models.patterns says
    what the filters are. With C input channels and M outputs:

    - a spatial convolution becomes  u = mix(z),  z = [x * LBP, x * Haar]  with C // 2 filters of
      each kind (3 for three channels, the images) and a learned 1x1 `mix` from z to M in two
      groups, so that half of the outputs sees the LBP maps, the other half the Haar maps;
    - a bottleneck, whose output a 1x1 of the network mixes anyway, becomes z with M / 2 of each;
    - a depthwise convolution becomes z in C / 2 groups, each of which makes one LBP and one Haar
      map of two channels;
    - the 1x1 projection of an inverted residual block becomes a frozen one of uniform ternary
      weights;
    - a 1x1 head (StepNet) becomes a frozen one of +-1 to C maps, and a mix.

    Stride and padding stay those of the layer. The bank has no gradient; the input's is that of the
    convolution. Batch norm absorbs the gain of the filters, so they need no scale. In a network of
    nothing but mixed convolutions (VGG) ReLU becomes LeakyReLU(0.1), as in the original.

    - `families`: `lbp`, `haar`, `ternary` (uniform) or `binary01` (0 or 1) instead of both, for
      ablations;
    - `mix`: `auto` as above, `all` also behind bottlenecks, `none` nowhere: M filters, no mix;
    - `mix_groups`: 2, as in the original's code, where there are two families, else 1, as in its
      blocks of one family. The paper's text came before the groups, so presumably it has 1;
    - `stem`: `mixed`, `plain` (M haar filters, or those of the one family, without mix) or
      `learned`; `auto` is plain where the network has bottlenecks (ResNet-50), else mixed;
    - `projection=learned` leaves the projections as they are;
    - `activation`: `auto` as above, `leaky` or `kept`;
    - `seed` is that of the patterns.

    `mode=original` repeats the authors' code: its patterns in the order of the network's layers, a
    bias in each mix, 3x3 in place of the unmixed 5x5 (EfficientNet), which their code cannot pad;
    two groups or an error. To the bit it is theirs on their networks: vgg16, resnet50 and
    mobilenetv2 with form=cifar, efficientnetb0(form=cifar, original=true) and
    stepnet(original=true). The two filters of a group of a depthwise layer lie side by side, where
    the original has all LBP maps first; the frozen projection's columns follow them, so the network
    is the same function. The original's blocks of one family, which none of its networks has, clamp
    LeakyReLU to [0, 255], so that nothing leaks: here it stays LeakyReLU.

    Deviations of `mode=fixed`, the default: the quirks that models.patterns names are repaired; the
    patterns of a layer depend on its name, not on other layers; filters are scaled by a power of
    two to unit gain, so nothing overflows before batch norm knows its statistics; a mix has a bias
    where the layer had one, and one group where its channels are odd or the layer has groups
    itself; an odd C loses no channel, and at least six maps are mixed. A larger kernel's LBP
    filters see only its middle 3x3 cells.

    Published top-1 (learned parameters) on CIFAR-10: VGG16 89.14 % (835,146; float 93.82 %),
    ResNet-50 95.03 % (12,201,866; 95.83 %), MobileNetV2 89.99 % (1,268,762; 92.75 %),
    EfficientNet-B0 87.74 % (1,933,798; 91.40 %), StepNet 88.83 % (201,822).
    """

    kind: ClassVar[Kind] = Kind.LAYER_SWAP
    short_forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {"original": {"mode": "original"}}

    mode: Literal["fixed", "original"] = "fixed"
    families: Literal["both", "lbp", "haar", "ternary", "binary01"] = "both"
    mix: Literal["auto", "all"] | None = "auto"
    mix_groups: Literal[1, 2] | None = None
    stem: Literal["auto", "mixed", "plain", "learned"] = "auto"
    projection: Literal["frozen", "learned"] = "frozen"
    activation: Literal["auto", "leaky", "kept"] = "auto"
    seed: int = 42

    def apply(self, model: nn.Module) -> list[str]:
        return self.replace(model, self.pattern_source())

    def pattern_source(self) -> PatternSource:
        """Return the source of the patterns, at its start."""
        if self.mode == "original":
            return OriginalPatterns(self.seed)
        return KeyedPatterns(self.seed)

    def replace(self, model: nn.Module, source: PatternSource) -> list[str]:
        """Replace the layers of a network by banks from a source, in the order of registration."""
        layers = weight_layers(model)
        if any(isinstance(layer.module, CompressedLayer) for layer in layers):
            raise ModelError(
                f"{type(model).__name__} already has masked or quantized layers; step comes before "
                "what acts on learned weights, since its banks would drop that"
            )
        if any(isinstance(module, FrozenConv2d) for module in model.modules()):
            raise ModelError(f"{type(model).__name__} already has banks of patterns")
        builder = _Builder(self, source, layers)
        built = {layer.module: builder.build(layer) for layer in layers}
        new = {layer: module for layer, module in built.items() if module is not None}
        leaky = {}
        if self.activation == "leaky" or (self.activation == "auto" and builder.all_mixed):
            leaky = _leaky_activations(model)
        if new:
            self._refuse_idle_options(layers, list(new.values()), leaks=bool(leaky))
        replace_modules(model, leaky)
        chosen = [layer for layer in layers if layer.module in new]
        return replace_layers(model, chosen, lambda layer: new[layer])

    def _refuse_idle_options(
        self, layers: list[Layer], built: list[nn.Module], *, leaks: bool
    ) -> None:
        """Raise ModelError for an option that asks for something which this network cannot have."""
        parts = {layer.part for layer in layers}
        mixed = any(isinstance(module, MixedConv2d) for module in built)
        has_projection, has_stem = "projection" in parts, "stem" in parts
        idle = [
            ("activation=leaky", self.activation == "leaky" and not leaks, "ReLU"),
            (
                "projection=learned",
                self.projection == "learned" and not has_projection,
                "projection",
            ),
            (f"stem={self.stem}", self.stem != "auto" and not has_stem, "declared stem"),
            ("mix=all", self.mix == "all" and "bottleneck" not in parts, "bottleneck"),
            (f"mix_groups={self.mix_groups}", bool(self.mix_groups) and not mixed, "mixed layer"),
        ]
        for option, is_idle, missing in idle:
            if is_idle:
                raise ModelError(f"step: {option} has no effect: the network has no {missing}")


class _Builder:
    """Builds what takes the place of each layer of a network, in turn."""

    def __init__(
        self, options: StructuredTernaryPatterns, source: PatternSource, layers: list[Layer]
    ) -> None:
        self._options = options
        self._source = source
        self._original = options.mode == "original"
        self._families = _FAMILIES[options.families]
        self._has_bottlenecks = any(layer.part == "bottleneck" for layer in layers)
        self._depthwise: Bank | None = None
        inner = [
            layer
            for layer in layers
            if layer.part not in ("stem", "head") and layer.shape in ("spatial", "depthwise")
        ]
        #: Whether all layers but the first and the last become mixed ones.
        self.all_mixed = bool(inner) and all(
            layer.shape == "spatial" and self._is_mixed(layer) for layer in inner
        )

    def build(self, layer: Layer) -> nn.Module | None:
        """Return what takes the place of a layer, or None if it stays."""
        convolution, options = layer.module, self._options
        if not isinstance(convolution, nn.Conv2d):
            return None
        if layer.part == "stem" and options.stem == "learned":
            return None
        rows, columns = convolution.kernel_size
        if rows != columns:
            raise ModelError(f"step: {layer.name} is {rows}x{columns}, but patterns are square")
        try:
            return self._build(layer, convolution)
        except ModelError as error:
            raise ModelError(f"step: {layer.name}: {error}") from None

    def _build(self, layer: Layer, convolution: nn.Conv2d) -> nn.Module | None:
        if layer.shape == "spatial" and self._is_mixed(layer):
            return self._mixed(layer.name, convolution)
        if layer.shape == "spatial":
            return self._unmixed(layer, convolution)
        if layer.shape == "depthwise" and convolution.kernel_size != (1, 1):
            return self._paired(layer, convolution)
        if layer.part == "projection" and self._options.projection == "frozen":
            return self._projection(layer.name, convolution)
        if layer.part == "head" and self._options.mix is not None:
            return self._mixed(layer.name, convolution)
        return None

    def _is_mixed(self, layer: Layer) -> bool:
        if layer.part == "stem" and self._options.stem != "auto":
            return self._options.stem == "mixed"
        if self._options.mix != "auto":
            return self._options.mix == "all"
        if layer.part == "stem":
            return not self._has_bottlenecks
        return layer.part != "bottleneck"

    def _mixed(self, name: str, layer: nn.Conv2d) -> nn.Module:
        """A bank of as many maps as there are inputs, and a learned 1x1."""
        outputs, kernel = layer.out_channels, layer.kernel_size[0]
        maps = self._maps(layer)
        families = self._families
        if kernel == 1 and set(families) <= {"lbp", "haar"}:
            families = ("points",)
        shape = (maps, layer.in_channels // layer.groups, kernel, kernel)
        bank = Bank(self._source, families, shape, name, layer.groups)
        mix = nn.Conv2d(
            maps,
            outputs,
            1,
            groups=self._mix_groups(layer, maps),
            bias=self._original or layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        return MixedConv2d(frozen_convolution(bank, layer, bias=None), mix.train(layer.training))

    def _maps(self, layer: nn.Conv2d) -> int:
        channels = layer.in_channels
        if not self._original:
            return max(6, channels)
        if len(self._families) == 1:
            return channels
        if channels == 1:
            raise ModelError("the original has no patterns for one input channel; mode=fixed has")
        maps = 6 if channels == 3 else 2 * (channels // 2)
        if maps % layer.groups:
            raise ModelError(
                f"the original's {maps} maps do not divide into the {layer.groups} groups of the "
                "layer; mode=fixed can"
            )
        return maps

    def _mix_groups(self, layer: nn.Conv2d, maps: int) -> int:
        """Two groups are one per family; the maps of a grouped layer do not lie in that order."""
        outputs = layer.out_channels
        groups = self._options.mix_groups or len(self._families)
        if groups == 1 or (layer.groups == 1 and maps % 2 == outputs % 2 == 0):
            return groups
        if self._original:
            reason = (
                f"{maps} maps and {outputs} outputs do not divide into two groups"
                if layer.groups == 1
                else f"the maps of a layer with {layer.groups} groups are not in order of families"
            )
            raise ModelError(f"{reason}; mix_groups=1 and mode=fixed can mix them")
        return 1

    def _unmixed(self, layer: Layer, convolution: nn.Conv2d) -> nn.Module:
        """A bank of as many maps as there are outputs; of a stem, haar maps alone."""
        families = self._families
        if layer.part == "stem" and families == ("lbp", "haar"):
            families = ("haar",)
        kernel = self._unmixed_kernel(convolution, layer.part)
        inputs = convolution.in_channels // convolution.groups
        shape = (convolution.out_channels, inputs, kernel, kernel)
        bank = Bank(self._source, families, shape, layer.name, convolution.groups)
        return frozen_convolution(bank, convolution, convolution.bias)

    def _paired(self, layer: Layer, convolution: nn.Conv2d) -> nn.Module:
        """A bank in which two channels make two maps; channels of an odd number stay alone."""
        channels, kernel = convolution.in_channels, self._unmixed_kernel(convolution, layer.part)
        together = 2 if channels % 2 == 0 else 1
        if self._original and together == 1:
            raise ModelError(
                f"the original pairs channels; their number {channels} is odd; mode=fixed can"
            )
        groups = channels // together
        shape = (convolution.out_channels, together, kernel, kernel)
        bank = Bank(self._source, self._families, shape, layer.name, groups)
        self._depthwise = bank
        return frozen_convolution(bank, convolution, convolution.bias)

    def _unmixed_kernel(self, layer: nn.Conv2d, part: Part) -> int:
        """The original has 3x3 alone, also where the float network has a padded 5x5."""
        kernel = layer.kernel_size[0]
        if not self._original or kernel == 3:
            return kernel
        padding = layer.padding
        padded = padding == "same" if isinstance(padding, str) else min(padding) >= 1
        if kernel == 5 and layer.dilation == (1, 1) and padded:
            return 3
        form = "; the paper's stems are 3x3, see form=cifar" if part == "stem" else ""
        raise ModelError(
            "the original has unmixed patterns of 3x3 alone, also for a padded 5x5 without "
            f"dilation, not for this {kernel}x{kernel}; mode=fixed has them{form}"
        )

    def _projection(self, name: str, layer: nn.Conv2d) -> nn.Module:
        """A frozen 1x1; the original's columns follow the order of the maps before it."""
        order = None
        if self._original and self._depthwise and self._depthwise.shape[0] == layer.in_channels:
            order = self._depthwise.source_order()
        inputs = layer.in_channels // layer.groups
        shape = (layer.out_channels, inputs, 1, 1)
        bank = Bank(self._source, ("ternary",), shape, name, layer.groups, order)
        return frozen_convolution(bank, layer, layer.bias)


def _leaky_activations(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return what takes the place of each ReLU where it leaks."""
    return {
        module: nn.LeakyReLU(0.1, inplace=module.inplace)
        for _, module in activation_modules(model)
        if isinstance(module, nn.ReLU | nn.ReLU6)
    }
