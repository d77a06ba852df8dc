"""One weight in a file: from its values to tensors and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.calls import ModelError
from models.layers import CompressedLayer, StoresWeight
from models.masks import WeightMask
from models.packing.banks import (
    decode_patterns,
    encode_patterns,
    filter_scales,
    has_pattern_codes,
    is_bank,
    patterns_in,
)
from models.packing.codebook import Codebook, find_codebook, fitting_codebooks, values_of
from models.packing.codes import decode_digits, decode_values, encode_digits
from models.packing.masks import describe_mask, read_mask
from models.packing.remaining import stored_float
from models.pattern_layers import FrozenConv2d
from models.storage import CODES, FloatFormat, Storage
from models.tracing import weight_of


@dataclass(frozen=True)
class PackedLayer:
    """How a file holds the weight of one layer.

    `format` is one of models.storage.FORMATS, `storage` says what it holds, `shape` is that of the
    weight. `codebook` names what the digits stand for, where there are digits; `mask` the kind of
    the mask, where there is one; `bank` says where a frozen weight comes from: its origin
    (models.patterns.Bank.origin) and its digest.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    storage: Storage
    codebook: Codebook | None = None
    mask: dict[str, Any] | None = None
    bank: dict[str, Any] | None = None

    @property
    def scheme(self) -> str:
        """What the weight is, such as `ternary`."""
        return self.storage.scheme

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the file that hold this weight and their shapes, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        scales = 4 * self.storage.scales_in(self.format)
        mask = -(-self.storage.bank_bits // 8)
        if self.format == "float32":
            shapes["weight"] = (self.storage.count,) if self.mask else self.shape
        elif self.format != "seed":
            shapes["weight"] = (self.storage.stored_bytes(self.format) - scales - mask,)
        if scales:
            shapes["weight.scales"] = (scales // 4,)
        if mask:
            shapes["weight.mask"] = (mask,)
        return {f"{self.name}.{suffix}": shape for suffix, shape in shapes.items()}


@dataclass(frozen=True)
class Weight:
    """The weight that a layer computes with, and what a file says of it beside its values.

    `values` are float32 on the CPU, None where only a seed is known. `mask` (O, I, kh, kw) bool has
    the weights that are stored, and `mask_kind` and `mask_bytes` describe it.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    values: Tensor | None
    mask: Tensor | None = None
    mask_kind: dict[str, Any] | None = None
    mask_bytes: Tensor | None = None
    bank: dict[str, Any] | None = None

    def with_mask(self, mask: WeightMask) -> Weight:
        """Return the weight with the description of its mask."""
        kind, description = describe_mask(mask)
        full = mask.full().bool().cpu()
        return Weight(
            self.name,
            self.shape,
            self.storage,
            self.values,
            full,
            kind,
            torch.from_numpy(description),
            self.bank,
        )


@torch.no_grad()
def weight_in(name: str, module: nn.Module) -> Weight:
    """Return what a layer of a network computes with."""
    layer = module if isinstance(module, StoresWeight) else None
    values = weight_of(module) if layer is None else layer.used_weight()
    assert values is not None
    storage = Storage("float32", values.numel()) if layer is None else layer.weight_storage()
    values = values.detach().cpu().contiguous()
    bank = None
    if isinstance(module, FrozenConv2d):
        bank = {"sha256": bytes(module.bank_sha256.tolist()).hex(), **(module.origin or {})}
    weight = Weight(name, tuple(values.shape), storage, values, bank=bank)
    mask = module.mask if isinstance(module, CompressedLayer) else None
    return weight if mask is None else weight.with_mask(mask)


def encode_weight(
    weight: Weight, format: str | None, rest: FloatFormat
) -> tuple[PackedLayer, dict[str, Tensor]]:
    """Return a weight in a format, or in its default one where that cannot hold it.

    `rest` is the form of a weight that is any float. Raises ModelError where the weight is not what
    its storage says.
    """
    try:
        return _encode(weight, weight.storage.possible(format) or weight.storage.formats[0], rest)
    except ModelError as error:
        raise ModelError(f"{weight.name} cannot be packed: {error}") from None


def _encode(
    weight: Weight, format: str, rest: FloatFormat
) -> tuple[PackedLayer, dict[str, Tensor]]:
    storage, values = weight.storage, weight.values
    stored: dict[str, Tensor] = {}
    codebook = patterns = None
    if weight.bank is not None and values is not None:
        patterns = patterns_in(values, weight.bank)
    if format != "seed":
        if values is None:
            raise ModelError(f"{format} needs the values that its seed stands for")
        kept = values if weight.mask is None else values[weight.mask]
        if kept.numel() != storage.count:
            raise ModelError(f"it has {kept.numel()} weights to store, not {storage.count}")
        if format == "float32":
            is_any_float = storage.levels is None and not storage.frozen
            stored["weight"] = stored_float(kept, rest if is_any_float else "float32")
        elif format == "patterns" and has_pattern_codes(weight.bank):
            assert weight.bank is not None and patterns is not None
            stored["weight"] = torch.from_numpy(encode_patterns(patterns, weight.bank))
        else:
            if patterns is not None:
                values = torch.from_numpy(patterns).float()
            codebook, scales, codes = _encode_digits(weight, values, _code_of(format, storage))
            stored["weight"] = torch.from_numpy(codes)
            if len(scales):
                stored["weight.scales"] = scales
    if weight.mask_bytes is not None and len(weight.mask_bytes):
        stored["weight.mask"] = weight.mask_bytes
    layer = PackedLayer(
        weight.name, format, weight.shape, storage, codebook, weight.mask_kind, weight.bank
    )
    tensors = {f"{weight.name}.{suffix}": value for suffix, value in stored.items()}
    if {name: tuple(value.shape) for name, value in tensors.items()} != layer.tensors:
        raise ModelError(f"as {format} it takes other bytes than {storage} says")
    return layer, tensors


def _code_of(format: str, storage: Storage) -> str:
    """Return the code of a format; patterns without codes of their own are single digits."""
    if format != "patterns":
        return format
    return "5-trit" if storage.levels == 3 else "1-bit"


def _encode_digits(
    weight: Weight, values: Tensor, code: str
) -> tuple[Codebook, Tensor, np.ndarray[Any, np.dtype[np.uint8]]]:
    storage, filters = weight.storage, weight.shape[0]
    assert storage.levels is not None
    mask = None if weight.mask is None else weight.mask.view(filters, -1)
    codebook, scales, digits = find_codebook(
        values.reshape(filters, -1), mask, storage.levels, storage.scales
    )
    kept = digits.view(-1) if mask is None else digits[mask]
    return codebook, scales, encode_digits(kept.numpy(), code)


def decode_weight(layer: PackedLayer, tensors: dict[str, Tensor]) -> Weight:
    """Return the weight that the tensors of a file hold. Raises ModelError for other values."""
    mask = mask_bytes = None
    if layer.mask is not None:
        mask_bytes = tensors.get(f"{layer.name}.weight.mask", torch.empty(0, dtype=torch.uint8))
        mask = read_mask(layer.mask, mask_bytes.numpy(), layer.shape, layer.storage.bank_bits)
        if int(mask.count_nonzero()) != layer.storage.count:
            raise ModelError(f"{layer.name} has a mask that keeps another number of weights")
    values = None if layer.format == "seed" else _decode(layer, tensors, mask)
    if layer.bank is not None and values is not None:
        try:
            patterns_in(values, layer.bank)
        except ModelError as error:
            raise ModelError(f"{layer.name} is damaged: {error}") from None
    return Weight(
        layer.name, layer.shape, layer.storage, values, mask, layer.mask, mask_bytes, layer.bank
    )


def _decode(layer: PackedLayer, tensors: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    stored = tensors[f"{layer.name}.weight"]
    if layer.format == "float32":
        return _spread(stored.float(), mask, layer.shape)
    if layer.format == "patterns" and has_pattern_codes(layer.bank):
        assert layer.bank is not None
        patterns = torch.from_numpy(decode_patterns(stored.numpy(), layer.bank, layer.shape))
        return patterns * filter_scales(layer.bank, layer.shape[0])
    assert layer.codebook is not None and layer.storage.levels is not None
    scales = tensors.get(f"{layer.name}.weight.scales", torch.empty(0))
    table = values_of(layer.codebook, layer.storage.levels, scales, layer.shape[0])
    code = _code_of(layer.format, layer.storage)
    codes, count = stored.numpy(), layer.storage.count
    if len(table) == 1:
        decoded = torch.from_numpy(decode_values(codes, code, count, table[0].numpy()))
        values = _spread(decoded, mask, layer.shape)
    else:
        digits = torch.from_numpy(decode_digits(codes, code, count))
        rows = _spread(digits, mask, layer.shape).view(layer.shape[0], -1)
        values = torch.full(rows.shape, torch.nan)
        for digit, value in enumerate(table.unbind(1)):
            values = torch.where(rows == digit, value.unsqueeze(1), values)
        values = values.view(layer.shape)
        if mask is not None:
            values.masked_fill_(~mask, 0.0)
    if values.isnan().any():
        raise ModelError(f"{layer.name} has codes that stand for no value")
    return values if layer.bank is None else values * filter_scales(layer.bank, layer.shape[0])


def _spread(kept: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return kept values at their places in a weight of a shape, with zeros under the mask."""
    if mask is None:
        return kept.view(shape)
    spread = kept.new_zeros(shape)
    spread[mask] = kept
    return spread


def check_layer(layer: PackedLayer) -> None:
    """Raise ModelError for a description that describes no weight."""
    storage = layer.storage
    entries = math.prod(layer.shape)
    sound = (
        len(layer.shape) >= 2
        and min(layer.shape) >= 1
        and layer.format in storage.formats
        and 0 <= storage.count <= entries
        and (layer.mask is not None or (storage.count == entries and not storage.bank_bits))
        and (layer.mask is None or (len(layer.shape) == 4 and not storage.frozen))
        and (is_bank(layer.bank, layer.shape) if storage.frozen else layer.bank is None)
    )
    possible: list[Codebook | None] = [None]
    if sound and (
        layer.format in CODES or (layer.format == "patterns" and not has_pattern_codes(layer.bank))
    ):
        levels = storage.levels or 0
        possible = [*fitting_codebooks(levels, storage.scales, layer.shape[0])]
    if not sound or layer.codebook not in possible:
        raise ModelError(f"{layer.name} is described as no weight can be")


def check_bank(name: str, stored: dict[str, Any] | None, drawn: dict[str, Any] | None) -> None:
    """Raise ModelError unless a bank has been drawn again exactly as it was."""
    for entry in sorted((stored or {}).keys() | (drawn or {}).keys(), key="sha256".__eq__):
        theirs, ours = ((bank or {}).get(entry) for bank in (stored, drawn))
        if theirs != ours:
            raise ModelError(
                f"{name} was trained on patterns of {entry} {theirs}, but here they are drawn "
                f"with {entry} {ours}"
            )
