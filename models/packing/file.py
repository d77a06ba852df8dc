"""The file of a packed network: safetensors, with everything else in one JSON text of its header.

The text is the only entry of the header's metadata, since safetensors writes several in an order
that changes from run to run: the same network makes the same bytes. It begins with the SHA-256 of
the whole file, taken with zeros in its own place, so that a damaged file is known at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.calls import ModelError
from models.packing.remaining import is_finite
from models.packing.weights import PackedLayer, check_layer
from models.storage import Storage

VERSION = 1

#: How every file begins, behind the eight bytes with the length of the header.
_BEGINNING = rb'{"__metadata__":{"packed_network":"{\"sha256\":\"'
_DIGEST_AT = 8 + len(_BEGINNING)
_DIGEST_SIZE = 64

_DTYPES = {torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16"}

#: A network may have as many weights for each byte of its file: eight is the most of one bit, and
#: the rest is for pre-defined zeros and frozen banks. Small files of nothing but banks may exceed
#: that up to a number that takes little memory. What asks for more is not believed.
_WEIGHTS_PER_BYTE, _FEW_WEIGHTS = 256, 2**25

#: Characters of a call string in a blueprint: one that is deeply nested is not even parsed.
_LONGEST_CALL = 500


@dataclass(frozen=True)
class Description:
    """What a file says beside its tensors.

    `blueprint` are the arguments of create_model, `layers` how each weight is held, `tied` the
    parameters that are another one under a second name, `metadata` what the writer added.
    """

    blueprint: dict[str, Any] | None
    layers: tuple[PackedLayer, ...]
    tied: dict[str, str]
    metadata: dict[str, Any]

    def to_json(self) -> str:
        """Return the text of the header; the digest in it is zeros."""
        document = {
            "sha256": "0" * _DIGEST_SIZE,
            "version": VERSION,
            "blueprint": self.blueprint,
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "tied": self.tied,
            "metadata": self.metadata,
        }
        try:
            return json.dumps(document, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelError(f"the metadata cannot be written as JSON: {error}") from None


def write_file(path: Path, description: Description, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, whole or not at all. Raises ModelError where that fails."""
    from safetensors.torch import save

    text = description.to_json()
    try:
        _description(text)
    except ModelError as error:
        raise ModelError(f"{path} cannot be written, since none could read it: {error}") from None
    data = bytearray(save(dict(tensors), {"packed_network": text}))
    assert data[8:_DIGEST_AT] == _BEGINNING
    data[_DIGEST_AT : _DIGEST_AT + _DIGEST_SIZE] = _digest(data).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}") from None


def read_file(path: Path) -> tuple[Description, dict[str, Tensor], int]:
    """Read and check a file: its description, its tensors and its size in bytes.

    Raises ModelError, with the path, for a file that is not exactly one that write_file makes.
    """
    try:
        with path.open("rb") as file:  # what is no such file may be large, or never end
            data = file.read(_DIGEST_AT)
            data += file.read() if data[8:] == _BEGINNING else b""
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    if data[8:_DIGEST_AT] != _BEGINNING:
        raise ModelError(f"{path} is no packed network")
    stated = data[_DIGEST_AT : _DIGEST_AT + _DIGEST_SIZE]
    if stated != _digest(data).encode():
        raise ModelError(f"{path} is damaged: its bytes are not those that were written")
    try:
        header = _header(data)
        description = _description(header["__metadata__"]["packed_network"])
        tensors = _tensors(data, header)
        _check_tensors(description, tensors, len(data))
    except ModelError as error:
        raise ModelError(f"{path} is no packed network that can be read: {error}") from None
    return description, tensors, len(data)


