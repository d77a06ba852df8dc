"""What a network costs: parameters, operations, stored bytes and activation memory, by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.calls import ModelError
from models.costs import LayerProfile, Profile
from models.layers import StoresWeight
from models.lowpass import BlurPool2d
from models.packing.remaining import folded_norm, remaining_tensors, stored_float
from models.storage import FloatFormat, Storage, check_float_format
from models.surgery import Layer, weight_layers
from models.tracing import Trace, trace, weight_of


def profile(model: nn.Module, image_size: int, *, rest: FloatFormat = "float32") -> Profile:
    """Profile a network for square images of `image_size` pixels.

    `rest` is the form in which what has no code is stored, as models.pack takes it: with float16,
    each tensor that this suits, and on the meta device all of them.

    Shapes come from a forward pass of one image through a copy on the meta device, so the model,
    its mode and the random state stay as they are, no weight is copied, and the model may itself be
    on meta. The number of input channels is that of the first convolution. Of a compiled network
    the profile is that of the network itself. Raises ModelError when the network does not take such
    an image.
    """
    check_float_format(rest)
    model = getattr(model, "_orig_mod", model)
    channels = _input_channels(model)
    traced = trace(model, (channels, image_size, image_size))
    known = {layer.name: layer for layer in weight_layers(model, frozen=True)}
    counted: set[int] = set()
    layers = []
    for name, parts in _rows(model).items():
        layer = _profile_layer(name, parts, known.get(name), traced, rest, counted)
        if layer.storage or layer.parameters or layer.remaining or layer.macs:
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
    rest: FloatFormat,
    counted: set[int],
) -> LayerProfile:
    """Describe one row; `counted` holds the ids of the parameters that others have brought."""
    module, calls = parts[name], traced.modules[name]
    remaining = _remaining(parts, counted)
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
        remaining=sum(value.numel() for value in remaining),
        remaining_bytes=sum(stored_float(value.float(), rest).nbytes for value in remaining),
        float16=weights > 0 and _in_float16(module, storage, rest),
        storage=storage if weights else None,
        density=None if weight is None else _density(module, weight),
        executed_macs=sum(traced.modules[path].macs for path in parts),
        nominal_macs=nominal,
        kept_macs=kept,
        activation_bytes=4 * calls.elements,
    )


def _remaining(parts: dict[str, nn.Module], counted: set[int]) -> list[Tensor]:
    """Return what is stored of the parts of a row beside its weight, but for what is `counted`."""
    quantizers = {
        inner
        for part in parts.values()
        for quantizer in [getattr(part, "weight_quantizer", None)]
        if isinstance(quantizer, nn.Module)
        for inner in quantizer.modules()
    }
    found = []
    for part in parts.values():
        if part in quantizers:
            continue
        for key, value in remaining_tensors(part).items():
            shared = folded_norm(part) is None and id(part._parameters.get(key)) in counted
            if value.is_floating_point() and not shared:
                found.append(value)
    return found


def _in_float16(module: nn.Module, storage: Storage | None, rest: FloatFormat) -> bool:
    """Return whether the weight of a module is any float and stored in float16."""
    if storage is None or storage.levels is not None or storage.frozen:
        return False
    with torch.no_grad():
        used = module.used_weight() if isinstance(module, StoresWeight) else weight_of(module)
        return used is not None and stored_float(used.float(), rest).dtype == torch.float16


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
