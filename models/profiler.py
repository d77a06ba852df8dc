"""What a network costs: parameters, operations, stored bytes and activation memory, by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.calls import ModelError
from models.layers import QuantizedLayer
from models.surgery import Part, weight_layers

_FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerProfile:
    """One module that owns parameters or running statistics. Sizes are for one image.

    `density` is the share of non-zero entries in the weight that the layer computes with, None
    where there are no values to look at (meta device) or no weight matrix. `scales` is the number
    of float32 scales stored beside the weights. `statistics` counts BN running means and variances.
    """

    name: str
    kind: str
    part: Part
    output_shape: tuple[int, ...]
    parameters: int
    weights: int
    statistics: int
    scheme: str
    bits: int
    scales: int
    density: float | None
    macs: int
    activation_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Weights in `bits` each, filled up to a whole byte; everything else in float32."""
        others = self.parameters - self.weights + self.statistics + self.scales
        return (self.weights * self.bits + 7) // 8 + 4 * others

    @property
    def float32_bytes(self) -> int:
        """The same layer with every value in float32."""
        return 4 * (self.parameters + self.statistics)

    def to_dict(self) -> dict[str, Any]:
        """Return fields and sizes as plain data for JSON."""
        return asdict(self) | {
            "output_shape": list(self.output_shape),
            "stored_bytes": self.stored_bytes,
            "float32_bytes": self.float32_bytes,
        }


@dataclass(frozen=True)
class Profile:
    """The layers of a network and their totals, for one image of `input_shape` (C, H, W)."""

    input_shape: tuple[int, int, int]
    layers: tuple[LayerProfile, ...]

    @property
    def parameters(self) -> int:
        """Trainable values; a parameter that two layers share counts once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def quantized_weights(self) -> int:
        """Weights stored in fewer than 32 bits."""
        return sum(layer.weights for layer in self.layers if layer.bits < _FLOAT_BITS)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of the convolutions and linear layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Size of the network as stored: weights by scheme, scales, biases and BN in float32."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def float32_bytes(self) -> int:
        """Size of the same network with every value in float32."""
        return sum(layer.float32_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller the stored network is than the float32 one."""
        return self.float32_bytes / self.stored_bytes

    @property
    def ideal_ratio(self) -> float:
        """The ratio as papers count it: bits, not bytes, and without BN running statistics."""
        stored = sum(
            layer.bits * layer.weights
            + _FLOAT_BITS * (layer.parameters - layer.weights + layer.scales)
            for layer in self.layers
        )
        return _FLOAT_BITS * self.parameters / stored

    @property
    def density(self) -> float | None:
        """Share of non-zero weights over all convolutions and linear layers; None on meta."""
        known = [layer for layer in self.layers if layer.density is not None]
        weights = sum(layer.weights for layer in known)
        if not weights:
            return None
        return sum((layer.density or 0.0) * layer.weights for layer in known) / weights

    @property
    def activation_bytes(self) -> int:
        """Float32 bytes of the outputs of all listed layers for one image."""
        return sum(layer.activation_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return totals and layers as plain data for JSON."""
        return {
            "input_shape": list(self.input_shape),
            "parameters": self.parameters,
            "quantized_weights": self.quantized_weights,
            "macs": self.macs,
            "stored_bytes": self.stored_bytes,
            "float32_bytes": self.float32_bytes,
            "ratio": self.ratio,
            "ideal_ratio": self.ideal_ratio,
            "density": self.density,
            "activation_bytes": self.activation_bytes,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def profile(model: nn.Module, image_size: int) -> Profile:
    """Profile a network for square images of `image_size` pixels.

    Shapes come from a forward pass of one image through a copy on the meta device, so the model,
    its mode and the random state stay as they are, and the model may itself be on meta. The number
    of input channels is that of the first convolution. Raises ModelError when the network does
    not take such an image.
    """
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if channels is None:
        raise ModelError(f"{type(model).__name__} has no convolution to take images with")
    input_shape = (channels, image_size, image_size)
    traces = _trace(model, input_shape)
    known = {layer.name: layer for layer in weight_layers(model)}
    counted: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        if not _own_tensors(module):
            continue
        layer = known.get(name)
        rows.append(
            _profile_module(
                name,
                module,
                kind=layer.shape if layer else type(module).__name__,
                part=layer.part if layer else "body",
                trace=traces.get(name, _Trace()),
                counted=counted,
            )
        )
    return Profile(input_shape, tuple(rows))


@dataclass
class _Trace:
    """What one module did in the forward pass: its last output shape and its output elements."""

    output_shape: tuple[int, ...] = ()
    elements: int = 0


def _trace(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, _Trace]:
    shadow = copy.deepcopy(model).to(device="meta", dtype=torch.float32).eval()
    traces: dict[str, _Trace] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                trace = traces.setdefault(name, _Trace())
                trace.output_shape = tuple(output.shape[1:])
                trace.elements += output.numel()

        return hook

    for name, module in shadow.named_modules():
        module.register_forward_hook(record(name))
    try:
        with torch.no_grad():
            shadow(torch.empty(1, *input_shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, input_shape))
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{type(model).__name__} does not take images of {shape}: {reason}"
        ) from error
    return traces


def _profile_module(
    name: str, module: nn.Module, *, kind: str, part: Part, trace: _Trace, counted: set[int]
) -> LayerProfile:
    """Describe one module; `counted` holds the ids of the parameters that others have counted."""
    own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
    counted.update(map(id, own))
    weight = module.weight if isinstance(module, nn.Conv2d | nn.Linear) else None
    quantizer = module.weight_quantizer if isinstance(module, QuantizedLayer) else None
    weights = 0 if weight is None or not any(weight is p for p in own) else weight.numel()
    return LayerProfile(
        name=name,
        kind=kind,
        part=part,
        output_shape=trace.output_shape,
        parameters=sum(p.numel() for p in own),
        weights=weights,
        statistics=sum(b.numel() for b in module.buffers(recurse=False) if b.is_floating_point()),
        scheme=quantizer.scheme if quantizer else "float32",
        bits=quantizer.bits if quantizer else _FLOAT_BITS,
        scales=quantizer.scales if quantizer else 0,
        density=_density(module, weight),
        # Every output element of a convolution or linear layer is a dot product with one filter.
        macs=0 if weight is None else trace.elements * weight[0].numel(),
        activation_bytes=4 * trace.elements,
    )


def _own_tensors(module: nn.Module) -> bool:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(tensors)


def _density(module: nn.Module, weight: Tensor | None) -> float | None:
    if weight is None or weight.is_meta:
        return None
    with torch.no_grad():
        used = module.quantized_weight() if isinstance(module, QuantizedLayer) else weight
        return float(used.count_nonzero()) / used.numel()
