"""Binary weights and activations, or ternary ones, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.activations import ActivationQuantizer, Estimator, QuantizedActivation
from models.binary_quantizers import BinaryQuantizer, TernarySignQuantizer
from models.blocks import BlockNetwork
from models.calls import ModelError
from models.layers import compress
from models.methods import Kind, Method, method
from models.surgery import (
    Layer,
    activation_modules,
    declared_parts,
    quantized_layers,
    replace_layers,
    replace_modules,
    weight_layers,
)

#: Options that say how activations are quantized, so mean nothing where they are not.
_OF_ACTIVATIONS = ("ternary_activations", "estimator", "beta", "placement", "padding")


@method("binary")
@dataclass(frozen=True, kw_only=True)
class Binary(Method):
    """Binary weights and activations of Stadtmann, Latotzke and Gemmeke (ICMLA 2020).

    "From Quantitative Analysis to Synthesis of Efficient Binary Neural Networks", doi
    10.1109/ICMLA51294.2020.00024. models.binary_quantizers states the weights and their gradient,
    models.activations the activations and theirs. Latent weights, and biases of quantized layers,
    are held to [-1, 1] after each optimizer step (see models.surgery.after_step). Images and batch
    norm stay float32.

    `ternary_weights` makes the weights of chosen layers ternary (TernarySignQuantizer): digit k is
    for layer k, 1 = ternary, 0 = binary. `ternary_activations` does so for what layer k hands to
    layer k + 1 (`placement=activation`: for the activation module k). Both take the paper's strings
    of digits, quoted, or all.

    `activations=float` leaves the activations as they are, so that only the weights are binary
    (BinaryConnect; with `scale=xnor` the BWN of Rastegari et al.). `estimator`, and for swish
    `beta` (10), choose the gradient of quantized activations. `padding` is that of convolutions
    with quantized inputs: replicated values are -1 or +1 too, zeros would be a third value.

    What is `auto` follows the paper in its own networks (models.blocks.BlockNetwork), where a batch
    norm follows each layer, and elsewhere XNOR-Net and Bi-Real Net (Liu et al., ECCV 2018):

    - `placement`: where activations are quantized. `activation`, auto in the paper's networks: in
      place of the activation modules. `input`, auto elsewhere: each quantized layer but the stem
      quantizes its input, and the activation modules go, so that what flows along a shortcut stays
      real.
    - `scale`: none in the paper's networks; elsewhere xnor, one scale per filter of binary weights,
      rounded to bfloat16 where activations are quantized. Inputs have no scale in either.
    - `first`, `last`: whether the weights of stem and head are binary, as in the paper's networks,
      or float, as elsewhere.
    - `order`: the order of layers in the paper's networks. auto is CPBA, which the paper
      recommends, whatever they were built with.

    Networks of depthwise convolutions (mobilenetv2, efficientnetb0) learn little with binary
    activations; `binary-bwn` leaves theirs in float.

    Deviations from the authors' code, undone by `original=true`: see `binarize` and
    ActivationQuantizer. Theirs also gives float first and last layers of VGGNet7 a bias, whatever
    was asked for.

    Published test accuracy: LeNet5 on MNIST 99.16 % (float 99.50 %), VGGNet7 on CIFAR-10 89.85 %
    (float 94.05 %), both with bnn and CPBA. BWN (Rastegari et al.): ResNet-18 on ImageNet
    60.8 % (float 69.3 %).
    """

    kind: ClassVar[Kind] = Kind.QUANTIZER
    short_forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bwn": {"activations": "float", "scale": "xnor"},
    }

    activations: Literal["binary", "float"] = "binary"
    ternary_weights: str | None = None
    ternary_activations: str | None = None
    estimator: Estimator = "bnn"
    beta: float | None = None
    padding: Literal["replicate", "zeros"] = "replicate"
    placement: Literal["auto", "activation", "input"] = "auto"
    order: Literal["auto", "CBAP", "CPBA"] = "auto"
    first: Literal["auto", "binary", "float"] = "auto"
    last: Literal["auto", "binary", "float"] = "auto"
    scale: Literal["auto", "xnor"] | None = "auto"
    original: bool = False

    def __post_init__(self) -> None:
        if self.activations == "float":
            idle = [
                name for name in _OF_ACTIVATIONS if getattr(self, name) != getattr(Binary, name)
            ]
            if idle:
                raise ModelError(f"binary: {idle[0]} has no effect with activations=float")
        if self.beta is not None and self.estimator != "swish":
            raise ModelError(f"binary: beta has no effect with estimator={self.estimator}")
        if self.beta is not None and self.beta <= 0:
            raise ModelError(f"binary: beta must be above 0, not {self.beta}")
        if self.scale == "xnor" and self.ternary_weights == "all":
            raise ModelError("binary: scale=xnor has no effect with ternary_weights=all")

    def apply(self, model: nn.Module) -> list[str]:
        layers = weight_layers(model)
        if any(layer.quantized for layer in layers):
            raise ModelError(f"{type(model).__name__} already has quantized layers")
        chosen = self._without_float_ends(model, layers)
        weight_quantizers = self._weight_quantizers(model, layers)
        self._set_order(model)
        behind_stem = _behind_stem(layers) if self.activations == "binary" else []
        input_quantizers = self._place_activations(model, behind_stem)
        compressed = {
            layer.module: compress(
                layer.module,
                weight_quantizer=weight_quantizers[layer.name],
                input_quantizer=input_quantizers.get(layer.name),
                clip=1.0,
                padding_mode=self.padding if layer in behind_stem and _pads(layer) else None,
            )
            for layer in chosen
        }
        return replace_layers(model, chosen, lambda layer: compressed[layer])

    def _without_float_ends(self, model: nn.Module, layers: list[Layer]) -> list[Layer]:
        parts = declared_parts(model)
        kept_float = set()
        for option, part in (("first", "stem"), ("last", "head")):
            precision = getattr(self, option)
            if precision == "float" and part not in parts:
                raise ModelError(
                    f"binary: {option}=float needs to know the {part} of {type(model).__name__}, "
                    "which declares none"
                )
            if precision == "float" or (precision == "auto" and not _of_the_paper(model)):
                kept_float.add(part)
        return [layer for layer in layers if layer.part not in kept_float]

    def _weight_quantizers(
        self, model: nn.Module, layers: list[Layer]
    ) -> dict[str, BinaryQuantizer | TernarySignQuantizer]:
        """Return the quantizer of each layer, by name."""
        scale = self.scale
        if scale == "auto":
            scale = None if _of_the_paper(model) else "xnor"
        binary = BinaryQuantizer(
            scale=scale,
            exact_sums=scale == "xnor" and self.activations == "binary",
            dead_zone=self.original,
        )
        ternary = _digits(model, "ternary_weights", self.ternary_weights, len(layers))
        return {
            layer.name: TernarySignQuantizer() if is_ternary else binary
            for layer, is_ternary in zip(layers, ternary, strict=True)
        }

    def _set_order(self, model: nn.Module) -> None:
        if isinstance(model, BlockNetwork):
            if self.order != "auto":
                model.order = self.order
            elif self.activations == "binary":
                model.order = "CPBA"
        elif self.order != "auto":
            raise ModelError(
                f"binary: order={self.order} needs a network whose blocks have an order, such as "
                f"lenet5 or vggnet7; {type(model).__name__} has none"
            )

    def _place_activations(
        self, model: nn.Module, behind_stem: list[Layer]
    ) -> dict[str, QuantizedActivation]:
        """Replace the activation modules; return what quantizes the inputs of layers, by name."""
        if self.activations == "float":
            return {}
        placement = self.placement
        if placement == "auto":
            placement = "activation" if _of_the_paper(model) else "input"
        modules = _activations(model)
        places = len(modules) if placement == "activation" else len(behind_stem)
        if not places:
            raise ModelError(
                f"binary: {type(model).__name__} has no activations to quantize with "
                f"placement={placement}; activations=float quantizes weights alone"
            )
        ternary = _digits(model, "ternary_activations", self.ternary_activations, places)
        quantizers = [self._activation(is_ternary) for is_ternary in ternary]
        if placement == "activation":
            replace_modules(model, dict(zip(modules, quantizers, strict=True)))
            return {}
        replace_modules(model, {module: nn.Identity() for module in modules})
        names = [layer.name for layer in behind_stem]
        return dict(zip(names, quantizers, strict=True))

    def _activation(self, ternary: bool) -> QuantizedActivation:
        quantizer = ActivationQuantizer(
            ternary=ternary,
            estimator=self.estimator,
            beta=10.0 if self.beta is None else self.beta,
            original=self.original,
        )
        return QuantizedActivation(quantizer)


def latent_regularization(model: nn.Module, original: bool = False) -> Tensor:
    """Return the penalty that draws latent weights to -1 and +1, to be added to the loss.

        R = sum over the latent weights and biases of (1 - w^2)           dR/dw = -2 w

    With `original`, the gradient is that of the code of Stadtmann et al., -2 Q(w) with the used
    weight Q(w): it takes the derivative where the used values stand in for the latent ones. Biases
    are used as they are. Raises ModelError for a network without latent weights.
    """
    terms = []
    for _, layer in quantized_layers(model):
        if layer.clip is None:
            continue
        for latent in layer.parameters(recurse=False):
            penalty = (1 - latent.square()).sum()
            if original and latent is layer.weight:
                linear = -2 * (layer.used_weight().detach() * latent).sum()
                penalty = linear + (penalty - linear).detach()
            terms.append(penalty)
    if not terms:
        raise ModelError(f"{type(model).__name__} has no latent weights to regularize")
    return torch.stack(terms).sum()


def _of_the_paper(model: nn.Module) -> bool:
    return isinstance(model, BlockNetwork)


def _behind_stem(layers: list[Layer]) -> list[Layer]:
    """Return the layers that do not read images: all but the stem, or else the first."""
    stem = [layer for layer in layers if layer.part == "stem"] or layers[:1]
    return [layer for layer in layers if layer not in stem]


def _activations(model: nn.Module) -> list[nn.Module]:
    """Return the activations to quantize; those of a block network are named `activation<k>`."""
    return [
        module
        for name, module in activation_modules(model)
        if name.startswith("activation") or not _of_the_paper(model)
    ]


def _pads(layer: Layer) -> bool:
    return isinstance(layer.module, nn.Conv2d) and layer.module.padding not in ("valid", (0, 0))


def _digits(model: nn.Module, option: str, text: str | None, count: int) -> list[bool]:
    """Read one digit per layer, or a word for all of them: whether it is ternary."""
    if text in ("all", None):
        return [text == "all"] * count
    if len(text) != count or set(text) - {"0", "1"}:
        raise ModelError(
            f"binary: {option}={text!r} is not valid for {type(model).__name__}; it is all, none "
            f"or {count} digits 0 or 1 in quotes"
        )
    return [digit == "1" for digit in text]
