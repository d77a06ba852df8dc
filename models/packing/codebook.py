"""Codebooks: which values the digits of a weight stand for, found in the weight itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from models.calls import ModelError

#: What a codebook holds: the fixed values -1, (0,) +1 or 0, 1; magnitudes, each with both signs;
#: or free values. Those are the same in all filters, or others in each.
Codebook = Literal[
    "signs", "bits", "magnitudes", "magnitudes by filter", "values", "values by filter"
]


def values_of(codebook: Codebook, levels: int, scales: Tensor, filters: int) -> Tensor:
    """Return the values of the digits, (1, D) or (filters, D) float32 with D <= levels.

    `scales` (n,) float32 are the n numbers beside the codes. Magnitudes and free values have the
    value zero too where the levels leave room for it.
    """
    if codebook == "signs":
        return torch.tensor([[-1.0, 1.0] if levels == 2 else [-1.0, 0.0, 1.0]])
    if codebook == "bits":
        return torch.tensor([[0.0, 1.0]])
    table = scales.view(filters if codebook.endswith("by filter") else 1, -1)
    zero = table.new_zeros(len(table), 1)
    if codebook.startswith("values"):
        return torch.cat([zero, table], 1) if table.shape[1] < levels else table
    middle = [zero] if 2 * table.shape[1] < levels else []
    return torch.cat([-table.flip(1), *middle, table], 1)


def fitting_codebooks(levels: int, scales: int, filters: int) -> list[Codebook]:
    """Return the codebooks of so many levels and scales, the likeliest first.

    Magnitudes come before free values, of which they need half as many, and what all filters share
    before what each has for itself.
    """
    if scales == 0:
        return ["signs", "bits"] if levels >= 2 else []
    by_filter = scales // filters if scales % filters == 0 else levels + 1
    possible: list[tuple[Codebook, bool]] = [
        ("magnitudes", 2 * scales <= levels),
        ("magnitudes by filter", 2 * by_filter <= levels),
        ("values", scales <= levels),
        ("values by filter", by_filter <= levels),
    ]
    return [codebook for codebook, is_possible in possible if is_possible]


def find_codebook(
    weight: Tensor, kept: Tensor | None, levels: int, scales: int
) -> tuple[Codebook, Tensor, Tensor]:
    """Find the codebook of a weight (O, n) float32, its scales, and the digits (O, n) uint8.

    Where `kept` (O, n) is false, a weight has no digit that counts. Scales that no weight needs are
    zero. Raises ModelError for a weight that has more values than it can have.
    """
    for codebook in fitting_codebooks(levels, scales, len(weight)):
        found = _find_scales(codebook, weight, kept, levels, scales)
        if found is None:
            continue
        table = values_of(codebook, levels, found, len(weight))
        digits = torch.zeros(weight.shape, dtype=torch.uint8)  # none is zero, the first one is one
        for digit, value in enumerate(table.unbind(1)):
            equal = torch.eq(weight, value.unsqueeze(1)).view(torch.uint8)
            torch.maximum(digits, equal.mul_(digit + 1), out=digits)
        if (digits if kept is None else digits[kept]).all():
            return codebook, found, digits.sub_(1)
    numbers = f"{scales} scale{'' if scales == 1 else 's'}"
    raise ModelError(f"the weight has other values than {levels} levels and {numbers} can give")


def _find_scales(
    codebook: Codebook, weight: Tensor, kept: Tensor | None, levels: int, scales: int
) -> Tensor | None:
    """Return the scales (n,) of a weight, or None where it has more values than they give."""
    if scales == 0:
        return torch.zeros(0)
    free = codebook.startswith("values")
    by_filter = codebook.endswith("by filter")
    rows = weight if free else weight.abs()
    count = scales // len(weight) if by_filter else scales
    has_zero = (count if free else 2 * count) < levels
    removed = -torch.inf
    ignored = rows == 0 if has_zero else None
    if kept is not None:
        ignored = ~kept if ignored is None else ignored | ~kept
    if ignored is not None:
        rows = torch.where(ignored, removed, rows)
    if not by_filter:
        rows = rows.view(1, -1)
    largest = []
    for _ in range(count):
        values = rows.amax(1, keepdim=True)
        largest.append(values)
        rows = torch.where(rows == values, removed, rows)
    if (rows != removed).any():
        return None
    found = torch.cat(largest, 1)
    found = found.masked_fill(found == removed, 0.0)
    return found.sort(1).values.flatten()
