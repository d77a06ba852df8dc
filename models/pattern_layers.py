"""Layers that compute with frozen banks of patterns (see models.patterns)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import Foldable, TrimmedConv2d
from models.patterns import Bank
from models.storage import Storage

#: oneDNN's grouped convolutions are several times faster with eight channels in a group than with
#: two, also where three quarters of the weight are zeros.
_FAST_GROUP = 8

#: From so many input channels on, a smaller kernel saves more than a second convolution costs.
_CHANNELS_WORTH_SPLITTING = 16


class FrozenConv2d(TrimmedConv2d):
    """A convolution with a frozen bank, and a bias or none: (N, C, H, W) to (N, O, H', W').

    `weight` is a constant that every process makes for itself: float32 of the patterns and their
    scales, not saved in the state dict, not broadcast, without a gradient. What is saved is
    `bank_sha256`, the digest of the bank, so that learned values are never loaded onto another
    bank than theirs, nor into a layer that was built on the meta device and so has no bank. Only a
    state dict without digests, loaded with strict=False, is not checked. `origin` says where the
    bank comes from (Bank.origin), None where there is none.

    All that the bank does not say is as in `like`, the layer in whose place it comes. Where the
    bank's kernel is smaller, so is the padding.
    """

    weight: Tensor
    bank_sha256: Tensor

    def __init__(self, bank: Bank, like: nn.Conv2d, bias: Tensor | None) -> None:
        outputs, inputs, *kernel = bank.shape
        super().__init__(
            inputs * bank.groups,
            outputs,
            (kernel[0], kernel[1]),
            groups=bank.groups,
            bias=False,
            **_settings(like) | {"padding": _padding(like, kernel[0])},
        )
        self.bias = bias
        self.train(like.training)
        self._storage = bank.storage()
        self.origin: dict[str, Any] | None = None
        weight = torch.empty(bank.shape, device=like.weight.device, dtype=like.weight.dtype)
        digest = torch.empty(32, device=like.weight.device, dtype=torch.uint8)
        if not like.weight.is_meta:
            position = bank.source.position
            patterns = bank.draw()
            scales = bank.scales(patterns)
            self.origin = bank.origin(position, scales)
            weight.copy_(torch.from_numpy(patterns * scales))
            sha256 = bytearray(bank.digest(patterns, scales))
            digest.copy_(torch.frombuffer(sha256, dtype=torch.uint8))
        del self.weight
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bank_sha256", digest)

    def weight_storage(self) -> Storage:
        """Return the form in which the bank is stored."""
        return self._storage

    def used_weight(self) -> Tensor:
        """Return the bank."""
        return self.weight

    def set_bank(self, weight: Tensor, origin: dict[str, Any], sha256: bytes) -> None:
        """Compute with a bank that was drawn elsewhere: float32 (O, I, k, k), and its digest."""
        self.weight = weight
        self.origin = origin
        self.bank_sha256 = torch.tensor(list(sha256), dtype=torch.uint8, device=weight.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as usual; what was learned on another bank, or a layer without one, is an error."""
        stored, own = state_dict.get(f"{prefix}bank_sha256"), self.bank_sha256
        if isinstance(stored, Tensor) and not stored.is_meta:
            name = prefix.rstrip(".")
            if self.weight.is_meta or self.origin is None:
                error_msgs.append(
                    f"{name} was built without data (on the meta device), so it has no bank of "
                    "patterns: build the network on its device"
                )
                return
            if not torch.equal(stored.to(own.device), own):
                error_msgs.append(
                    f"{name} was learned on another bank of patterns: build the network with the "
                    "method's arguments (mode, families, seed) that it was trained with"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class GroupedFrozenConv2d(FrozenConv2d):
    """A FrozenConv2d of many small groups, computed as one of fewer, larger ones.

    `blocks` holds the filters of several groups along the diagonal, with zeros around them. Where
    taps would see only padding, the small groups without those taps are fewer operations by far.
    """

    blocks: Tensor

    def __init__(self, bank: Bank, like: nn.Conv2d, bias: Tensor | None, fused: int) -> None:
        super().__init__(bank, like, bias)
        self._block_groups = self.groups // fused
        self.register_buffer("blocks", _block_diagonal(self.weight, self.groups, fused), False)

    def set_bank(self, weight: Tensor, origin: dict[str, Any], sha256: bytes) -> None:
        """Lay the new bank out in blocks too."""
        super().set_bank(weight, origin, sha256)
        self.blocks = _block_diagonal(weight, self.groups, self.groups // self._block_groups)

    def forward(self, input: Tensor) -> Tensor:
        padding = [int(size) for size in self.padding]
        if any(size <= pad for size, pad in zip(input.shape[2:], padding, strict=True)):
            return super().forward(input)
        return functional.conv2d(
            input,
            self.blocks,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self._block_groups,
        )

    def folded(self) -> nn.Conv2d:
        """Return the plain convolution with the larger groups."""
        return _plain_like(self, self.blocks, self.bias, self._block_groups)


class SplitFrozenConv2d(FrozenConv2d):
    """A FrozenConv2d of lbp and haar patterns in a large kernel, computed as two convolutions.

    All lbp patterns lie in the same 3x3 cells of the kernel, so that half needs no more.
    """

    def __init__(self, bank: Bank, like: nn.Conv2d, bias: Tensor | None) -> None:
        super().__init__(bank, like, bias)
        self._corner = bank.source.ring_corner(bank.shape[2])

    def forward(self, input: Tensor) -> Tensor:
        half = (self.out_channels + 1) // 2
        ring = slice(self._corner, self._corner + 3)
        padding = [int(size) - self._corner for size in self.padding]
        haar = functional.conv2d(input, self.weight[half:], None, self.stride, self.padding)
        lbp = functional.conv2d(
            input, self.weight[:half, :, ring, ring], None, self.stride, padding
        )
        # Where the ring is not in the middle, the smaller kernel goes further.
        maps = torch.cat([lbp[..., : haar.shape[-2], : haar.shape[-1]], haar], dim=1)
        return maps if self.bias is None else maps + self.bias.view(-1, 1, 1)


class MixedConv2d(nn.Module):
    """A frozen bank and the learned 1x1 convolution that mixes its maps."""

    def __init__(self, bank: FrozenConv2d, mix: nn.Conv2d) -> None:
        super().__init__()
        self.bank = bank
        self.mix = mix

    def forward(self, input: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.bank(input))
        return mixed

    def folded(self) -> nn.Module:
        """Return one plain convolution where that is fewer operations, else two.

        The one has the weight sum over c of mix[o, c] * bank[c]. It applies as many filters as
        there are outputs, the two as many as the bank has.
        """
        mix = self.mix.folded() if isinstance(self.mix, Foldable) else copy.deepcopy(self.mix)
        bank = self.bank.folded()
        if not isinstance(mix, nn.Conv2d) or self.bank.groups > 1:
            return nn.Sequential(bank, mix)
        filter_size = self.bank.weight[0].numel()
        separate = bank.out_channels * filter_size + mix.weight.numel()
        if mix.out_channels * filter_size > separate:
            return nn.Sequential(bank, mix)
        groups = mix.groups
        # Either weight may have its channels innermost, where only `reshape` can flatten it.
        products = mix.weight.reshape(groups, -1, mix.weight.shape[1]) @ self.bank.weight.reshape(
            groups, -1, filter_size
        )
        weight = products.view(mix.out_channels, *self.bank.weight.shape[1:])
        return _plain_like(self.bank, weight, mix.bias, groups=1)


def frozen_convolution(bank: Bank, like: nn.Conv2d, bias: Tensor | None) -> FrozenConv2d:
    """Build the layer of a bank, in the form that computes fastest."""
    if like.padding_mode != "zeros" or isinstance(like.padding, str):
        return FrozenConv2d(bank, like, bias)
    fused = _groups_to_fuse(bank)
    if fused > 1:
        return GroupedFrozenConv2d(bank, like, bias, fused)
    _, inputs, kernel, _ = bank.shape
    split = bank.families == ("lbp", "haar") and bank.groups == 1
    if split and kernel > 3 and inputs >= _CHANNELS_WORTH_SPLITTING and like.dilation == (1, 1):
        corner = bank.source.ring_corner(kernel)
        if all(int(size) >= corner for size in like.padding):
            return SplitFrozenConv2d(bank, like, bias)
    return FrozenConv2d(bank, like, bias)


def _groups_to_fuse(bank: Bank) -> int:
    """Return how many groups to compute as one; a depthwise convolution is fast as it is."""
    inputs = bank.shape[1]
    if bank.groups == 1 or inputs == 1:
        return 1
    counts = range(_FAST_GROUP // inputs, 1, -1)
    return next((count for count in counts if bank.groups % count == 0), 1)


def _settings(layer: nn.Conv2d) -> dict[str, Any]:
    """Return what a new convolution keeps of a layer; it is built without values of its own."""
    return {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
        "device": "meta",
    }


def _padding(like: nn.Conv2d, kernel: int) -> str | tuple[int, int]:
    """Return the padding with which a smaller kernel gives maps of the same size."""
    if isinstance(like.padding, str):
        return like.padding
    rows, columns = (
        size - (old - kernel) // 2 for size, old in zip(like.padding, like.kernel_size, strict=True)
    )
    return rows, columns


def _block_diagonal(weight: Tensor, groups: int, fused: int) -> Tensor:
    """Lay out the filters of fused groups: (O, I, k, k) to (O, fused * I, k, k)."""
    outputs, inputs, *kernel = weight.shape
    blocks, per_group = groups // fused, outputs // groups
    wide = weight.new_zeros(blocks, fused, per_group, fused, inputs, *kernel)
    narrow = weight.view(blocks, fused, per_group, inputs, *kernel)
    wide.diagonal(dim1=1, dim2=3).copy_(narrow.movedim(1, -1))
    return wide.view(outputs, fused * inputs, *kernel)


def _plain_like(layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Conv2d:
    """Return a plain convolution with a layer's settings and copies of these tensors."""
    plain = nn.Conv2d(
        layer.in_channels,
        len(weight),
        (weight.shape[2], weight.shape[3]),
        groups=groups,
        bias=bias is not None,
        **_settings(layer),
    )
    plain.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone())
    return plain.train(layer.training)
