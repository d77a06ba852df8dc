"""An exponential moving average of a network's weights, and averages over ranks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

import models

if TYPE_CHECKING:
    from pipeline.context import TrainContext

#: The average's memory while it is young: after n steps at most (1 + n) / (10 + n), so that the
#: weights of the beginning are soon forgotten.
_YOUNG = 10


class MovingAverage:
    """The exponential moving average of a network's trained weights and batch norm statistics.

        average <- d average + (1 - d) weights,    d = min(decay, (1 + n) / (10 + n))

    after optimizer step n, as in TensorFlow's ``ExponentialMovingAverage``. Quantized layers
    average their latent weights.

    Attributes:
        model: a network of its own that has the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay
        constants = set(models.constant_buffers(model))
        pairs = [
            *zip(self.model.parameters(), model.parameters(), strict=True),
            *(
                (mine, theirs)
                for (name, mine), theirs in zip(
                    self.model.named_buffers(), model.buffers(), strict=True
                )
                if mine.is_floating_point() and name not in constants
            ),
        ]
        self._average = [mine for mine, _ in pairs]
        self._weights = [theirs.detach() for _, theirs in pairs]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (from 0)."""
        decay = min(self._decay, (1 + step) / (_YOUNG + step))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)


@torch.no_grad()
def average_statistics(model: nn.Module, context: TrainContext) -> None:
    """Make the batch norm statistics, gathered by each rank on its share, the same everywhere."""
    constants = set(models.constant_buffers(model))
    buffers = [
        buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and name not in constants
    ]
    if context.world_size == 1 or not buffers:
        return
    # One message instead of two for each batch norm.
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    context.sum_over_ranks(flat)
    flat /= context.world_size
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
