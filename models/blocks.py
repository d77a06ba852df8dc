"""Networks of convolution blocks in which the place of the pooling may be chosen."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

#: The order in a block that pools: convolution (C), batch norm (B), activation (A), pool (P).
BlockOrder = Literal["CBAP", "CPBA"]


class BlockNetwork(nn.Module):
    """A network whose blocks pool after the activation (CBAP) or before the batch norm (CPBA).

    `order` is read at each forward pass, so a method may set it on a built network; None stands for
    CBAP where no method has another preference. The activation behind layer k is the module
    `activation<k>`, which a method may replace.

    In eval mode both orders give the same outputs where no weight of a batch norm is negative,
    since the maximum commutes with a rising map. In training they differ: the batch norms see
    other populations, and among equal activations the pool sends the gradient to the first
    (Stadtmann, Latotzke and Gemmeke, ICMLA 2020).
    """

    def __init__(self, order: BlockOrder | None) -> None:
        super().__init__()
        self.order = order

    def finish_block(
        self, convolved: Tensor, norm: nn.Module, activation: nn.Module, pool: nn.Module
    ) -> Tensor:
        """Apply what follows a block's convolution, in the network's order."""
        if self.order == "CPBA":
            return activation(norm(pool(convolved)))
        return pool(activation(norm(convolved)))
