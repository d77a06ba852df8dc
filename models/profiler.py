"""What a network costs: parameters, operations, stored bytes and activation memory, by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.calls import ModelError
from models.layers import StoresWeight
from models.lowpass import BlurPool2d
from models.storage import FORMATS, Storage
from models.surgery import Layer, Part, constant_buffers, weight_layers
from models.torchstat import Torchstat
from models.tracing import Trace, trace, weight_of

_FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerProfile:
    """One module that owns parameters or running statistics. Sizes are for one image.

    `weights` is the number of stored weights, in the form that `storage` describes; both are empty
    for a module without a weight matrix and for a weight that another layer has brought already.
    `masked` counts the pre-defined zeros, which are no parameters. `others` are the learned float32
    values beside the weight (biases, batch norm), `learned_scales` those that belong to its
    quantizer, `statistics` the running means and variances.

    `nominal_macs`, the papers' count of multiply-accumulates, charges the whole kernel, and that of
    a blur, at each output position, and `kept_macs` charges it without its pre-defined zeros.
    `executed_macs` are those that the layer computes: fewer where it leaves out taps that see only
    padding or are zeros of all its patterns, more where it computes small groups as larger ones.
    `density` is the share of non-zero entries in the weight that the layer computes with, None
    where there are no values to look at.
    """

    name: str
    kind: str
    part: Part
    output_shape: tuple[int, ...]
    weights: int
    masked: int
    others: int
    learned_scales: int
    statistics: int
    storage: Storage | None
    density: float | None
    executed_macs: int
    nominal_macs: int
    kept_macs: int
    activation_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates that the outputs need: neither idle taps nor work done in vain."""
        return min(self.executed_macs, self.nominal_macs or self.executed_macs)

    @property
    def frozen(self) -> int:
        """Weights that are never learned."""
        return self.weights if self.storage is not None and self.storage.frozen else 0

    @property
    def learned(self) -> int:
        """Parameters that training changes."""
        return self.weights - self.frozen + self.others + self.learned_scales

    @property
    def parameters(self) -> int:
        """Learned and frozen parameters."""
        return self.learned + self.frozen

    @property
    def scheme(self) -> str:
        """What the weight is, such as `ternary`."""
        return "float32" if self.storage is None else self.storage.scheme

    @property
    def bits(self) -> float:
        """Bits per weight in the format it is stored in."""
        if self.storage is None or not self.weights:
            return float(_FLOAT_BITS)
        return self.storage.bits() / self.weights

    @property
    def float32_bytes(self) -> int:
        """Every value of this layer, also a frozen or a pre-defined zero one, in float32."""
        return 4 * (self.weights + self.masked + self.others + self.statistics)

    @property
    def stored_bytes(self) -> int:
        """The weight in its default format, everything else in float32."""
        return self.stored_bytes_in(None)

    def stored_bytes_in(self, format: str | None) -> int:
        """Bytes with the weight in a format, in the default one where that cannot hold it."""
        weight = 0
        if self.storage is not None:
            weight = self.storage.stored_bytes(self.storage.possible(format))
        return weight + 4 * (self.others + self.statistics)

    def parameter_bits(self, format: str | None = None) -> float:
        """Bits as papers count them: nothing filled up, neither statistics nor mask."""
        bits = float(_FLOAT_BITS * self.others)
        if self.storage is not None:
            possible = self.storage.possible(format)
            bits += self.storage.bits(possible) + _FLOAT_BITS * self.storage.scales_in(possible)
        return bits

    def to_dict(self) -> dict[str, Any]:
        """Return fields and sizes as plain data for JSON."""
        return asdict(self) | {
            "output_shape": list(self.output_shape),
            "parameters": self.parameters,
            "learned": self.learned,
            "frozen": self.frozen,
            "scheme": self.scheme,
            "bits": self.bits,
            "macs": self.macs,
            "stored_bytes": self.stored_bytes,
            "float32_bytes": self.float32_bytes,
        }


