"""Initial weights that several networks share."""

from __future__ import annotations

from torch import nn


def he_normal(network: nn.Module) -> None:
    """Draw the weights as the ternary paper's code does (He et al. 2015, arXiv 1502.01852).

    Convolution (O, I, kh, kw): normal with variance 2 / (kh kw O). Linear (O, I): normal with
    variance 2 / I, and a bias of zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def xavier_normal(network: nn.Module) -> None:
    """Draw the weights as the binary paper's code does (Glorot and Bengio 2010).

    Convolution and linear: normal with variance 2 / (fan_in + fan_out). Biases are left as they
    are.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
