"""STeP: C. Kyrkou, "Toward Efficient Convolutional Neural Networks With Structured Ternary
Patterns", IEEE TNNLS 2024, arXiv 2407.14831.

Networks and figures are those of the authors' repository, which has logs of three data sets and
none of Tiny ImageNet. Each figure is of one run and the best epoch on the test set. The authors
trained on two GPUs whose batch norms each saw half of a batch: 2 workers on 2 GPUs do that here.
"""

from __future__ import annotations

from pipeline.config import Experiment, Reference
from pipeline.recipes import KYRKOU2024, derive

TITLE = "Structured ternary patterns: Kyrkou, IEEE TNNLS 2024, arXiv 2407.14831"

_SOURCE = "Kyrkou, IEEE TNNLS 2024"

#: All networks have the stems of the small form, also on ImageNet16.
_NETWORKS = {
    "vgg16": ("VGG16", "vgg16(form=cifar)"),
    "resnet50": ("ResNet-50", "resnet50(form=cifar)"),
    "mobilenetv2": ("MobileNetV2", "mobilenetv2(form=cifar)"),
    "efficientnetb0": ("EfficientNet-B0", "efficientnetb0(form=cifar, original=true)"),
    "stepnet": ("StepNet", "stepnet(original=true)"),
}

#: Published top-1 in percent. ImageNet16 has 1,600 test images.
_FIGURES: dict[str, dict[str, dict[str, float | None]]] = {
    "cifar10": {
        "vgg16": {"float": 93.82, "step": 89.14},
        "resnet50": {"float": 95.83, "step": 95.03},
        "mobilenetv2": {"float": 92.75, "step": 89.99},
        "efficientnetb0": {"float": 91.40, "step": 87.74},
        "stepnet": {"step": 88.83},
    },
    "cifar100": {
        "vgg16": {"float": 74.54, "step": 64.15},
        "resnet50": {"float": 79.24, "step": 77.66},
        "mobilenetv2": {"float": 72.82, "step": 69.58},
        "efficientnetb0": {"float": 70.41, "step": 64.39},
        "stepnet": {"step": 60.51},
    },
    "imagenet16": {
        "vgg16": {"float": 87.9375, "step": 85.1875},
        "resnet50": {"float": 86.25, "step": 91.875},
        "mobilenetv2": {"float": 89.50, "step": 89.25},
        "efficientnetb0": {"float": 85.1875, "step": 87.125},
        "stepnet": {"step": 87.375},
    },
    "tinyimagenet": {
        "vgg16": {"float": None, "step": None},
        "resnet50": {"float": None, "step": None},
        "mobilenetv2": {"float": None, "step": None},
        "efficientnetb0": {"float": None, "step": None},
        "stepnet": {"step": None},
    },
}


def _experiment(dataset: str, backbone: str, method: str, top1: float | None) -> Experiment:
    network, call = _NETWORKS[backbone]
    what = f"{network} with structured ternary patterns" if method == "step" else network
    batch_size = 32 if dataset == "imagenet16" and backbone != "vgg16" else 128
    return Experiment(
        name=f"{dataset}_{backbone}" if method == "float" else f"{dataset}_{backbone}_{method}",
        dataset=dataset,
        backbone=call,
        method="step(mode=original)" if method == "step" else "float",
        train=derive(KYRKOU2024, batch_size=batch_size),
        reference=Reference(
            what=what, top1=top1, best_on=None if top1 is None else "test", source=_SOURCE
        ),
    )


EXPERIMENTS = [
    _experiment(dataset, backbone, method, top1)
    for dataset, networks in _FIGURES.items()
    for backbone, figures in networks.items()
    for method, top1 in figures.items()
]
