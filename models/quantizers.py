"""Weight quantizers: from a latent float weight to the weight that a layer computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class WeightQuantizer(Protocol):
    """A map from a latent weight to the used one, with what is needed to store the result.

    Quantizers hold no tensors, so a quantized layer has the state-dict keys of the float layer.
    """

    @property
    def scheme(self) -> str:
        """Name of the stored format, such as `ternary`."""

    @property
    def bits(self) -> int:
        """Stored bits per weight."""

    @property
    def scales(self) -> int:
        """Float32 scales stored per layer."""

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the used weight: same shape, dtype, device and memory format."""


@dataclass(frozen=True)
class TernaryQuantizer:
    """Ternary weights with statistical scaling (He, Gong, Fan; WACV 2019; arXiv 1807.07948).

    One scale per tensor and threshold factor, nothing learned. For each factor b of `factors`:

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

    The arithmetic is float32 or better, also under autocast and for half-precision weights. A
    non-finite weight gives a non-finite result; an all-zero weight gives zeros.
    """

    factors: tuple[float, ...] = (0.05,)
    strict_negative_edge: bool = False

    @property
    def scheme(self) -> str:
        return "ternary" if len(self.factors) == 1 else f"ternary-x{len(self.factors)}"

    @property
    def bits(self) -> int:
        return (2 * len(self.factors)).bit_length()

    @property
    def scales(self) -> int:
        return len(self.factors)

    def __call__(self, weight: Tensor) -> Tensor:
        half = weight.dtype in (torch.float16, torch.bfloat16)
        latent = weight.float() if half else weight
        kernel: Tensor = _SummedTernary.apply(latent, self.factors, self.strict_negative_edge)
        return kernel.to(weight.dtype)


class _SummedTernary(torch.autograd.Function):
    """The formulas of TernaryQuantizer. No boolean indexing: no device sync, no graph break.

    The result must be a new tensor: torch.compile (2.11) drops the gradient, silently, of one that
    was last written in place or passed through a conversion that changes nothing.
    """

    @staticmethod
    def forward(weight: Tensor, factors: tuple[float, ...], strict_negative_edge: bool) -> Tensor:
        magnitude = weight.abs()
        maximum = magnitude.amax()
        level = torch.zeros_like(weight)
        for factor in factors:
            delta = factor * maximum
            # Comparing in place gives 0.0 and 1.0; boolean masks are several times slower on CPU.
            kept = magnitude.clone().ge_(delta)
            scale = (magnitude * kept).sum() / kept.sum()
            if strict_negative_edge:
                kept = weight.clone().ge_(delta) + weight.clone().lt_(-delta)
            # A product, not a selection: a NaN scale must reach the output.
            level.addcmul_(kept, scale)
        return level.copysign(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, factors, _ = inputs
        ctx.save_for_backward(weight)
        ctx.terms = len(factors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        passed = weight.abs().lt_(1).mul_(gradient)
        return passed.mul_(ctx.terms) if ctx.terms > 1 else passed, None, None
