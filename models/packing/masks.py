"""The description of a mask: the bank of a periodic one, an index per kernel of a random one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.calls import ModelError
from models.masks import WeightMask
from models.packing.codes import Bytes, pack_bits, unpack_bits

Flags = NDArray[np.bool_]


def describe_mask(mask: WeightMask) -> tuple[dict[str, Any], Bytes]:
    """Return the kind of a mask and its description, in `bank_bits` bits filled up to bytes.

    Raises ModelError for a mask that is neither periodic nor random with equally many positions in
    each kernel, or that says to take another number of bits than it does.
    """
    full = mask.full().bool().cpu().numpy()
    kinds: list[dict[str, Any]] = [{"kind": "periodic"}]
    positions = np.unique(full.sum((2, 3)))
    if len(positions) == 1:
        kinds.append({"kind": "random", "positions": int(positions[0])})
    for kind in kinds:
        bits = _periodic_bits(full, mask) if kind["kind"] == "periodic" else _random_bits(full)
        if bits is None or len(bits) != mask.bank_bits:
            continue
        description = np.packbits(bits, bitorder="little")
        if np.array_equal(read_mask(kind, description, full.shape, mask.bank_bits).numpy(), full):
            return kind, description
    raise ModelError(f"the mask is not one that {mask.bank_bits} bits describe")


def read_mask(
    kind: dict[str, Any], description: Bytes, shape: tuple[int, ...], bank_bits: int
) -> Tensor:
    """Return the mask (O, I, kh, kw) bool of a description. Raises ModelError for none."""
    filters, channels, *kernel = shape
    area = math.prod(kernel)
    bits = np.unpackbits(description, count=bank_bits, bitorder="little")
    match kind:
        case {"kind": "periodic"} if bank_bits and bank_bits % area == 0:
            bank = bits.reshape(-1, *kernel).astype(bool)
            return torch.from_numpy(bank[_phases(filters, channels, len(bank))])
        case {"kind": "random", "positions": int(positions)} if 0 < positions < area:
            index_bits = (math.comb(area, positions) - 1).bit_length()
            if bank_bits == filters * channels * index_bits:
                subsets = _subsets(unpack_bits(bits, index_bits), area, positions)
                mask = np.zeros((filters * channels, area), bool)
                np.put_along_axis(mask, subsets, True, axis=1)
                return torch.from_numpy(mask.reshape(shape))
    raise ModelError(f"{kind} with {bank_bits} bits is no mask of {'x'.join(map(str, shape))}")


def _phases(filters: int, channels: int, period: int) -> NDArray[np.int64]:
    """Return the phase of filter o at channel i, (o + i + 1) mod P, (O, I)."""
    return (np.arange(filters)[:, None] + np.arange(1, channels + 1)) % period


def _periodic_bits(full: Flags, mask: WeightMask) -> NDArray[np.uint8] | None:
    """Return the bits of the bank (P, kh, kw); a phase that no kernel has is zeros."""
    bank = np.zeros((mask.phases, *full.shape[2:]), np.uint8)
    phases = _phases(full.shape[0], full.shape[1], mask.phases)
    present, first = np.unique(phases, return_index=True)
    bank[present] = full.reshape(-1, *full.shape[2:])[first]
    return bank.ravel()


def _random_bits(full: Flags) -> NDArray[np.uint8]:
    """Return the index of each kernel's subset of positions, in the order of models.masks.

    The subset p_1 < p_2 < ... of positions has the index sum of binomial(p_j, j).
    """
    kernels = full.reshape(full.shape[0] * full.shape[1], -1)
    positions = kernels[0].sum()
    subsets = np.nonzero(kernels)[1].reshape(len(kernels), positions)
    binomials = _binomials(kernels.shape[1], positions)
    index = sum(binomials[j][subsets[:, j - 1]] for j in range(1, positions + 1))
    bits = (math.comb(kernels.shape[1], int(positions)) - 1).bit_length()
    return pack_bits(np.asarray(index), bits)


def _subsets(index: NDArray[np.int64], area: int, positions: int) -> NDArray[np.int64]:
    """Return the positions (n, positions) of subsets by their indices."""
    if (index >= math.comb(area, positions)).any():
        raise ModelError(f"an index is beyond the subsets of {positions} positions of {area}")
    subsets = np.empty((len(index), positions), np.int64)
    rest = index.copy()
    binomials = _binomials(area, positions)
    for j in range(positions, 0, -1):
        subsets[:, j - 1] = np.searchsorted(binomials[j], rest, side="right") - 1
        rest -= binomials[j][subsets[:, j - 1]]
    return subsets


def _binomials(area: int, positions: int) -> list[NDArray[np.int64]]:
    """Return binomial(p, j) by j for every position p of a kernel."""
    return [
        np.array([math.comb(position, j) for position in range(area)], np.int64)
        for j in range(positions + 1)
    ]
