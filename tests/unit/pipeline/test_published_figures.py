"""Every published figure, typed once more from the papers' tables, against the whole catalog.

Tables stand here as the papers and repositories print them, in percent; a dash is a figure that was
never published.
"""

from __future__ import annotations

import pytest

from pipeline.experiments import catalog

Figures = dict[str, tuple[float | None, float | None]]

#: Kyrkou 2024, logs: float and with structured ternary patterns, for each data set.
STEP = """
                cifar10         cifar100        imagenet16
vgg16           93.82  89.14    74.54  64.15    87.9375  85.1875
resnet50        95.83  95.03    79.24  77.66    86.2500  91.8750
mobilenetv2     92.75  89.99    72.82  69.58    89.5000  89.2500
efficientnetb0  91.40  87.74    70.41  64.39    85.1875  87.1250
stepnet             -  88.83        -  60.51          -  87.3750
"""

#: He et al. 2018, top-1 on CIFAR-10 and top-1 and top-5 on ImageNet.
TERNARY = """
cifar10_resnet20                    91.70
cifar10_resnet32                    92.36
cifar10_resnet44                    92.47
cifar10_resnet56                    92.68
cifar10_resnet20_ternary            91.65
cifar10_resnet32_ternary            92.48
cifar10_resnet44_ternary            92.71
cifar10_resnet56_ternary            92.86
imagenet_alexnet                    61.78  82.87
imagenet_alexnet_ternary-floatends  58.59  80.44
imagenet_alexnet_ternary            57.21  79.41
imagenet_resnet18                   69.75  89.07
imagenet_resnet18_ternary           66.01  86.78
imagenet_resnet18_ternary-x2        68.35  88.20
imagenet_resnet18_ternary-x4        69.44  88.91
imagenet_resnet34                   73.31  91.42
imagenet_resnet34_ternary           70.95  89.89
imagenet_resnet50                   76.13  92.86
imagenet_resnet50_ternary           74.00  91.77
imagenet_resnet101                  77.37  93.55
imagenet_resnet101_ternary          75.63  92.49
"""

#: Stadtmann et al. 2020; the first one stands beside the tour of five epochs too.
BINARY = """
mnist_lenet5                             99.50
mnist_lenet5_float_stadtmann2020-lenet5  99.50
mnist_lenet5_binary                      99.16
cifar10_vggnet7                          94.05
cifar10_vggnet7_binary                   89.85
"""

#: Kundu et al. 2020, scatter plots: top-1 on CIFAR-10 and top-5 on Tiny ImageNet, VGG16 then
#: ResNet-18 of each.
SPARSE = """
pSC9      92.76  92.84  78.94  83.20
pSC4      92.03  92.46  79.10  82.95
pSC2      91.09  91.13  78.20  82.65
pSC1      89.52  89.43  76.73  82.18
PS4_P4    91.64  92.95  79.88  83.00
PS2_P6    90.58  91.46  77.83  82.89
PS1_P9    87.86  89.63  76.71  81.76
PSD4_P8   92.51  92.90  80.05  82.72
PSD4_P16  92.03  92.75  79.97  82.69
PSD2_P8   91.90  92.53  79.47  82.20
PSD2_P16  91.32  92.27  78.76  82.35
PSD1_P8   91.00  92.47  79.20  81.73
PSD1_P16  89.83  92.01  78.80  81.25
"""

#: The same, bar charts: top-1.
SPARSE_BARS = """
cifar10_shufflenetv2_float_kundu2020       88.91
tinyimagenet_shufflenetv2_float_kundu2020  55.43
cifar10_mobilenetv2_float_kundu2020        90.35
tinyimagenet_mobilenetv2_float_kundu2020   55.70
tinyimagenet_vgg16_sparse-psd2p16          55.50
tinyimagenet_vgg16_sparse-psd2p8           55.88
tinyimagenet_resnet18_sparse-ps1p9         58.52
tinyimagenet_resnet18_sparse-psd1p16       58.93
"""

