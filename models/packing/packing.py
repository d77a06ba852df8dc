"""From a network to a packed file: models.pack, models.repack."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.calls import ModelError
from models.packing.file import Description, read_file, write_file
from models.packing.remaining import (
    folded_norm,
    is_finite,
    remaining_tensors,
    stored_float,
    without_quantizers,
)
from models.packing.unpacking import build_network, build_without_data, refuse_meta
from models.packing.weights import (
    PackedLayer,
    Weight,
    check_bank,
    decode_weight,
    encode_weight,
    weight_in,
)
from models.pattern_layers import FrozenConv2d
from models.storage import FloatFormat, check_float_format, check_format
from models.surgery import blueprint
from models.tracing import weight_of


@dataclass(frozen=True)
class PackedFile:
    """A packed network: what its file says, and how large it is.

    `blueprint` are the arguments of create_model for such a network, None where it was not made by
    that. `tensor_bytes` is what the profile of the network calls stored bytes, `file_bytes` the
    whole file.
    """

    path: Path
    metadata: dict[str, Any]
    blueprint: dict[str, Any] | None
    layers: tuple[PackedLayer, ...]
    tensor_bytes: int
    file_bytes: int


class _Contents:
    """What the file of a network holds: each value once, also where several modules share it."""

    def __init__(self, weights: str | None, rest: FloatFormat) -> None:
        self.layers: list[PackedLayer] = []
        self.tensors: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        self._weights, self._rest = weights, rest
        self._values: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def add_weight(self, name: str, module: nn.Module) -> None:
        """Add the weight of a module as it is used, if it has one."""
        weight = weight_of(module)
        if weight is None:
            return
        found = weight_in(name, module)
        if self._is_new(name, "weight", _values(found), weight):
            layer, stored = encode_weight(found, self._weights, self._rest)
            self.layers.append(layer)
            _add(self.tensors, stored)

    def add_remaining(self, name: str, module: nn.Module) -> None:
        """Add what a module has beside its weight; of a norm, scale and shift."""
        is_norm = folded_norm(module) is not None
        shared = {} if is_norm else dict(module.named_parameters(recurse=False))
        for suffix, value in remaining_tensors(module).items():
            key = _key(name, suffix)
            checked = _checked(key, value.cpu())
            if self._is_new(name, suffix, checked, shared.get(suffix)):
                _add(self.tensors, {key: stored_float(checked, self._rest)})

    def _is_new(self, name: str, suffix: str, value: Tensor, parameter: Tensor | None) -> bool:
        """Whether no module before has this parameter; else the two are tied."""
        key = _key(name, suffix)
        source = key if parameter is None else self._names.setdefault(id(parameter), key)
        if source == key:
            self._values[key] = value
            return True
        if not torch.equal(self._values[source], value):
            raise ModelError(f"{name} shares its {suffix} with {source}, but uses another value")
        self.tied[key] = source
        return False


def _key(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if name else suffix


def pack(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    rest: FloatFormat = "float32",
    metadata: dict[str, Any] | None = None,
) -> PackedFile:
    """Write a trained float32 network, not folded, as one small file, and return what it says.

    The file is safetensors with a JSON text in its header (models.packing.file). Each weight is
    stored as it is used in the smallest exact format, or in `weights`, one of
    models.storage.FORMATS, where that can hold it; of a batch norm one scale and one shift per
    channel. `rest="float16"` halves what is any float, unless that would change more than the last
    digits of float16 (models.packing.remaining.fits_float16). `metadata` is plain data of the
    caller's. The sizes are those of models.profile with the same options, to the byte.

    Frozen banks of patterns are not stored, but where they come from. Raises ModelError, and writes
    nothing, where values are not finite or not what their layer says of them, for a network that is
    not in float32, and for one with state of other kinds than floats.
    """
    check_format(weights)
    check_float_format(rest)
    model = getattr(model, "_orig_mod", model)
    refuse_meta(model)
    contents = _Contents(weights, rest)
    for name, module in without_quantizers(model):
        contents.add_weight(name, module)
        contents.add_remaining(name, module)
    description = Description(
        _true_blueprint(model), tuple(contents.layers), contents.tied, metadata or {}
    )
    return _write(Path(path), description, contents.tensors)


def read_packed(path: str | os.PathLike[str]) -> PackedFile:
    """Read what a packed file says, and check the whole of it. Raises ModelError."""
    description, tensors, size = read_file(Path(path))
    return _summary(Path(path), description, tensors, size)


def repack(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    rest: FloatFormat = "float32",
) -> PackedFile:
    """Write a packed network in other formats (see pack). Raises ModelError.

    The weights keep their values; float16 values stay what they are also where float32 is asked
    for. Frozen banks of which the source has the seed alone are drawn again where codes are asked
    for, so the file needs a blueprint then.
    """
    check_format(weights)
    check_float_format(rest)
    source = Path(source)
    description, tensors, size = read_file(source)
    stored: dict[str, Tensor] = {}
    layers = []
    try:
        drawn: nn.Module | None = None
        for packed in description.layers:
            weight = decode_weight(packed, tensors)
            target = weight.storage.possible(weights) or weight.storage.formats[0]
            if weight.values is None and target != "seed":
                drawn = drawn or build_network(description, size)
                bank = dict(drawn.named_modules()).get(packed.name)
                if not isinstance(bank, FrozenConv2d):
                    raise ModelError(f"the network has no bank of patterns {packed.name}")
                weight = weight_in(packed.name, bank)
                check_bank(packed.name, packed.bank, weight.bank)
            layer, codes = encode_weight(weight, weights, rest)
            layers.append(layer)
            stored |= codes
    except ModelError as error:
        raise ModelError(f"{source} cannot be repacked: {error}") from None
    of_layers = {name for layer in description.layers for name in layer.tensors}
    for name in tensors.keys() - of_layers:
        stored[name] = stored_float(tensors[name].float(), rest)
    repacked = Description(
        description.blueprint, tuple(layers), description.tied, description.metadata
    )
    return _write(Path(path), repacked, stored)


def _write(path: Path, description: Description, tensors: dict[str, Tensor]) -> PackedFile:
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    write_file(path, description, contiguous)
    return _summary(path, description, tensors, path.stat().st_size)


def _summary(
    path: Path, description: Description, tensors: dict[str, Tensor], size: int
) -> PackedFile:
    return PackedFile(
        path,
        description.metadata,
        description.blueprint,
        description.layers,
        sum(value.nbytes for value in tensors.values()),
        size,
    )


def _add(tensors: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, value in new.items():
        if name in tensors:
            raise ModelError(f"two tensors of the network would be called {name}")
        tensors[name] = value


def _checked(name: str, value: Tensor) -> Tensor:
    if value.dtype != torch.float32:
        kind = str(value.dtype).removeprefix("torch.")
        raise ModelError(f"{name} cannot be packed: it is {kind}; networks are packed in float32")
    if not is_finite(value):
        raise ModelError(f"{name} cannot be packed: it has values that are not finite")
    return value


def _values(weight: Weight) -> Tensor:
    assert weight.values is not None
    return _checked(f"{weight.name}.weight", weight.values)


def _true_blueprint(model: nn.Module) -> dict[str, Any] | None:
    """Return the blueprint of a network, None where it has been changed by hand since."""
    arguments = blueprint(model)
    if arguments is None or _make(model) != _make(build_without_data(arguments)):
        return None
    return arguments


def _make(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return the types of a network's modules, and the shapes of its state."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    state = [(name, value.shape) for name, value in model.state_dict(keep_vars=True).items()]
    return [*modules, *state]
