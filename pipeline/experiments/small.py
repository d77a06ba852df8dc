"""Networks that train in minutes on two CPU cores: the tour of the pipeline.

The network is LeNet5 of Stadtmann, Latotzke and Gemmeke (ICMLA 2020); its published MNIST figure
is of 500 epochs, these recipes take 5; ``mnist_lenet5_float_stadtmann2020-lenet5`` is the paper's
own. ``digits`` has no published figure for this network.
"""

from __future__ import annotations

from pipeline.config import Experiment, Reference
from pipeline.recipes import DIGITS, MNIST

TITLE = "The tour of the pipeline: minutes on two CPU cores"

_LENET5_MNIST = Reference(
    what="LeNet5; 5 epochs here, published after 500",
    top1=99.50,
    best_on="validation",
    source="Stadtmann et al., ICMLA 2020",
)
_TERNARY_MNIST = Reference(
    what="our own: LeNet5 with ternary weights by the method of He et al. 2018"
)
_DIGITS = Reference(what="our own: the tour of the pipeline on embedded data")

MNIST_LENET5 = Experiment(
    name="mnist_lenet5",
    dataset="mnist",
    backbone="lenet5",
    train=MNIST,
    reference=_LENET5_MNIST,
)
DIGITS_LENET5 = Experiment(
    name="digits_lenet5",
    dataset="digits",
    backbone="lenet5",
    train=DIGITS,
    reference=_DIGITS,
)


def _ternary(base: Experiment, reference: Reference) -> list[Experiment]:
    """The base network with ternary weights and 1, 2 and 4 terms of residual expansion."""
    suffixes = {"ternary": "ternary", "ternary-x2": "ternary(expansion=2)"}
    suffixes["ternary-x4"] = "ternary(expansion=4)"
    return [
        base.model_copy(
            update={"name": f"{base.name}_{suffix}", "method": method, "reference": reference}
        )
        for suffix, method in suffixes.items()
    ]


EXPERIMENTS = [
    MNIST_LENET5,
    *_ternary(MNIST_LENET5, _TERNARY_MNIST),
    DIGITS_LENET5,
    *_ternary(DIGITS_LENET5, _DIGITS),
]
