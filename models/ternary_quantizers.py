"""Ternary weight quantizers: statistical scaling, ternary weight networks, trained scales.

All of them compute in float32 or better, also under autocast and for half-precision weights, and
without boolean masks, host synchronization or graph breaks. A non-finite weight gives a non-finite
result; an all-zero weight gives zeros.

The kernels they return are new tensors: torch.compile (2.11) drops the gradient, silently, of one
that was last written in place or passed through a conversion that changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.masks import WeightMask
from models.quantizers import at_least_single


@dataclass(frozen=True)
class TernaryQuantizer:
    """Ternary weights with statistical scaling (He, Gong, Fan; WACV 2019; arXiv 1807.07948).

    One scale per tensor and threshold factor, nothing learned. For each factor b of `factors`,
    which rise:

        Delta = b * max|w|        K = {k : |w_k| >= Delta}        S = mean of |w_k| over K
        T_b(w) = S * sign(w) on K, 0 elsewhere

    and the result is the sum of T_b(w) over the factors. One factor gives plain ternary weights.
    More of them are the paper's residual expansion: its branches share one latent weight and one
    input, so by linearity one layer with the summed kernel replaces them. t factors give 2 t + 1
    levels, stored as a code of ceil(log2(2 t + 1)) bits plus t scales.

    Gradient (straight-through, w the latent weight, g the gradient of the summed kernel):

        dL/dw = t * g  where -1 < w < 1, exactly 0 elsewhere

    The factor t is what t separate branches would add up to; S and Delta count as constants.

    `strict_negative_edge` repeats a quirk of the reference code: a weight equal to -Delta counts
    in S but becomes 0. By default both edges belong to K.
    """

    factors: tuple[float, ...] = (0.05,)
    strict_negative_edge: bool = False

    @property
    def scheme(self) -> str:
        return "ternary" if len(self.factors) == 1 else f"ternary-x{len(self.factors)}"

    @property
    def levels(self) -> int:
        return 2 * len(self.factors) + 1

    @property
    def keeps_zeros(self) -> bool:
        return True

    def scales(self, weight: Tensor) -> int:
        return len(self.factors)

    def __call__(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        # Weights under a mask are below every Delta, so they count in no statistic.
        latent = at_least_single(weight)
        kernel: Tensor = _SummedTernary.apply(latent, self.factors, self.strict_negative_edge)
        return kernel.to(weight.dtype)


@dataclass(frozen=True)
class TernaryWeightNetworkQuantizer:
    """The rule of ternary weight networks (Li, Zhang, Liu; 2016; arXiv 1605.04711).

    One scale per tensor, nothing learned:

        Delta = 0.7 * mean|w|     K = {k : |w_k| > Delta}         alpha = mean of |w_k| over K
        T(w) = alpha * sign(w) on K, 0 elsewhere

    which approximates the ternary kernel nearest to w (the paper's section 2). Weights under a mask
    do not count in the means.

    Gradient (straight-through): dL/dw = g, that of the ternary kernel, for every weight.
    """

    factor: ClassVar[float] = 0.7

    @property
    def scheme(self) -> str:
        return "ternary"

    @property
    def levels(self) -> int:
        return 3

    @property
    def keeps_zeros(self) -> bool:
        return True

    def scales(self, weight: Tensor) -> int:
        return 1

    def __call__(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        count = weight.numel() if mask is None else max(1, mask.kept)
        kernel: Tensor = _MeanTernary.apply(at_least_single(weight), self.factor, count)
        return kernel.to(weight.dtype)


class TrainedTernaryQuantizer(nn.Module):
    """Trained ternary quantization (Zhu, Han, Mao, Dally; ICLR 2017; arXiv 1612.01064).

    Each tensor has two scales that are learned with the weights, `positive` (the paper's Wp) and
    `negative` (Wn), and one threshold that follows from the weights (equations 6 and 9):

        Delta = 0.05 * max|w|     T(w) = Wp where w > Delta, -Wn where w < -Delta, 0 elsewhere

    Gradients, with g that of the ternary kernel (equations 7 and 8; Delta counts as a constant):

        dL/dWp =  sum of g where w > Delta          dL/dw = Wp * g   where w > Delta
        dL/dWn = -sum of g where w < -Delta                 Wn * g   where w < -Delta
                                                            g        elsewhere

    The paper prints dL/dWn without the minus sign, which follows from T; its authors' code
    (czhu95/ternarynet) has it.

    Deviation: the scales do not start at one, as in that code, but at the mean magnitude of the
    weights that they stand for, so that training starts near the float network. They start so when
    the layer is made, and again when a checkpoint without scales is loaded.
    """

    factor: ClassVar[float] = 0.05
    scheme: ClassVar[str] = "ternary-two-scales"
    levels: ClassVar[int] = 3
    keeps_zeros: ClassVar[bool] = True

    positive: nn.Parameter
    negative: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        for name, scale in self.initial_scales(weight).items():
            self.register_parameter(name, nn.Parameter(scale, weight.requires_grad))

    def initial_scales(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the scales to start with, scalars: mean magnitudes beyond the threshold."""
        latent = at_least_single(weight.detach())
        delta = self._threshold(latent)
        means = {}
        for name, side in (("positive", latent), ("negative", -latent)):
            beyond = (side > delta).to(latent.dtype)
            means[name] = (side * beyond).sum() / beyond.sum().clamp_min(1)
        return means

    def scales(self, weight: Tensor) -> int:
        return 2

    def forward(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        # Weights under a mask are below Delta, so they count in no statistic.
        latent = at_least_single(weight)
        scales = at_least_single(self.positive), at_least_single(self.negative)
        kernel: Tensor = _TrainedTernary.apply(latent, self._threshold(latent), *scales)
        return kernel.to(weight.dtype)

    def _threshold(self, weight: Tensor) -> Tensor:
        return self.factor * weight.detach().abs().amax()


class _SummedTernary(torch.autograd.Function):
    """The formulas of TernaryQuantizer, in few passes over the weight."""

    @staticmethod
    def forward(weight: Tensor, factors: tuple[float, ...], strict_negative_edge: bool) -> Tensor:
        magnitude = weight.abs()
        maximum = magnitude.amax()
        smallest, *others = (factor * maximum for factor in factors)
        kept, scale = _kept(weight, magnitude, smallest, strict_negative_edge)
        level = kept.mul_(scale)
        for delta in others:
            kept, scale = _kept(weight, magnitude, delta, strict_negative_edge)
            level.addcmul_(kept, scale)
        del magnitude, kept  # fresh memory is slow on the CPU: let the result have theirs
        return level.copysign(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, factors, _ = inputs
        ctx.save_for_backward(weight)
        ctx.terms = len(factors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # One pass; zero from the bounds on, as the derivative of hardtanh is.
        passed = torch.ops.aten.hardtanh_backward(gradient, weight, -1.0, 1.0)
        return passed.mul_(ctx.terms) if ctx.terms > 1 else passed, None, None


def _kept(
    weight: Tensor, magnitude: Tensor, delta: Tensor, strict_negative_edge: bool
) -> tuple[Tensor, Tensor]:
    """Return K as ones and zeros, and S. Sets the magnitudes below delta to zero.

    The next, larger Delta does not need them. A selection in place of the product would hide a NaN.
    """
    kept = _ones_where(torch.ge, magnitude, delta)
    scale = magnitude.mul_(kept).sum() / kept.sum()
    if strict_negative_edge:
        kept = weight.clone().ge_(delta) + weight.clone().lt_(-delta)
    return kept, scale


class _MeanTernary(torch.autograd.Function):
    """The formulas of TernaryWeightNetworkQuantizer; `count` weights are not masked."""

    @staticmethod
    def forward(weight: Tensor, factor: float, count: int) -> Tensor:
        magnitude = weight.abs()
        delta = factor * (magnitude.sum() / count)
        kept = _ones_where(torch.gt, magnitude, delta)
        scale = magnitude.mul_(kept).sum() / kept.sum().clamp_min(1)
        return kept.mul_(scale).copysign(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _TrainedTernary(torch.autograd.Function):
    """The formulas of TrainedTernaryQuantizer."""

    @staticmethod
    def forward(weight: Tensor, delta: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        above, below = _beyond(weight, delta)
        nothing = 0 * delta  # but for a NaN or infinite weight, which must reach the output
        return above.mul_(positive + nothing) - below.mul_(negative + nothing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        weight, delta, positive, negative = ctx.saved_tensors
        above, below = _beyond(weight, delta)
        above.mul_(gradient)
        below.mul_(gradient)
        scales = above.sum(), -below.sum()
        latent = gradient + above.mul_(positive - 1) + below.mul_(negative - 1)
        return latent, None, *scales


def _beyond(weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return ones where a weight is above delta and where it is below -delta, zeros elsewhere."""
    return _ones_where(torch.gt, weight, delta), _ones_where(torch.lt, weight, -delta)


def _ones_where(compare: Callable[..., Tensor], values: Tensor, bound: Tensor) -> Tensor:
    """Return ones where a comparison holds, zeros elsewhere, in the dtype of the values.

    Boolean masks would be several times slower on the CPU; torch.compile, which makes none of them,
    does not take an output whose channels are innermost.
    """
    if torch.compiler.is_compiling():
        return compare(values, bound).to(values.dtype)
    return compare(values, bound, out=torch.empty_like(values))
