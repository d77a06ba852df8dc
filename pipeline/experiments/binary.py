"""Binary networks: L. Stadtmann, C. Latotzke, T. Gemmeke, "From Quantitative Analysis to Synthesis
of Efficient Binary Neural Networks", ICMLA 2020, doi 10.1109/ICMLA51294.2020.00024.

The last training images are held out, and the epoch that is best on them is tested, as in the
paper; it runs each experiment with five seeds. Of CIFAR-10 the paper's program shifts and mirrors
the held-out images too, as if they were trained with; here they are left as they are. Published
are four figures of the authors' repository, each of one run. Its two studies have no public
figures:

- capacity: which layers are float or ternary (l1, ln: weights of the first and the last layer, l1n:
  of both; tern1 to tern5: activations too), and wider networks;
- tuning: latent weights that are pulled to -1 and +1, and a start from the float network.

``mnist_lenet5`` in float is a short tour (see small.py); the paper's is
``mnist_lenet5_float_stadtmann2020-lenet5``.
"""

from __future__ import annotations

from typing import Any

from pipeline.config import Experiment, Reference
from pipeline.recipes import (
    FINETUNE,
    LATENT_PULLS,
    RECIPES,
    STADTMANN2020_LENET5,
    STADTMANN2020_LENET5_BINARY,
    STADTMANN2020_VGGNET7,
    STADTMANN2020_VGGNET7_BINARY,
    float_weights,
)

TITLE = "Binary weights and activations: Stadtmann et al., ICMLA 2020"

_SOURCE = "Stadtmann et al., ICMLA 2020"

#: The paper trains each network of its studies so often.
_SEEDS = 5


def _published(what: str, top1: float) -> Reference:
    return Reference(what=what, top1=top1, best_on="validation", source=_SOURCE)


def _studied(what: str) -> Reference:
    return Reference(what=what, source=_SOURCE)


LENET5 = Experiment(
    name="mnist_lenet5_float_stadtmann2020-lenet5",
    dataset="mnist",
    backbone="lenet5",
    train=STADTMANN2020_LENET5,
    reference=_published("LeNet5", 99.50),
    seed=1,
)
BINARY_LENET5 = Experiment(
    name="mnist_lenet5_binary",
    dataset="mnist",
    backbone="lenet5(bias=false)",
    method="binary",
    train=STADTMANN2020_LENET5_BINARY,
    reference=_published("LeNet5, binary", 99.16),
    seed=1,
)
VGGNET7 = Experiment(
    name="cifar10_vggnet7",
    dataset="cifar10",
    backbone="vggnet7",
    train=STADTMANN2020_VGGNET7,
    reference=_published("VGGNet7", 94.05),
    seed=1,
)
BINARY_VGGNET7 = Experiment(
    name="cifar10_vggnet7_binary",
    dataset="cifar10",
    backbone="vggnet7(bias=false)",
    method="binary",
    train=STADTMANN2020_VGGNET7_BINARY,
    reference=_published("VGGNet7, binary", 89.85),
    seed=1,
)

_ENDS_VGGNET7 = "ternary_activations='10000001'"

#: Of binary LeNet5: ternary weights by layer, digit by digit, and ternary activations.
_LENET5_CAPACITY = {
    "l1t": ("ternary weights in the first layer", "ternary_weights='1000'"),
    "lnt": ("ternary weights in the last layer", "ternary_weights='0001'"),
    "l1nt": ("ternary weights in the first and last layer", "ternary_weights='1001'"),
    "tern1": (
        "ternary weights and activations at both ends",
        "ternary_weights='1001', ternary_activations='101'",
    ),
}

#: Of binary VGGNet7, whose activations are those behind its layers 1 to 8.
_VGGNET7_CAPACITY = {
    "l1fp": ("float weights in the first layer", "first=float"),
    "lnfp": ("float weights in the last layer", "last=float"),
    "l1nfp": ("float weights in the first and last layer", "first=float, last=float"),
    "l1t": ("ternary weights in the first layer", "ternary_weights='100000000'"),
    "lnt": ("ternary weights in the last layer", "ternary_weights='000000001'"),
    "l1nt": ("ternary weights in the first and last layer", "ternary_weights='100000001'"),
    "tern1": ("ternary activations", "ternary_activations=all"),
    "tern2": ("ternary activations at both ends", _ENDS_VGGNET7),
    "tern3": (
        "two ternary activations at each end",
        "ternary_activations='11000011'",
    ),
    "tern4": (
        "ternary weights and activations at both ends",
        f"ternary_weights='100000001', {_ENDS_VGGNET7}",
    ),
    "tern5": ("all ternary", "ternary_weights=all, ternary_activations=all"),
}


def _replaced(base: Experiment, **changes: Any) -> Experiment:
    """A network of the studies."""
    return base.model_copy(update={"seeds": _SEEDS, **changes})


def _capacity(base: Experiment, variants: dict[str, tuple[str, str]]) -> list[Experiment]:
    network = "LeNet5" if base is BINARY_LENET5 else "VGGNet7"
    return [
        _replaced(
            base,
            name=f"{base.name}-{variant}",
            method=f"binary({arguments})",
            reference=_studied(f"{network}, binary, {what}"),
        )
        for variant, (what, arguments) in variants.items()
    ]


def _wider(width: int) -> Experiment:
    return _replaced(
        BINARY_VGGNET7,
        name=f"{BINARY_VGGNET7.name}-widen{width}",
        backbone=f"vggnet7(bias=false, width={width})",
        reference=_studied(f"VGGNet7, binary, convolutions {width} times as wide"),
    )


def _tuned(factor: str) -> Experiment:
    return _replaced(
        BINARY_VGGNET7,
        name=f"{BINARY_VGGNET7.name}_bin{factor}",
        train=RECIPES[f"bin{factor}"].recipe,
        reference=_studied(f"VGGNet7, binary, latent weights pulled to -1 and +1 by {factor}"),
    )


#: The float network has biases, so the binary one that begins with its weights has them too.
PRETRAINED = _replaced(
    BINARY_VGGNET7,
    name=f"{BINARY_VGGNET7.name}_stadtmann2020-vggnet7-binary{FINETUNE}",
    backbone="vggnet7",
    init_from=float_weights("cifar10", "vggnet7"),
    reference=_studied("VGGNet7, binary, from the weights of the float network"),
)

EXPERIMENTS = [
    LENET5,
    BINARY_LENET5,
    VGGNET7,
    BINARY_VGGNET7,
    *_capacity(BINARY_LENET5, _LENET5_CAPACITY),
    *_capacity(BINARY_VGGNET7, _VGGNET7_CAPACITY),
    _wider(2),
    _wider(4),
    *map(_tuned, LATENT_PULLS),
    PRETRAINED,
]
