"""Pre-defined sparse convolution kernels, periodic or random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from models.calls import ModelError
from models.layers import compress
from models.masks import WeightMask, kernel_supports, periodic_mask, random_mask
from models.methods import Kind, Method, method
from models.surgery import Layer, replace_layers, weight_layers

#: Far beyond the paper's 16; a mask of a layer with 2048 channels takes 75 MB then.
_LONGEST_PERIOD = 1024


@method("sparse")
@dataclass(frozen=True, kw_only=True)
class Sparse(Method):
    """Pre-defined sparse kernels (Kundu et al., IEEE TC 2020; arXiv 2001.10710 and 1910.00724).

    Each kernel of a convolution may be non-zero in its support only, which is fixed before training
    and never learned. With `kernel` = n positions in a support, the supports V_n of a 3x3 kernel
    are, in raster order, the four 2x2 windows (n = 4), the six horizontal pairs (n = 2) or the nine
    single positions (n = 1). Filter o has at channel i the support of phase (o + i + 1) mod P:

        phase 0        all positions                               (`full=true`, the paper's PSD)
        phase p > 0    V_n[(p - 1) mod |V_n|]

    with P = `period`, 8 unless given. Without full kernels (`full=false`, PS) the period is |V_n|
    and phase 0 takes the last support. `pattern=random` (pSC) instead draws n positions for every
    kernel on its own, from `seed`. The short forms are the paper's names: `sparse-psd4p8` is its
    PSD4_P8.

    Masked are the convolutions with kernels larger than 1x1, depthwise ones too, but for the stem,
    or the first convolution where the network declares no stem. 1x1 convolutions and linear layers
    stay dense. Initial weights are those of the dense network, set to zero under the mask; then

        dL/dW = mask * dL/dW

    and no optimizer moves a masked weight, whose gradient, decay and momentum all stay zero.

    Ours: kernels of other sizes, whose windows, pairs and positions are formed in the same way (a
    kernel that has none stays dense), depthwise convolutions in the periodic pattern (the formula
    at i = 0: every P-th channel is full), and the seed, which the authors do not set.

    Published top-1 on CIFAR-10, VGG16 and ResNet-18 (read off plots in the authors' repository):
    dense 92.76 and 92.84 %, PSD4_P8 92.51 and 92.90, PSD2_P8 91.90 and 92.53, PSD1_P16 89.83 and
    92.01, PS4_P4 91.64 and 92.95, pSC4 92.03 and 92.46.
    """

    kind: ClassVar[Kind] = Kind.MASK
    short_forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "psd4p8": {"kernel": 4, "period": 8},
        "psd4p16": {"kernel": 4, "period": 16},
        "psd2p8": {"kernel": 2, "period": 8},
        "psd2p16": {"kernel": 2, "period": 16},
        "psd1p8": {"kernel": 1, "period": 8},
        "psd1p16": {"kernel": 1, "period": 16},
        "ps4p4": {"kernel": 4, "full": False},
        "ps2p6": {"kernel": 2, "full": False},
        "ps1p9": {"kernel": 1, "full": False},
        "psc4": {"kernel": 4, "pattern": "random"},
        "psc2": {"kernel": 2, "pattern": "random"},
        "psc1": {"kernel": 1, "pattern": "random"},
    }

    kernel: Literal[1, 2, 4] = 4
    period: int | None = None
    full: bool = True
    pattern: Literal["periodic", "random"] = "periodic"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pattern == "random" and (self.period is not None or not self.full):
            raise ModelError("sparse: pattern=random has neither a period nor full kernels to set")
        if self.pattern == "periodic" and self.seed != 0:
            raise ModelError("sparse: a periodic pattern draws nothing; seed is for pattern=random")
        if self.period is not None and not self.full:
            raise ModelError("sparse: with full=false the period is the number of supports")
        if self.period is not None and not 2 <= self.period <= _LONGEST_PERIOD:
            raise ModelError(
                f"sparse: period must be from 2 to {_LONGEST_PERIOD}, not {self.period}"
            )

    def apply(self, model: nn.Module) -> list[str]:
        layers = weight_layers(model)
        if any(layer.quantized for layer in layers):
            raise ModelError(f"{type(model).__name__} has quantized layers: masks come before them")
        generator = torch.Generator().manual_seed(self.seed % 2**64)
        masks: dict[nn.Module, WeightMask] = {}
        for layer in _maskable(layers):
            mask = self._mask(layer, generator)
            if mask is not None:
                weight = layer.module.weight
                device = None if weight.is_meta else weight.device  # a mask has its values always
                masks[layer.module] = mask.to(device, weight.dtype)
        return replace_layers(
            model,
            [layer for layer in layers if layer.module in masks],
            lambda module: compress(module, mask=masks[module]),
        )

    def _mask(self, layer: Layer, generator: torch.Generator) -> WeightMask | None:
        """Return the mask of a convolution, or None where its kernel is too small for one."""
        weight = layer.module.weight
        filters, channels, height, width = weight.shape
        if self.pattern == "random":
            enough = height * width > self.kernel
            return random_mask(weight.shape, self.kernel, generator) if enough else None
        supports = kernel_supports((height, width), self.kernel)
        if len(supports) < 2:
            return None
        if self.full:
            phases = torch.arange((self.period or 8) - 1, device="cpu") % len(supports)
            bank = torch.cat((torch.ones_like(supports[:1]), supports[phases]))
        else:
            bank = supports.roll(1, dims=0)
        return periodic_mask(filters, channels, bank)


def _maskable(layers: list[Layer]) -> list[Layer]:
    """Leave out 1x1 convolutions, linear layers, and the stem or else the first convolution."""
    convolutions = [layer for layer in layers if layer.shape != "linear"]
    exempt = [layer for layer in convolutions if layer.part == "stem"] or convolutions[:1]
    return [
        layer
        for layer in convolutions
        if layer.shape in ("spatial", "depthwise") and layer not in exempt
    ]
