"""What a network costs, as figures: of each layer, and in all."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from models.storage import FORMATS, Storage
from models.surgery import Part
from models.torchstat import Torchstat

_FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerProfile:
    """One module that owns parameters or running statistics. Sizes are for one image.

    `weights` is the number of stored weights, in the form that `storage` describes; both are empty
    for a module without a weight matrix and for a weight that another layer has brought already.
    `masked` counts the pre-defined zeros, which are no parameters. `others` are the learned float32
    values beside the weight (biases, batch norm), `learned_scales` those that belong to its
    quantizer.

    `remaining` counts the values that inference needs beside the weight, `remaining_bytes` is what
    they take: of a batch norm a scale and a shift per channel. `float16` says that a weight which
    is any float is stored in half as many bytes.

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
    remaining: int
    remaining_bytes: int
    float16: bool
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
        return 4 * (self.weights + self.masked + self.remaining)

    @property
    def stored_bytes(self) -> int:
        """The weight in its default format, and everything else."""
        return self.stored_bytes_in(None)

    def stored_bytes_in(self, format: str | None) -> int:
        """Bytes with the weight in a format, in the default one where that cannot hold it."""
        weight = 0
        if self.storage is not None:
            weight = self.storage.stored_bytes(self.storage.possible(format))
            weight -= 2 * self.weights if self.float16 else 0
        return weight + self.remaining_bytes

    def parameter_bits(self, format: str | None = None) -> float:
        """Bits as papers count them: nothing filled up, neither statistics nor mask.

        Codes are of whole bits, unless a format is named.
        """
        bits = float(_FLOAT_BITS * self.others)
        if self.storage is not None:
            possible = self.storage.possible(format) or self.storage.published_format
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
        """Size as stored: weights in their default formats, and everything else.

        It is what models.pack writes with the same options, to the byte, without the header.
        """
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
        """Size in bits as papers count it: parameters and scales, nothing filled up.

        Without a format, in codes of whole bits and seeds.
        """
        return sum(layer.parameter_bits(format) for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller the network is as stored than with every value in float32."""
        return self.float32_bytes / self.stored_bytes

    @property
    def ideal_ratio(self) -> float:
        """The ratio as papers count it: codes of whole bits, not bytes.

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
