"""Constant masks over a weight: positions that are zero before training and stay zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: A stored weight with this share of exact zeros was trained under a mask. Those of the method
#: `sparse` leave fewer weights: of 3x3 kernels at most 72 %, of the smallest kernels five sixths.
_MASKED_SHARE = 0.125


class WeightMask(nn.Module):
    """A mask over a convolution's weight (O, I, kh, kw) that repeats along the filters.

    `period` holds ones and zeros, (P, I, kh, kw): filter o has the mask of o modulo P. Where P does
    not divide the number of filters the whole mask is held instead, so that it always repeats a
    whole number of times. It is a constant that every process makes for itself: not saved in the
    state dict, not broadcast, not reduced. So it always has its values: it stays where it is when
    the network moves to the meta device, and `to_empty` moves it like `to`. It lies in memory with
    the channels innermost, as the weights do in training.

    `phases` is P. `kept` counts the weights that are not masked. `bank_bits` is what the
    description of the mask costs to store, in bits.
    """

    period: Tensor

    def __init__(self, period: Tensor, filters: int, bank_bits: int) -> None:
        super().__init__()
        self.phases = len(period)
        if filters % len(period):
            period = period.repeat(-(-filters // len(period)), 1, 1, 1)[:filters]
        repeats = filters // len(period)
        self.kept = repeats * int(period.count_nonzero())
        self.bank_bits = bank_bits
        self.repeats = repeats
        period = period.contiguous(memory_format=torch.channels_last)
        self.register_buffer("period", period, persistent=False)

    def mask_gradient(self, weight: Tensor) -> Tensor:
        """Return the weight as it is, with a gradient that is zero under the mask."""
        same: Tensor = _MaskGradient.apply(weight, self.period)
        return same

    def mask_value(self, weight: Tensor) -> Tensor:
        """Return weight * mask."""
        return _masked(weight, self.period)

    def mask_in_place(self, weight: Tensor) -> None:
        """Set the weight to zero under the mask; one without memory gets its zeros on loading."""
        if weight.is_meta:
            return
        with torch.no_grad():
            weight.unflatten(0, (self.repeats, -1)).mul_(self.period)

    def contradicts(self, weight: Tensor) -> bool:
        """Return whether a stored weight was trained under another mask than this one.

        A dense weight contradicts no mask. One with many exact zeros has been under a mask, and
        where that was this one nothing else is left.
        """
        if weight.is_meta:
            return False
        zeros = weight.numel() - int(weight.count_nonzero())
        if zeros < _MASKED_SHARE * weight.numel():
            return False
        return bool((weight * (1 - self.full()).to(weight)).any())

    def full(self) -> Tensor:
        """Return the whole mask (O, I, kh, kw)."""
        return self.period.repeat(self.repeats, 1, 1, 1)

    def kept_per_filter(self) -> Tensor:
        """Return how many weights each filter keeps, (O, 1, 1, 1)."""
        return self.period.sum((1, 2, 3), keepdim=True).repeat(self.repeats, 1, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightMask:
        """Move the mask with the network, but keep its values."""
        period = self.period
        super()._apply(fn, recurse)
        self.period = period if self.period.is_meta else self.period.copy_(period)
        return self

    def extra_repr(self) -> str:
        return f"phases={self.phases}, kept={self.kept}"


def kernel_supports(kernel_size: tuple[int, int], positions: int) -> Tensor:
    """Return the sets of neighbouring positions in a kernel, float32 ones (V, kh, kw) on the CPU.

    One position: each of the kh kw. Two: the horizontal pairs. Four: the 2x2 windows. They are in
    raster order; there is none (V = 0) where the kernel is too small.
    """
    height, width = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[positions]
    corners = [
        (row, column)
        for row in range(kernel_size[0] - height + 1)
        for column in range(kernel_size[1] - width + 1)
    ]
    supports = torch.zeros(len(corners), *kernel_size, device="cpu")
    for support, (row, column) in zip(supports, corners, strict=True):
        support[row : row + height, column : column + width] = 1
    return supports


def periodic_mask(filters: int, channels: int, bank: Tensor) -> WeightMask:
    """Return the mask of filter o at channel i, bank[(o + i + 1) mod P], for a bank (P, kh, kw)."""
    period = len(bank)
    first = torch.arange(1, period + 1, device="cpu").unsqueeze(1)
    phase = (first + torch.arange(channels, device="cpu")) % period
    return WeightMask(bank[phase], filters, bank_bits=bank.numel())


def random_mask(shape: torch.Size, positions: int, generator: torch.Generator) -> WeightMask:
    """Return a mask that keeps `positions` weights of every kernel, drawn for each on its own.

    Its description is an index per kernel into the sets of that many positions.
    """
    filters, channels, *kernel_size = shape
    area = math.prod(kernel_size)
    scores = torch.rand(filters * channels, area, generator=generator, device="cpu")
    mask = torch.zeros_like(scores).scatter_(1, scores.topk(positions).indices, 1)
    index_bits = (math.comb(area, positions) - 1).bit_length()
    return WeightMask(mask.view(shape), filters, bank_bits=len(scores) * index_bits)


class _MaskGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by the mask.

    The gradient gets a new tensor, since the one that comes in is not ours to change.
    """

    @staticmethod
    def forward(weight: Tensor, period: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (period,) = ctx.saved_tensors
        return _masked(gradient, period), None


def _masked(weight: Tensor, period: Tensor) -> Tensor:
    """Return weight * mask; the small period stays in the cache while the weight passes by.

    A weight on the meta device, or one that is being loaded, may be of another kind than the mask.
    """
    return (weight.unflatten(0, (-1, len(period))) * period.to(weight)).flatten(0, 1)
