"""Binary weights, and the ternary ones without a scale that binary networks mix with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.masks import WeightMask
from models.quantizers import at_least_single


def binarize(values: Tensor, dead_zone: bool = False) -> Tensor:
    """Return b(x) = +1 where x > 0 and -1 elsewhere, so -1 at zero. NaN stays NaN.

    With `dead_zone` it is +1 where 1 + x > 1 in the arithmetic of the values: in float32, numbers
    up to 2^-24 (6e-8) become -1 too, as in the code of Stadtmann et al.
    """
    if dead_zone:
        values = (values + 1).sub_(1)
    return torch.threshold(values.ceil().clamp_max_(1), 0.0, -1.0)


def ternarize(values: Tensor, threshold: Tensor) -> Tensor:
    """Return t(x) = +1 where x > threshold, -1 where x < -threshold, 0 between and on the edges.

    NaN stays NaN, and a NaN threshold makes all values NaN.
    """
    beyond = values.abs().sub_(threshold).clamp_(0, 1).ceil_()
    return beyond.copysign(values)


@dataclass(frozen=True)
class BinaryQuantizer:
    """Binary weights (Courbariaux et al., arXiv 1602.02830; Stadtmann et al., ICMLA 2020).

    With b of `binarize`, which takes zero to -1:

        Q(w) = b(w)                                         dL/dw = g

    the gradient g of the used weight as it is, without a mask where |w| > 1: the latent weights are
    held to [-1, 1] instead (`clip` of models.layers.compress). There is no scale; batch norm takes
    its place. `scale="xnor"` adds that of Rastegari et al. (ECCV 2016, arXiv 1603.05279), one per
    filter, over its n weights:

        Q(w) = alpha * b(w)      alpha = mean|w|            dL/dw = g * (1/n + alpha * 1[|w| <= 1])

    This is the paper's gradient (section 3.1), which leaves out that alpha depends on all weights
    of the filter. Weights under a mask do not count, neither in alpha nor in n.

    With `exact_sums`, alpha is rounded to bfloat16: every sum of up to 2^16 terms +-alpha is then
    exact in float32, in any order. So behind binary inputs a sum of zero is zero, and binarized
    alike, whatever the memory format or the batch.

    Deviation from the code of Stadtmann et al., undone by `dead_zone`: see `binarize`.
    """

    scale: Literal["xnor"] | None = None
    exact_sums: bool = False
    dead_zone: bool = False

    @property
    def scheme(self) -> str:
        return "binary" if self.scale is None else "binary-xnor"

    @property
    def levels(self) -> int:
        return 2

    @property
    def keeps_zeros(self) -> bool:
        return False

    def scales(self, weight: Tensor) -> int:
        return len(weight) if self.scale == "xnor" else 0

    def __call__(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        latent = at_least_single(weight)
        if self.scale is None:
            signs: Tensor = _PlainSigns.apply(latent, self.dead_zone)
            return signs.to(weight.dtype)
        if mask is None:
            count = latent.new_full((), latent[0].numel())
        else:
            count = mask.kept_per_filter().clamp_min(1).to(latent)
        one_filter = tuple(range(1, latent.ndim))
        alpha = latent.detach().abs().sum(one_filter, keepdim=True) / count
        if self.exact_sums:
            alpha = _rounded_to_bfloat16(alpha).to(latent.dtype)
        scaled: Tensor = _ScaledSigns.apply(latent, alpha, count, self.dead_zone)
        return scaled.to(weight.dtype)


@dataclass(frozen=True)
class TernarySignQuantizer:
    """Ternary weights without a scale, for chosen layers of a binary network (Stadtmann et al.).

    With t of `ternarize`, over the whole tensor:

        Q(w) = t(w)      theta = 0.7 * mean|w|              dL/dw = g

    The threshold is that of ternary weight networks (Li, Zhang and Liu, arXiv 1605.04711), whose
    scale is left out. Weights under a mask do not count in the mean.
    """

    factor: ClassVar[float] = 0.7

    @property
    def scheme(self) -> str:
        return "ternary-signs"

    @property
    def levels(self) -> int:
        return 3

    @property
    def keeps_zeros(self) -> bool:
        return True

    def scales(self, weight: Tensor) -> int:
        return 0

    def __call__(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        latent = at_least_single(weight)
        count = weight.numel() if mask is None else max(1, mask.kept)
        kernel: Tensor = _PlainTernarySigns.apply(latent, self.factor, count)
        return kernel.to(weight.dtype)


def _rounded_to_bfloat16(values: Tensor) -> Tensor:
    """Return the nearest bfloat16 as float32, by its bits.

    torch.compile leaves out a conversion to bfloat16 and back, and so would not round.
    """
    bits = values.float().view(torch.int32)
    return ((bits + 0x8000) & ~0xFFFF).view(torch.float32)


class _PlainSigns(torch.autograd.Function):
    """b(w), with the identity as gradient."""

    @staticmethod
    def forward(weight: Tensor, dead_zone: bool) -> Tensor:
        return binarize(weight, dead_zone)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ScaledSigns(torch.autograd.Function):
    """alpha * b(w), with the gradient of Rastegari et al. `count` is n."""

    @staticmethod
    def forward(weight: Tensor, alpha: Tensor, count: Tensor, dead_zone: bool) -> Tensor:
        return binarize(weight, dead_zone) * alpha

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, alpha, count, _ = inputs
        ctx.save_for_backward(weight, alpha, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, alpha, count = ctx.saved_tensors
        factor = weight.abs().le_(1).mul_(alpha).add_(1 / count)
        return factor.mul_(gradient), None, None, None


class _PlainTernarySigns(torch.autograd.Function):
    """t(w), with the identity as gradient."""

    @staticmethod
    def forward(weight: Tensor, factor: float, count: int) -> Tensor:
        return ternarize(weight, factor * (weight.abs().sum() / count))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None
