"""An exponential moving average of a network's weights, and averages over ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
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


class Statistics:
    """The batch norm statistics of networks, which each rank gathers on its share of the batches.

    Within an epoch they differ from rank to rank; at its end they are averaged.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._buffers: list[torch.Tensor] = []
        for network in networks:
            constants = set(models.constant_buffers(network))
            self._buffers += [
                buffer
                for name, buffer in network.named_buffers()
                if buffer.is_floating_point() and name not in constants
            ]

    def row(self) -> torch.Tensor:
        """All of them in one tensor, (n,): one message instead of two for each batch norm."""
        if not self._buffers:
            return torch.zeros(0)
        return torch.cat([buffer.flatten() for buffer in self._buffers])

    def set(self, row: torch.Tensor) -> None:
        """Take over what ``row`` gave, here or on another rank.

        Raises:
            ValueError: for the row of another network.
        """
        sizes = [buffer.numel() for buffer in self._buffers]
        if len(row) != sum(sizes):
            raise ValueError(f"{len(row)} batch norm statistics for a network with {sum(sizes)}")
        for buffer, values in zip(self._buffers, row.split(sizes), strict=True):
            buffer.copy_(values.view_as(buffer))

    def average(self, context: TrainContext) -> None:
        """Make them the same on all ranks."""
        if context.world_size > 1 and self._buffers:
            row = self.row()
            context.sum_over_ranks(row)
            self.set(row / context.world_size)
