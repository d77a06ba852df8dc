"""Binary weights and activations, or ternary ones, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.activations import ActivationQuantizer, Estimator, QuantizedActivation
from models.binary_quantizers import BinaryQuantizer, TernarySignQuantizer
from models.blocks import BlockNetwork, BlockOrder
from models.calls import ModelError
from models.layers import compress
from models.methods import Kind, Method, method
from models.surgery import (
    Layer,
    Part,
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
    for layer k, 1 = ternary, 0 = binary. `ternary_activations` does so for activations: digit k is
    for the activation module k (`placement=activation`), or for what is read by layer k of those
    behind the stem (`placement=input`). Layers and modules count in their order of registration,
    also those that stay float, whose digit is 0. Both options take the paper's strings of digits,
    quoted, or all.

    `activations=float` leaves the activations as they are, so that only the weights are binary
    (BinaryConnect; with `scale=xnor` the BWN of Rastegari et al.). `estimator`, and for swish
    `beta` (10), choose the gradient of quantized activations. `padding` is that of convolutions
    with quantized inputs: replicated values are -1 or +1 too, zeros would be a third value.

    What is `auto` follows the paper in its own networks (models.blocks.BlockNetwork), where a batch
    norm follows each layer, and elsewhere XNOR-Net and Bi-Real Net (Liu et al., ECCV 2018):

    - `placement`: where activations are quantized. `activation`, auto in the paper's networks: in
      place of the activation modules. `input`, auto elsewhere: each quantized layer but the stem
      quantizes its input, and the activation modules go, so that what flows along a shortcut stays
      real. Activations must be modules: a functional one stays, and no value behind it is negative.
    - `scale`: none in the paper's networks; elsewhere xnor, one scale per filter of binary weights,
      rounded to bfloat16 where activations are quantized. Inputs have no scale in either.
    - `first`, `last`: whether the weights of stem and head (of the first and the last layer, where
      the network declares none) are binary, as in the paper's networks, or float, as elsewhere.
    - `order`: the order of layers in the paper's networks. auto is the one that they were built
      with, or else CPBA, which the paper recommends.

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

    def apply(self, model: nn.Module) -> list[str]:
        layers = weight_layers(model)
        if any(layer.quantized for layer in layers):
            raise ModelError(f"{type(model).__name__} already has quantized layers")
        chosen = self._without_float_ends(model, layers)
        if not chosen:
            return []
        weight_quantizers = self._weight_quantizers(model, layers, chosen)
        order = self._order(model)
        replacements: dict[nn.Module, nn.Module] = {}
        input_quantizers: dict[str, QuantizedActivation] = {}
        padded: list[Layer] = []
        if self.activations == "binary":
            stem = _declared_or_else(model, layers, "stem", layers[:1])
            behind_stem = [layer for layer in layers if layer not in stem]
            replacements, input_quantizers = self._place_activations(model, behind_stem, chosen)
            padded = [layer for layer in behind_stem if layer in chosen and _pads(layer)]
            if self.padding == "zeros" and not padded:
                raise ModelError(
                    "binary: padding=zeros has no effect: no convolution of "
                    f"{type(model).__name__} with quantized inputs pads them"
                )
        compressed = {
            layer.module: compress(
                layer.module,
                weight_quantizer=weight_quantizers[layer.name],
                input_quantizer=input_quantizers.get(layer.name),
                clip=1.0,
                padding_mode=self.padding if layer in padded else None,
            )
            for layer in chosen
        }
        # Nothing has been changed up to here, where nothing can fail any more.
        if isinstance(model, BlockNetwork):
            model.order = order
        replace_modules(model, replacements)
        return replace_layers(model, chosen, lambda layer: compressed[layer])

    def _without_float_ends(self, model: nn.Module, layers: list[Layer]) -> list[Layer]:
        kept_float: list[Layer] = []
        if self._is_float(self.first, model):
            kept_float += _declared_or_else(model, layers, "stem", layers[:1])
        if self._is_float(self.last, model):
            kept_float += _declared_or_else(model, layers, "head", layers[-1:])
        return [layer for layer in layers if layer not in kept_float]

    def _is_float(self, precision: Literal["auto", "binary", "float"], model: nn.Module) -> bool:
        return precision == "float" or (precision == "auto" and not _of_the_paper(model))

    def _weight_quantizers(
        self, model: nn.Module, layers: list[Layer], chosen: list[Layer]
    ) -> dict[str, BinaryQuantizer | TernarySignQuantizer]:
        """Return the quantizer of each chosen layer, by name."""
        names = [layer.name for layer in layers]
        ternary = _digits(model, "ternary_weights", self.ternary_weights, names, chosen)
        if self.scale == "xnor" and all(ternary[layer.name] for layer in chosen):
            raise ModelError("binary: scale=xnor has no effect where all weights are ternary")
        scale = self.scale
        if scale == "auto":
            scale = None if _of_the_paper(model) else "xnor"
        binary = BinaryQuantizer(
            scale=scale,
            exact_sums=scale == "xnor" and self.activations == "binary",
            dead_zone=self.original,
        )
        return {
            layer.name: TernarySignQuantizer() if ternary[layer.name] else binary
            for layer in chosen
        }

    def _order(self, model: nn.Module) -> BlockOrder | None:
        """Return the order of a network that has one."""
        if not isinstance(model, BlockNetwork):
            if self.order != "auto":
                raise ModelError(
                    f"binary: order={self.order} needs a network whose blocks have an order, such "
                    f"as lenet5 or vggnet7; {type(model).__name__} has none"
                )
            return None
        if self.order != "auto":
            return self.order
        return "CPBA" if model.order is None and self.activations == "binary" else model.order

    def _place_activations(
        self, model: nn.Module, behind_stem: list[Layer], chosen: list[Layer]
    ) -> tuple[dict[nn.Module, nn.Module], dict[str, QuantizedActivation]]:
        """Return what takes the place of activation modules, and what quantizes inputs of layers.

        The first is by module, the second by layer name.
        """
        of_network = dict(activation_modules(model))
        modules = {
            name: module
            for name, module in of_network.items()
            if name.startswith("activation") or not _of_the_paper(model)
        }
        placement = self.placement
        if placement == "auto":
            placement = "activation" if _of_the_paper(model) else "input"
        if placement == "input" and len(modules) < len(of_network):
            real = ", ".join(name for name in of_network if name not in modules)
            raise ModelError(
                f"binary: placement=input would quantize what {real} of {type(model).__name__} "
                "hand on as real values; placement=activation does not"
            )
        in_place = placement == "activation"
        places = list(modules) if in_place else [layer.name for layer in behind_stem]
        if not places:
            raise ModelError(
                f"binary: {type(model).__name__} has no activations to quantize with "
                f"placement={placement}; activations=float quantizes weights alone"
            )
        ternary = _digits(
            model,
            "ternary_activations",
            self.ternary_activations,
            places,
            None if in_place else chosen,
        )
        quantizers = {place: self._activation(ternary[place]) for place in places}
        if in_place:
            return {modules[place]: quantizer for place, quantizer in quantizers.items()}, {}
        return {module: nn.Identity() for module in modules.values()}, quantizers

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


def _declared_or_else(
    model: nn.Module, layers: list[Layer], part: Part, otherwise: list[Layer]
) -> list[Layer]:
    """Return the layers of a part, or others where the network declares no such part."""
    if part not in declared_parts(model):
        return otherwise
    return [layer for layer in layers if layer.part == part]


def _pads(layer: Layer) -> bool:
    return isinstance(layer.module, nn.Conv2d) and layer.module.padding not in ("valid", (0, 0))


def _digits(
    model: nn.Module,
    option: str,
    text: str | None,
    places: list[str],
    chosen: list[Layer] | None,
) -> dict[str, bool]:
    """Read one digit per place, or a word for all of them: whether it is ternary.

    Where the places are layers, those that are not `chosen` stay float.
    """
    if text in ("all", None):
        return dict.fromkeys(places, text == "all")
    if len(text) != len(places) or set(text) - {"0", "1"}:
        raise ModelError(
            f"binary: {option}={text!r} is not valid for {type(model).__name__}; it is all, none "
            f"or {len(places)} digits 0 or 1 in quotes"
        )
    ternary = {place: digit == "1" for place, digit in zip(places, text, strict=True)}
    quantized = places if chosen is None else [layer.name for layer in chosen]
    idle = [place for place in places if ternary[place] and place not in quantized]
    if idle:
        raise ModelError(
            f"binary: {option}={text!r} has no effect on {idle[0]}, which stays float: "
            "put a 0 there"
        )
    return ternary
