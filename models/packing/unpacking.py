"""From a packed file to a network: models.unpack."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.calls import ModelError
from models.create import create_model
from models.layers import CompressedLayer, StoresWeight
from models.packing.file import Description, check_size, read_file
from models.packing.remaining import (
    folded_norm,
    remaining_tensors,
    set_norm,
    without_quantizers,
)
from models.packing.weights import Weight, check_bank, decode_weight, weight_in
from models.pattern_layers import FrozenConv2d
from models.surgery import fold, set_blueprint
from models.tracing import weight_of


def unpack(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Return the folded network of a packed file: in eval mode, on the CPU, of plain layers.

    It gives on a CPU the very logits of models.fold(model) for the network that was packed, bit for
    bit, if both lie in memory in the same way (contiguous, until told otherwise) and no batch norm
    reads a slice; a zero may have lost its sign. With rest="float16" it gives nearly the same. The
    network is made by the blueprint in the file, or it is a copy of `model`, built in the same way
    as the packed one, with the weights of the file. Nothing in the file is executed. Raises
    ModelError.
    """
    path = Path(path)
    description, tensors, size = read_file(path)
    try:
        values = {layer.name: decode_weight(layer, tensors) for layer in description.layers}
        network = build_network(description, size) if model is None else copy.deepcopy(model)
        _fill(network, description, values, tensors)
    except ModelError as error:
        raise ModelError(f"{path} cannot be unpacked: {error}") from None
    return fold(network).eval()


def build_without_data(arguments: dict[str, Any]) -> nn.Module:
    """Build a network on the meta device."""
    with torch.device("meta"):
        return create_model(**arguments)


def build_network(description: Description, size: int) -> nn.Module:
    """Build the network of a file: without data, but for frozen banks that a seed stands for.

    Nothing is built that is larger than the file can hold.
    """
    arguments = description.blueprint
    if arguments is None:
        raise ModelError(
            "it has no blueprint, because create_model did not make the network; give a network "
            "that is built like the packed one"
        )
    plain = build_without_data({**arguments, "method": "float", "blurpool": False})
    check_size(_values_of(plain), size)
    network = build_without_data(arguments)
    check_size(_values_of(network), size)
    if any(layer.format == "seed" for layer in description.layers):
        network = create_model(**arguments)
    return network


def _values_of(network: nn.Module) -> int:
    """Return how many values a network holds, also in frozen banks."""
    return sum(value.numel() for value in (*network.parameters(), *network.buffers()))


def _fill(
    network: nn.Module,
    description: Description,
    weights: dict[str, Weight],
    tensors: dict[str, Tensor],
) -> None:
    """Give a network the values of a file. Raises ModelError where it is of another make."""
    of_layers = {name for layer in description.layers for name in layer.tensors}
    remaining = {name: value.float() for name, value in tensors.items() if name not in of_layers}
    expected = set(remaining) | {f"{name}.weight" for name in weights} | set(description.tied)
    parameters: dict[str, nn.Parameter] = {}
    filled: set[str] = set()
    for name, module in list(without_quantizers(network)):
        prefix = f"{name}." if name else ""
        for key, shape in _keys(prefix, module):
            source = description.tied.get(key, key)
            weight = weights.get(source.removesuffix(".weight"))
            value = remaining.get(source) if weight is None else weight.values
            found = getattr(value, "shape", None) if weight is None else weight.shape
            if found != shape:
                raise ModelError(f"the file has no {key} of the shape {tuple(shape)}")
            filled.add(key)
            if value is not None and source not in parameters:
                parameters[source] = nn.Parameter(value)
        _fill_module(name, prefix, module, description.tied, weights, parameters)
    if expected - filled:
        raise ModelError(f"the network has no {min(expected - filled)}")
    refuse_meta(network)
    set_blueprint(network, None)


def _keys(prefix: str, module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Yield the names in the file, and the shapes, of what is stored of a module."""
    weight = weight_of(module)
    if weight is not None:
        yield f"{prefix}weight", weight.shape
    for suffix, value in remaining_tensors(module).items():
        yield f"{prefix}{suffix}", value.shape


def _fill_module(
    name: str,
    prefix: str,
    module: nn.Module,
    tied: dict[str, str],
    weights: dict[str, Weight],
    parameters: dict[str, nn.Parameter],
) -> None:
    def parameter(suffix: str) -> nn.Parameter:
        return parameters[tied.get(f"{prefix}{suffix}", f"{prefix}{suffix}")]

    norm = folded_norm(module)
    if norm is not None:
        set_norm(norm, parameter("scale").data, parameter("shift").data)
        return
    for suffix in remaining_tensors(module):
        if suffix in module._parameters:
            setattr(module, suffix, parameter(suffix))
        else:
            module._buffers[suffix] = parameter(suffix).data
    if weight_of(module) is None:
        return
    weight = weights.get(tied.get(f"{prefix}weight", f"{prefix}weight").removesuffix(".weight"))
    if weight is not None and weight.values is None:
        check_bank(name, weight.bank, weight_in(name, module).bank)
    elif isinstance(module, FrozenConv2d):
        if weight is None or weight.bank is None:
            raise ModelError(f"{name} has a bank of patterns, and the file has another weight")
        origin = dict(weight.bank)
        sha256 = bytes.fromhex(origin.pop("sha256"))
        module.set_bank(parameter("weight").data, origin, sha256)
    else:
        if isinstance(module, CompressedLayer):
            _check_mask(name, module, weight)
            module.weight_quantizer = None
        if "weight" in module._parameters:
            module.weight = parameter("weight")
        else:
            module._buffers["weight"] = parameter("weight").data
        if isinstance(module, StoresWeight) and not torch.equal(
            module.used_weight(), parameter("weight")
        ):
            raise ModelError(f"{name} does not compute with the weight that it is given")


def _check_mask(name: str, layer: CompressedLayer, weight: Weight | None) -> None:
    ours = None if layer.mask is None else layer.mask.full().bool().cpu()
    theirs = None if weight is None else weight.mask
    if (ours is None) != (theirs is None) or (
        ours is not None and theirs is not None and not torch.equal(ours, theirs)
    ):
        raise ModelError(f"{name} has another mask in the file than in the network")


def refuse_meta(model: nn.Module) -> None:
    """Raise ModelError for a network without values."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise ModelError(f"{name} has no values (it is on the meta device)")
