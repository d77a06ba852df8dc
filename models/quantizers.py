"""Weight quantizers: from a latent float weight to the weight that a layer computes with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from models.masks import WeightMask


class WeightQuantizer(Protocol):
    """A map from a latent weight to the used one, with what is needed to store the result.

    Most quantizers hold no tensors, so that a quantized layer has the state-dict keys of the float
    layer. One that learns its scales is a module.
    """

    @property
    def scheme(self) -> str:
        """Name of the stored format, such as `ternary`."""

    @property
    def levels(self) -> int:
        """Number of values that a used weight can take, up to its scale."""

    @property
    def keeps_zeros(self) -> bool:
        """Whether a latent weight of exactly zero gives a used weight of zero."""

    def scales(self, weight: Tensor) -> int:
        """Return the number of float32 scales stored beside a weight."""

    def __call__(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        """Return the used weight: same shape, dtype, device and memory format.

        A latent weight under a mask is zero. The mask tells statistics what to leave out; a
        quantizer need not mask its result.
        """


@runtime_checkable
class LearnsScales(WeightQuantizer, Protocol):
    """A quantizer, a module, whose scales are parameters and start from a weight."""

    def initial_scales(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the scales to start with, by the names of the parameters."""


def at_least_single(values: Tensor) -> Tensor:
    """Return half-precision values as float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