#: Ju et al. 2022 and 2023: errors on CIFAR-10 and on SVHN.
THRESHOLD = """
threshnet28     14.75  6.34
threshnet79     13.66  -
threshnet95     13.31  6.89
triplenets      13.05  6.18
triplenetb      12.97  5.67
hardnet68       14.66  -
hardnet85       13.89  6.91
squeezenet      14.25  -
mobilenet       16.12  7.36
mobilenetv2     14.06  6.68
shufflenet      13.35  6.34
shufflenetv2    18.07  -
efficientnetb0  13.40  6.12
ghostnet        -      8.36
"""


def rows(table: str) -> dict[str, list[float | None]]:
    """The figures of each line behind its first word; None for a dash."""
    cells = [line.split() for line in table.strip().splitlines()]
    return {
        name: [None if figure == "-" else float(figure) for figure in figures]
        for name, *figures in cells
    }


def step() -> Figures:
    heading, table = STEP.strip().split("\n", 1)
    found: Figures = {}
    for backbone, figures in rows(table).items():
        for number, dataset in enumerate(heading.split()):
            in_float, with_patterns = figures[2 * number : 2 * number + 2]
            found[f"{dataset}_{backbone}"] = in_float, None
            found[f"{dataset}_{backbone}_step"] = with_patterns, None
    return found


def sparse() -> Figures:
    found: Figures = {}
    for kernels, figures in rows(SPARSE).items():
        places = ("cifar10_vgg16", "cifar10_resnet18", "tinyimagenet_vgg16")
        for place, figure in zip((*places, "tinyimagenet_resnet18"), figures, strict=True):
            name = f"{place}_sparse-{kernels.lower().replace('_', '')}"
            if kernels == "pSC9":  # STeP has float networks of VGG16 too
                name = f"{place}_float_kundu2020" if "vgg16" in place else place
            found[name] = (figure, None) if place.startswith("cifar10") else (None, figure)
    for name, (top1,) in rows(SPARSE_BARS).items():
        found[name] = top1, found.get(name, (None, None))[1]
    found["cifar10_vgg16_sparse"] = found["cifar10_vgg16_sparse-psd2p8"]
    return found


def threshold() -> Figures:
    found: Figures = {}
    for backbone, errors in rows(THRESHOLD).items():
        for dataset, error in zip(("cifar10", "svhn"), errors, strict=True):
            name = f"{dataset}_{backbone}"
            if name in ("cifar10_mobilenetv2", "cifar10_efficientnetb0"):  # STeP has them too
                name = f"{name}_float_ju2022"
            found[name] = None if error is None else 100 - error, None
    return found


def published() -> Figures:
    """All figures, top-1 and top-5, by experiment; without what has none."""
    found = {**step(), **sparse(), **threshold()}
    for table in (TERNARY, BINARY):
        for name, figures in rows(table).items():
            found[name] = figures[0], figures[1] if len(figures) == 2 else None
    return {name: figures for name, figures in found.items() if figures != (None, None)}


def test_every_published_figure_stands_beside_its_experiment_and_there_is_no_other():
    cataloged = {
        name: (entry.reference.top1, entry.reference.top5)
        for name, entry in catalog().items()
        if entry.reference and (entry.reference.top1 or entry.reference.top5)
    }
    expected = published()
    assert cataloged.keys() == expected.keys()
    for name, figures in expected.items():
        assert cataloged[name] == pytest.approx(figures, abs=1e-9), name


def test_figures_say_who_published_them_and_on_which_images_their_epoch_was_the_best():
    for name in published():
        reference = catalog()[name].reference
        assert reference is not None
        assert reference.source, name
        if "Stadtmann" in reference.source:
            assert reference.text.endswith("; best epoch on held-out images"), name
        elif name.startswith("imagenet_") and "_ternary" not in name:
            assert reference.best_on is None, "torchvision's weights, and a recipe unknown"
        else:
            assert reference.text.endswith("; best epoch on the test images"), name
