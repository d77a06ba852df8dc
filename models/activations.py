"""Binary and ternary activations, and the gradients that stand in for theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.binary_quantizers import binarize, ternarize
from models.quantizers import at_least_single

Estimator = Literal["vanilla", "bnn", "bireal", "swish"]

#: Threshold of ternary activations in mean magnitudes (Wan et al., TBN, ECCV 2018).
_TERNARY_FACTOR = 0.4


@dataclass(frozen=True)
class ActivationQuantizer:
    """q(h(u)) with the gradient h'(u) (Stadtmann, Latotzke and Gemmeke, ICMLA 2020).

    q is b of models.binary_quantizers.binarize, or with `ternary` t of its `ternarize` at
    theta = 0.4 * mean|h(u)|; its own gradient counts as the identity. h is the estimator's:

        estimator   h(u)                                         h'(u)
        vanilla     u                                            1
        bnn         clamp(u, -1, 1)                              1[|u| < 1]
        bireal      2 v - v |v|,  v = clamp(u, -1, 1)            (2 - 2 |u|) 1[|u| < 1]
        swish       2 s (1 + z (1 - s)) - 1,                     beta (2 - z tanh(z / 2))
                    z = beta u,  s = 1 / (1 + exp(-z))               / (1 + cosh z)

    (Hubara et al., arXiv 1602.02830; Liu et al., Bi-Real Net, ECCV 2018; Darabi et al., BNN+,
    arXiv 1812.11800.) h has the sign of u, so binary values do not depend on the estimator;
    ternary ones do, through theta.

    Deviations from the authors' code, undone by `original`:

    - theta is the mean over one image (axis 0), not over the batch: what a network says of an image
      does not depend on the other images.
    - binary values follow the sign of u. The original takes b(h(u)) with the dead zone of binarize,
      after it has replaced what swish rounds to zero by u.
    - theta >= 1 is a threshold like any other. The original turns all values to zero, because it
      compares again what it has already set to +1 and -1.
    - bireal's gradient at exactly +1 and -1 is 0, the limit from both sides. The original's is 1.

    The arithmetic is float32 or better, also for half-precision values.
    """

    ternary: bool = False
    estimator: Estimator = "bnn"
    beta: float = 10.0
    original: bool = False

    def value(self, values: Tensor) -> Tensor:
        """Return q(h(u)) for u of shape (N, ...), float32 for half-precision u."""
        values = at_least_single(values)
        if self.ternary:
            return self._ternary_value(self.transform(values))
        if not self.original:
            return binarize(values)
        transformed = self.transform(values)
        if self.estimator == "swish":
            transformed = torch.where(transformed == 0, values, transformed)
        return binarize(transformed, dead_zone=True)

    def transform(self, values: Tensor) -> Tensor:
        """Return h(u) for u of any shape."""
        match self.estimator:
            case "vanilla":
                return values
            case "bnn":
                return values.clamp(-1, 1)
            case "bireal":
                clipped = values.clamp(-1, 1)
                return 2 * clipped - clipped * clipped.abs()
            case "swish":
                scaled = self.beta * values
                sigmoid = scaled.sigmoid()
                return 2 * sigmoid * (1 + scaled * (1 - sigmoid)) - 1

    def slope(self, values: Tensor) -> Tensor:
        """Return h'(u) for u of any shape, float32 for half-precision u."""
        values = at_least_single(values)
        match self.estimator:
            case "vanilla":
                return torch.ones_like(values)
            case "bnn":
                return values.abs().lt_(1)
            case "bireal":
                slope = values.abs().clamp_max_(1).mul_(-2).add_(2)
                return slope + (values.abs() == 1) if self.original else slope
            case "swish":
                scaled = self.beta * values
                return self.beta * (2 - scaled * (scaled / 2).tanh()) / (1 + scaled.cosh())

    def _ternary_value(self, transformed: Tensor) -> Tensor:
        magnitude = transformed.abs()
        if not self.original:
            per_image = tuple(range(1, transformed.ndim))
            return ternarize(transformed, _TERNARY_FACTOR * magnitude.mean(per_image, keepdim=True))
        threshold = _TERNARY_FACTOR * magnitude.mean()
        return ternarize(transformed, threshold) * (threshold < 1)


class QuantizedActivation(nn.Module):
    """An activation with the values and gradients of an ActivationQuantizer, shape (N, ...)."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, input: Tensor) -> Tensor:
        quantized: Tensor = _StraightThrough.apply(input, self.quantizer)
        return quantized.to(input.dtype)

    def extra_repr(self) -> str:
        return str(self.quantizer)


class _StraightThrough(torch.autograd.Function):
    """The value and the slope of an ActivationQuantizer as a function and its gradient."""

    @staticmethod
    def forward(values: Tensor, quantizer: ActivationQuantizer) -> Tensor:
        return quantizer.value(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, ctx.quantizer = inputs
        ctx.save_for_backward(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        product = gradient * ctx.quantizer.slope(values)
        return product.to(values.dtype), None
