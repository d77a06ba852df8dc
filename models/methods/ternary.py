"""Ternary weights: statistical scaling and residual expansion, and two earlier rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from models.calls import ModelError
from models.layers import CompressedConv2d, CompressedLinear, PlainLayer, compress
from models.methods import Kind, Method, method
from models.quantizers import WeightQuantizer
from models.surgery import declared_parts, replace_layers, weight_layers
from models.ternary_quantizers import (
    TernaryQuantizer,
    TernaryWeightNetworkQuantizer,
    TrainedTernaryQuantizer,
)

_FACTORS = {1: (0.05,), 2: (0.05, 0.10), 4: (0.05, 0.10, 0.15, 0.20)}


@method("ternary")
@dataclass(frozen=True, kw_only=True)
class Ternary(Method):
    """Ternary weights of He, Gong and Fan (WACV 2019, arXiv 1807.07948), or of TWN or TTQ.

    Every convolution and linear layer computes with the kernel, and learns with the gradient, that
    a quantizer of models.ternary_quantizers states: `rule=he` TernaryQuantizer, `rule=twn`
    TernaryWeightNetworkQuantizer, `rule=ttq` TrainedTernaryQuantizer. Activations, biases and batch
    norm stay float32. `first_last=float` keeps stem and head in float32; shortcuts are ternary
    either way.

    The other arguments are for `rule=he`. `expansion` is the paper's t_ex, the number of ternary
    branches per layer, here one layer with the summed kernel. `thresholds` replaces the paper's
    factors 0.05, 0.10, 0.15, 0.20, one per branch.

    Deviations from the authors' code, undone by `original=true`: the bias is added once instead of
    once per branch (with a gradient as many times larger), and a weight at -Delta is kept like one
    at +Delta.

    Published top-1 on ImageNet, all layers ternary: ResNet-18 66.01 %, with two and four branches
    68.35 and 69.44 % (float 69.75 %); ResNet-50 74.00 % (float 76.13 %). ResNet-18 by the other two
    rules, with first and last layer in float (`first_last=float`, which their short forms do not
    set): TWN 61.8 %, TTQ 66.6 % (float 70.3 %; as listed by Yang et al., CVPR 2019, arXiv
    1911.09464).
    """

    kind: ClassVar[Kind] = Kind.QUANTIZER
    short_forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "x2": {"expansion": 2},
        "x4": {"expansion": 4},
        "twn": {"rule": "twn"},
        "ttq": {"rule": "ttq"},
    }

    rule: Literal["he", "twn", "ttq"] = "he"
    expansion: Literal[1, 2, 4] = 1
    thresholds: tuple[float, ...] | None = None
    first_last: Literal["ternary", "float"] = "ternary"
    original: bool = False

    def __post_init__(self) -> None:
        defaults = {"expansion": 1, "thresholds": None, "original": False}
        idle = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.rule != "he" and idle:
            raise ModelError(f"ternary: {idle[0]} has no effect with rule={self.rule}")
        if self.thresholds is None:
            return
        if len(self.thresholds) != self.expansion:
            raise ModelError(
                f"ternary: expansion={self.expansion} needs {self.expansion} thresholds, "
                f"not {len(self.thresholds)}"
            )
        rising = all(a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False))
        if not rising or not all(0 < factor < 1 for factor in self.thresholds):
            raise ModelError(
                "ternary: thresholds are fractions of the largest weight: rising, each between "
                f"0 and 1, not {self.thresholds}"
            )

    def apply(self, model: nn.Module) -> list[str]:
        layers = weight_layers(model)
        if any(layer.quantized for layer in layers):
            raise ModelError(f"{type(model).__name__} already has quantized layers")
        if self.first_last == "float":
            missing = {"stem", "head"} - declared_parts(model)
            if missing:
                raise ModelError(
                    f"ternary: first_last=float needs to know the {' and '.join(sorted(missing))} "
                    f"of {type(model).__name__}, which declares none"
                )
            layers = [layer for layer in layers if layer.part not in ("stem", "head")]
        return replace_layers(model, layers, self._layer)

    def _layer(self, layer: PlainLayer) -> CompressedConv2d | CompressedLinear:
        bias_terms = self.expansion if self.original else 1
        return compress(layer, weight_quantizer=self._quantizer(layer), bias_terms=bias_terms)

    def _quantizer(self, layer: PlainLayer) -> WeightQuantizer:
        match self.rule:
            case "twn":
                return TernaryWeightNetworkQuantizer()
            case "ttq":
                return TrainedTernaryQuantizer(layer.weight)
            case "he":
                factors = self.thresholds or _FACTORS[self.expansion]
                return TernaryQuantizer(factors, strict_negative_edge=self.original)