@dataclass(frozen=True)
class Profile:
    """The layers of a network and their totals, for one image of `input_shape` (C, H, W).

    `torchstat` has the totals in the conventions of that program. `peak_activation_bytes` is the
    float32 size of the largest input and output that one module has at the same time: what
    inference needs at least, apart from what shortcuts keep alive.
    """

    input_shape: tuple[int, int, int]
    layers: tuple[LayerProfile, ...]
    torchstat: Torchstat
    peak_activation_bytes: int

    @property
    def parameters(self) -> int:
        """Learned and frozen parameters; one that two layers share counts once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def learned(self) -> int:
        """Parameters that training changes."""
        return sum(layer.learned for layer in self.layers)

    @property
    def frozen(self) -> int:
        """Weights that are never learned."""
        return sum(layer.frozen for layer in self.layers)

    @property
    def masked(self) -> int:
        """Pre-defined zeros: entries of weights that are no parameters."""
        return sum(layer.masked for layer in self.layers)

    @property
    def quantized_weights(self) -> int:
        """Learned weights that are used with few levels."""
        return sum(
            layer.weights
            for layer in self.layers
            if layer.storage is not None and layer.storage.levels is not None and not layer.frozen
        )

    @property
    def by_bits(self) -> dict[float, int]:
        """How many parameters take how many bits each, as stored."""
        counts: Counter[float] = Counter()
        for layer in self.layers:
            counts[layer.bits] += layer.weights
            counts[float(_FLOAT_BITS)] += layer.others + layer.learned_scales
        return {bits: count for bits, count in sorted(counts.items()) if count}

    @property
    def macs(self) -> int:
        """Multiply-accumulates that the convolutions and linear layers need."""
        return sum(layer.macs for layer in self.layers)

    @property
    def executed_macs(self) -> int:
        """Multiply-accumulates that they compute, with those that an implementation adds."""
        return sum(layer.executed_macs for layer in self.layers)

    @property
    def nominal_macs(self) -> int:
        """Multiply-accumulates with the whole kernel at each output position."""
        return sum(layer.nominal_macs for layer in self.layers)

    @property
    def kept_macs(self) -> int:
        """Nominal multiply-accumulates without those by a pre-defined zero."""
        return sum(layer.kept_macs for layer in self.layers)

    @property
    def float32_bytes(self) -> int:
        """Size of this network, frozen banks and all, with every value in float32."""
        return sum(layer.float32_bytes for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Size as stored: weights in their default formats, everything else in float32."""
        return self.stored_bytes_in(None)

    def stored_bytes_in(self, format: str | None) -> int:
        """Size with the weights in one of models.storage.FORMATS, where it can hold them."""
        return sum(layer.stored_bytes_in(format) for layer in self.layers)

    @property
    def by_format(self) -> dict[str, int]:
        """Stored bytes in each format that can hold at least one of the weights."""
        held = {name for layer in self.layers if layer.storage for name in layer.storage.formats}
        return {name: self.stored_bytes_in(name) for name in FORMATS if name in held}

    def parameter_bits(self, format: str | None = None) -> float:
        """Size in bits as papers count it: parameters and scales, nothing filled up."""
        return sum(layer.parameter_bits(format) for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller the network is as stored than with every value in float32."""
        return self.float32_bytes / self.stored_bytes

    @property
    def ideal_ratio(self) -> float:
        """The ratio as papers count it: bits, not bytes, and without running statistics.

        A frozen ternary weight takes two bits, as in the size metric of STeP, not a seed.
        """
        plain = self.parameters - sum(layer.learned_scales for layer in self.layers) + self.masked
        bits = sum(layer.parameter_bits("2-bit" if layer.frozen else None) for layer in self.layers)
        return _FLOAT_BITS * plain / bits

    @property
    def density(self) -> float | None:
        """Share of non-zero weights over all convolutions and linear layers; None on meta."""
        known = [layer for layer in self.layers if layer.density is not None]
        entries = sum(layer.weights + layer.masked for layer in known)
        if not entries:
            return None
        nonzero = sum((layer.density or 0.0) * (layer.weights + layer.masked) for layer in known)
        return nonzero / entries

    @property
    def activation_bytes(self) -> int:
        """Float32 bytes of the outputs of all listed layers for one image."""
        return sum(layer.activation_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return totals and layers as plain data for JSON."""
        return {
            "input_shape": list(self.input_shape),
            "parameters": self.parameters,
            "learned": self.learned,
            "frozen": self.frozen,
            "masked": self.masked,
            "quantized_weights": self.quantized_weights,
            "by_bits": {f"{bits:g}": count for bits, count in self.by_bits.items()},
            "macs": self.macs,
            "executed_macs": self.executed_macs,
            "nominal_macs": self.nominal_macs,
            "kept_macs": self.kept_macs,
            "stored_bytes": self.stored_bytes,
            "by_format": self.by_format,
            "float32_bytes": self.float32_bytes,
            "ratio": self.ratio,
            "ideal_ratio": self.ideal_ratio,
            "density": self.density,
            "activation_bytes": self.activation_bytes,
            "peak_activation_bytes": self.peak_activation_bytes,
            "torchstat": asdict(self.torchstat),
            "layers": [layer.to_dict() for layer in self.layers],
        }


def profile(model: nn.Module, image_size: int) -> Profile:
    """Profile a network for square images of `image_size` pixels.

    Shapes come from a forward pass of one image through a copy on the meta device, so the model,
    its mode and the random state stay as they are, no weight is copied, and the model may itself be
    on meta. The number of input channels is that of the first convolution. Of a compiled network
    the profile is that of the network itself. Raises ModelError when the network does not take such
    an image.
    """
    model = getattr(model, "_orig_mod", model)
    channels = _input_channels(model)
    traced = trace(model, (channels, image_size, image_size))
    known = {layer.name: layer for layer in weight_layers(model, frozen=True)}
    constants = set(constant_buffers(model))
    counted: set[int] = set()
    layers = []
    for name, parts in _rows(model).items():
        layer = _profile_layer(name, parts, known.get(name), traced, constants, counted)
        if layer.storage or layer.parameters or layer.statistics or layer.macs:
            layers.append(layer)
    return Profile(
        (channels, image_size, image_size),
        tuple(layers),
        traced.torchstat,
        traced.peak_activation_bytes,
    )


def _input_channels(model: nn.Module) -> int:
    for module in model.modules():
        weight = weight_of(module)
        if weight is not None and weight.dim() == 4:
            return weight.shape[1] * getattr(module, "groups", 1)
    raise ModelError(f"{type(model).__name__} has no convolution to take images with")


def _rows(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Map the name of each row to the modules that it stands for, itself first.

    A layer with a weight also stands for its mask and its quantizers.
    """
    rows: dict[str, dict[str, nn.Module]] = {}
    claimed: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in claimed:
            continue
        rows[name] = {name: module}
        if weight_of(module) is not None:
            rows[name] |= {
                path: part
                for path, part in module.named_modules(prefix=name)
                if weight_of(part) is None
            }
        claimed.update(rows[name].values())
    return rows


def _profile_layer(
    name: str,
    parts: dict[str, nn.Module],
    layer: Layer | None,
    traced: Trace,
    constants: set[str],
    counted: set[int],
) -> LayerProfile:
    """Describe one row; `counted` holds the ids of the parameters that others have brought."""
    module, calls = parts[name], traced.modules[name]
    own = {id(p): p.numel() for part in parts.values() for p in part.parameters(recurse=False)}
    learned = {key: size for key, size in own.items() if key not in counted}
    counted.update(learned)
    weight = weight_of(module)
    storage = None if weight is None else _storage(module, weight)
    blurs = [path for path, part in parts.items() if isinstance(part, BlurPool2d)]
    nominal = kept = sum(traced.modules[path].macs for path in blurs)
    weights = masked = 0
    if weight is not None and storage is not None:
        nominal += calls.positions * weight.numel()
        kept += calls.positions * storage.count
        if storage.frozen or id(weight) in learned:
            weights, masked = storage.count, weight.numel() - storage.count
            learned.pop(id(weight), None)
    quantizer = getattr(module, "weight_quantizer", None)
    scales = list(quantizer.parameters()) if isinstance(quantizer, nn.Module) else []
    return LayerProfile(
        name=name,
        kind=layer.shape if layer else type(module).__name__,
        part=layer.part if layer else "body",
        output_shape=calls.output_shape,
        weights=weights,
        masked=masked,
        learned_scales=sum(learned.pop(id(scale), 0) for scale in scales),
        others=sum(learned.values()),
        statistics=sum(
            buffer.numel()
            for path, part in parts.items()
            for key, buffer in part.named_buffers(path, recurse=False)
            if buffer.is_floating_point() and key not in constants
        ),
        storage=storage if weights else None,
        density=None if weight is None else _density(module, weight),
        executed_macs=sum(traced.modules[path].macs for path in parts),
        nominal_macs=nominal,
        kept_macs=kept,
        activation_bytes=4 * calls.elements,
    )


def _storage(module: nn.Module, weight: Tensor) -> Storage:
    if isinstance(module, StoresWeight):
        return module.weight_storage()
    return Storage("float32", weight.numel())


def _density(module: nn.Module, weight: Tensor) -> float | None:
    if weight.is_meta:
        return None
    with torch.no_grad():
        used = module.used_weight() if isinstance(module, StoresWeight) else weight
        return float(used.count_nonzero()) / used.numel()