def _digest(data: bytes | bytearray) -> str:
    view = memoryview(data)
    digest = hashlib.sha256(view[:_DIGEST_AT])
    digest.update(b"0" * _DIGEST_SIZE)
    digest.update(view[_DIGEST_AT + _DIGEST_SIZE :])
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the new name last; not every file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _parse(text: str | bytes) -> Any:
    """Read JSON in which no key occurs twice and every number is finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ModelError("a key occurs twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ModelError(f"{number} is no finite number")
        return float(number)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError("its header is not JSON") from None


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise ModelError("its header is longer than the file")
    header = _parse(data[8 : 8 + length])
    for name, entry in header.items():
        if name == "__metadata__":
            if set(entry) != {"packed_network"}:
                raise ModelError("it has metadata beside its description")
        elif not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES.values():
            raise ModelError(f"{name} is no tensor of {', '.join(_DTYPES.values())}")
    return dict(header)


def _tensors(data: bytes, header: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except SafetensorError:  # of several errors it names any
        raise ModelError("its tensors do not lie as they should") from None
    if set(tensors) != set(header) - {"__metadata__"}:
        raise ModelError("its tensors are not those of its header")
    return tensors


def _description(text: Any) -> Description:
    document = _parse(text) if isinstance(text, str) else None
    if not isinstance(document, dict):
        raise ModelError("its description is not a JSON object")
    version = document.get("version")
    if version != VERSION:
        raise ModelError(f"it is of version {version!r}, and this program reads version {VERSION}")
    match document:
        case {
            "sha256": str(),
            "version": int(),
            "blueprint": blueprint,
            "layers": list(layers),
            "tied": dict(tied),
            "metadata": dict(metadata),
            **others,
        } if not others and _is_blueprint(blueprint) and _are_names(tied):
            read = tuple(_layer_from_dict(layer) for layer in layers)
            return Description(blueprint, read, tied, metadata)
    raise ModelError("its description lacks entries or has unknown ones")


def _is_blueprint(blueprint: Any) -> bool:
    if blueprint is None:
        return True
    types = {
        **dict.fromkeys(("backbone", "method"), str),
        **dict.fromkeys(("num_classes", "in_channels", "image_size", "seed"), int),
        "blurpool": bool,
    }
    if not isinstance(blueprint, dict):
        return False
    texts = [value for value in blueprint.values() if isinstance(value, str)]
    found = {name: type(value) for name, value in blueprint.items()}
    return found == types and all(len(text) <= _LONGEST_CALL for text in texts)


def _are_names(tied: dict[str, Any]) -> bool:
    return all(isinstance(source, str) for source in tied.values())


def _layer_to_dict(layer: PackedLayer) -> dict[str, Any]:
    """Return a layer as plain data, without what is as by default."""
    storage = asdict(layer.storage)
    defaults = asdict(Storage(layer.scheme, layer.storage.count))
    entries = {
        "name": layer.name,
        "format": layer.format,
        "shape": list(layer.shape),
        "storage": {
            name: value
            for name, value in storage.items()
            if name in ("scheme", "count") or value != defaults[name]
        },
        "codebook": layer.codebook,
        "mask": layer.mask,
        "bank": layer.bank,
    }
    return {name: value for name, value in entries.items() if value is not None}


def _layer_from_dict(entries: Any) -> PackedLayer:
    match entries:
        case {
            "name": str(name),
            "format": str(format),
            "shape": list(shape),
            "storage": dict(storage),
            **optional,
        } if (
            optional.keys() <= {"codebook", "mask", "bank"}
            and all(type(size) is int for size in shape)
            and _is_storage(storage)
            and isinstance(optional.get("mask"), dict | None)
        ):
            details: dict[str, Any] = {str(key): value for key, value in optional.items()}
            layer = PackedLayer(name, format, tuple(shape), Storage(**storage), **details)
            check_layer(layer)
            return layer
    raise ModelError("a layer is described in another way than layers are")


def _is_storage(storage: dict[str, Any]) -> bool:
    types = {field.name: int for field in fields(Storage)} | {"scheme": str, "frozen": bool}
    return (
        {"scheme", "count"} <= set(storage) <= set(types)
        and all(type(value) is types[name] for name, value in storage.items())
        and all(value >= 0 for value in storage.values() if type(value) is int)
    )


def _check_tensors(description: Description, tensors: dict[str, Tensor], size: int) -> None:
    """Raise ModelError unless every layer has its tensors, and the weights can be true."""
    names = [layer.name for layer in description.layers]
    if len(set(names)) < len(names):
        raise ModelError("a layer is described twice")
    for layer in description.layers:
        for name, shape in layer.tensors.items():
            stored = tensors.get(name)
            if stored is None or tuple(stored.shape) != shape:
                raise ModelError(f"{name} is not there, or not of the shape {shape}")
            coded = layer.format != "float32" or name.endswith(".mask")
            if (stored.dtype == torch.uint8) != (coded and not name.endswith(".scales")):
                raise ModelError(f"{name} has another type of values than its format")
    for name, value in tensors.items():
        if value.is_floating_point() and not is_finite(value):
            raise ModelError(f"{name} has values that are not finite")
    check_size(sum(math.prod(layer.shape) for layer in description.layers), size)


def check_size(weights: int, size: int) -> None:
    """Raise ModelError for a network of more weights than a file of so many bytes can hold."""
    if weights > max(_WEIGHTS_PER_BYTE * size, _FEW_WEIGHTS):
        raise ModelError(f"its {size} bytes cannot hold a network of {weights} weights")
