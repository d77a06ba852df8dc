"""Ternary weights: Z. He, B. Gong, D. Fan, "Optimize Deep Convolutional Neural Network with
Ternarized Weights and High Accuracy", WACV 2019, arXiv 1807.07948.

Figures are those of the authors' repository; each is of the best epoch on the test set. All layers
are ternary but where the name says ``floatends``. The abstract's ResNet-18 with residual expansion
(69.33 / 89.68 %) is no row of that repository, and nothing says how it was made.

On ImageNet, ternary networks begin with float weights: torchvision's, which are the paper's float
row, or for AlexNet those of the float experiment here.
"""

from __future__ import annotations

from pipeline.config import Experiment, Reference
from pipeline.recipes import HE2018, HE2018_FINETUNE, TORCHVISION, derive, float_weights

TITLE = "Ternary weights, residual expansion: He et al., WACV 2019, arXiv 1807.07948"

_SOURCE = "He et al., WACV 2019"

#: By the method's part of a name: the method, and what to call it.
_METHODS = {
    "float": ("float", ""),
    "ternary": ("ternary", ", all layers ternary"),
    "ternary-x2": ("ternary-x2", ", all layers ternary, residual expansion 2"),
    "ternary-x4": ("ternary-x4", ", all layers ternary, residual expansion 4"),
    "ternary-floatends": ("ternary(first_last=float)", ", all but first and last layer ternary"),
}

#: Top-1 in percent on CIFAR-10.
_CIFAR10 = {
    "resnet20": {"float": 91.70, "ternary": 91.65},
    "resnet32": {"float": 92.36, "ternary": 92.48},
    "resnet44": {"float": 92.47, "ternary": 92.71},
    "resnet56": {"float": 92.68, "ternary": 92.86},
}

#: Top-1 and top-5 in percent on ImageNet.
_IMAGENET = {
    "alexnet": {
        "float": (61.78, 82.87),
        "ternary-floatends": (58.59, 80.44),
        "ternary": (57.21, 79.41),
    },
    "resnet18": {
        "float": (69.75, 89.07),
        "ternary": (66.01, 86.78),
        "ternary-x2": (68.35, 88.20),
        "ternary-x4": (69.44, 88.91),
    },
    "resnet34": {"float": (73.31, 91.42), "ternary": (70.95, 89.89)},
    "resnet50": {"float": (76.13, 92.86), "ternary": (74.00, 91.77)},
    "resnet101": {"float": (77.37, 93.55), "ternary": (75.63, 92.49)},
}

_TITLES = {"alexnet": "AlexNet"} | {
    f"resnet{depth}": f"ResNet-{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101)
}


def _on_cifar10(backbone: str, method: str, top1: float) -> Experiment:
    call, what = _METHODS[method]
    return Experiment(
        name=f"cifar10_{backbone}" if method == "float" else f"cifar10_{backbone}_{method}",
        dataset="cifar10",
        backbone=backbone,
        method=call,
        train=HE2018,
        reference=Reference(
            what=f"{_TITLES[backbone]}{what}", top1=top1, best_on="test", source=_SOURCE
        ),
    )


def _in_float(backbone: str, top1: float, top5: float) -> Experiment:
    """A float network; AlexNet's recipe is not public, so it is torchvision's of its AlexNet."""
    is_alexnet = backbone == "alexnet"
    note = "by a recipe that is not public" if is_alexnet else "torchvision's weights"
    reference = Reference(what=f"{_TITLES[backbone]}, {note}", top1=top1, top5=top5, source=_SOURCE)
    return Experiment(
        name=f"imagenet_{backbone}",
        dataset="imagenet",
        backbone=backbone,
        train=derive(TORCHVISION, lr=0.01) if is_alexnet else TORCHVISION,
        reference=reference,
    )


def _finetuned(backbone: str, method: str, top1: float, top5: float) -> Experiment:
    call, what = _METHODS[method]
    return Experiment(
        name=f"imagenet_{backbone}_{method}",
        dataset="imagenet",
        backbone=backbone,
        method=call,
        init_from=float_weights("imagenet", backbone),
        train=HE2018_FINETUNE,
        reference=Reference(
            what=f"{_TITLES[backbone]}{what}", top1=top1, top5=top5, best_on="test", source=_SOURCE
        ),
    )


EXPERIMENTS = [
    *(
        _on_cifar10(backbone, method, top1)
        for backbone, figures in _CIFAR10.items()
        for method, top1 in figures.items()
    ),
    *(
        _in_float(backbone, *accuracies)
        if method == "float"
        else _finetuned(backbone, method, *accuracies)
        for backbone, figures in _IMAGENET.items()
        for method, accuracies in figures.items()
    ),
]
