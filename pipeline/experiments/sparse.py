"""Pre-defined sparse kernels: S. Kundu et al., "Pre-defined Sparsity for Low-Complexity
Convolutional Neural Networks", IEEE Transactions on Computers 69(7), 2020, arXiv 2001.10710, and
"A Pre-defined Sparse Kernel Based Convolution for Deep CNNs", Allerton 2019, arXiv 1910.00724.

Figures are read off the plots of the authors' repository, to 0.03 %. It measures accuracy with the
batch norm statistics of the test batches, and takes the best epoch. Public are the recipes of
VGG16 and MobileNetV2 on CIFAR-10, the latter also with random kernels, whose figures are not
published; ResNet-18 takes VGG16's, and so does Tiny ImageNet with larger shifts and its own
normalization, which is our choice, as is the head of four pixels on its maps, which the MobileNetV2
of the authors has. Which ShuffleNet they compare with is not public either: the plots have it at
0.0980 G multiply-accumulates on CIFAR-10, and ShuffleNetV2 1.5x, our guess, is the nearest that we
know, at 0.0911 G.

STeP trains VGG16 and MobileNetV2 too, and its float networks have the short names.
"""

from __future__ import annotations

from pipeline.config import Experiment, Recipe, Reference
from pipeline.recipes import KUNDU2020, KUNDU2020_150EP, derive

TITLE = "Pre-defined sparse kernels: Kundu et al., IEEE TC 2020, and Allerton 2019"

_SOURCE = "Kundu et al., IEEE TC 2020 (plots)"

_TITLES = {
    "vgg16": "VGG16",
    "resnet18": "ResNet-18",
    "mobilenetv2": "MobileNetV2",
    "shufflenetv2": "ShuffleNetV2 1.5x, our guess",
}
_NETWORKS = {
    "cifar10": {
        "vgg16": "vgg16(form=cifar, init=xavier)",
        "resnet18": "resnet18(form=cifar)",
        "mobilenetv2": "mobilenetv2(form=cifar)",
        "shufflenetv2": "shufflenetv2(form=cifar, width=1.5)",
    },
    "tinyimagenet": {
        "vgg16": "vgg16(form=cifar, init=xavier, head=flattened)",
        "resnet18": "resnet18(form=cifar)",
        "mobilenetv2": "mobilenetv2(form=cifar, head=flattened)",
        "shufflenetv2": "shufflenetv2(form=cifar, width=1.5)",
    },
}

#: Of the other networks the float one is in no other table, so needs no recipe in its name.
_ALSO_OF_OTHERS = ("vgg16", "mobilenetv2", "shufflenetv2")

#: Published accuracies in percent: top-1 of VGG16 and ResNet-18 on CIFAR-10, then their top-5 on
#: Tiny ImageNet. Kernels have the names of the plots: n random positions (pSCn; 9 is the float
#: network), n positions in period p (PSn_Pp), the same with one whole kernel a period (PSDn_Pp).
_KERNELS = {
    "pSC9": (92.76, 92.84, 78.94, 83.20),
    "pSC4": (92.03, 92.46, 79.10, 82.95),
    "pSC2": (91.09, 91.13, 78.20, 82.65),
    "pSC1": (89.52, 89.43, 76.73, 82.18),
    "PS4_P4": (91.64, 92.95, 79.88, 83.00),
    "PS2_P6": (90.58, 91.46, 77.83, 82.89),
    "PS1_P9": (87.86, 89.63, 76.71, 81.76),
    "PSD4_P8": (92.51, 92.90, 80.05, 82.72),
    "PSD4_P16": (92.03, 92.75, 79.97, 82.69),
    "PSD2_P8": (91.90, 92.53, 79.47, 82.20),
    "PSD2_P16": (91.32, 92.27, 78.76, 82.35),
    "PSD1_P8": (91.00, 92.47, 79.20, 81.73),
    "PSD1_P16": (89.83, 92.01, 78.80, 81.25),
}

#: Of four of them the top-1 on Tiny ImageNet is published too.
_TINY_TOP1 = {
    ("vgg16", "PSD2_P16"): 55.50,
    ("vgg16", "PSD2_P8"): 55.88,
    ("resnet18", "PS1_P9"): 58.52,
    ("resnet18", "PSD1_P16"): 58.93,
}

#: Top-1 of the networks that these are compared with.
_COMPARED = {
    "mobilenetv2": {"cifar10": 90.35, "tinyimagenet": 55.70},
    "shufflenetv2": {"cifar10": 88.91, "tinyimagenet": 55.43},
}


#: Kernels of the authors' script for MobileNetV2, beside the float network.
_OF_MOBILENETV2 = ("pSC4", "pSC2", "pSC1")

#: Whose recipe for CIFAR-10 is public.
_PUBLIC = ("vgg16", "mobilenetv2")


def _recipe(dataset: str, backbone: str, kernels: str) -> Recipe:
    if backbone in _COMPARED:
        train = derive(KUNDU2020, weight_decay=0)
    else:
        train = KUNDU2020_150EP if kernels.startswith(("pSC4", "PS4", "PSD4")) else KUNDU2020
    if dataset == "tinyimagenet":
        train = derive(train, shift=8, normalization="dataset")
    return train


def _experiment(
    dataset: str,
    backbone: str,
    kernels: str,
    top1: float | None = None,
    top5: float | None = None,
) -> Experiment:
    name, what = f"{dataset}_{backbone}", _TITLES[backbone]
    method = "float"
    if kernels != "pSC9":
        method = f"sparse-{kernels.lower().replace('_', '')}"
        name, what = f"{name}_{method}", f"{what}, {kernels}"
    elif backbone in _ALSO_OF_OTHERS:
        name = f"{name}_float_kundu2020"
    if dataset != "cifar10" or backbone not in _PUBLIC:
        what = f"{what}; recipe not public"
    is_published = top1 is not None or top5 is not None
    return Experiment(
        name=name,
        dataset=dataset,
        backbone=_NETWORKS[dataset][backbone],
        method=method,
        train=_recipe(dataset, backbone, kernels),
        reference=Reference(
            what=what,
            top1=top1,
            top5=top5,
            best_on="test" if is_published else None,
            source=_SOURCE,
        ),
    )


#: One of the three configurations that the authors have a script for, each written into its own.
#: Method ``sparse`` without more is another of them, PSD4_P8.
VGG16_SPARSE = _experiment("cifar10", "vgg16", "PSD2_P8", 91.90).model_copy(
    update={"name": "cifar10_vgg16_sparse"}
)

EXPERIMENTS = [
    VGG16_SPARSE,
    *(
        _experiment("cifar10", backbone, kernels, figures[column])
        for column, backbone in enumerate(("vgg16", "resnet18"))
        for kernels, figures in _KERNELS.items()
    ),
    *(
        _experiment(
            "tinyimagenet", backbone, kernels, _TINY_TOP1.get((backbone, kernels)), figures[column]
        )
        for column, backbone in enumerate(("vgg16", "resnet18"), start=2)
        for kernels, figures in _KERNELS.items()
    ),
    *(
        _experiment(dataset, backbone, "pSC9", top1)
        for backbone, figures in _COMPARED.items()
        for dataset, top1 in figures.items()
    ),
    *(_experiment("cifar10", "mobilenetv2", kernels) for kernels in _OF_MOBILENETV2),
]
