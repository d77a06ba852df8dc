"""ImageNet by recipes of our own: every method on ResNet-50 and ResNet-18, in 16, 32 and 88 epochs.

For these no paper has a figure. FFCV's recipes, which are behind ours, reach 73.8, 76.6 and 78.4 %
with ResNet-50 in float, 66.9, 70.0 and 72.4 % with ResNet-18, averaging each test image with its
mirror image. Networks of each method are trained from scratch, and where they have the parameters
of the float network, so that its weights load strictly, from torchvision's weights as well
(``-finetune``).

What a recipe is for a method says ``recipes.named_recipe``: among others, binary networks take Adam
and do not decay their latent weights, which are held to [-1, 1] anyway. Beside Adam, and the rate
of their ResNet-50, FFCV's recipes differ in a schedule that falls linearly, momentum without
Nesterov, no average of the weights, and a test at 256 pixels instead of 224.
"""

from __future__ import annotations

from pipeline.config import Experiment, Reference
from pipeline.recipes import FINETUNE, float_weights, named_recipe

TITLE = "ImageNet in 16, 32 and 88 epochs: our own recipes"

_NETWORKS = {"resnet50": "ResNet-50", "resnet18": "ResNet-18"}

_METHODS = {
    "float": "",
    "ternary": ", ternary weights",
    "binary": ", binary weights and activations",
    "sparse": ", pre-defined sparse kernels PSD4_P8",
    "step": ", structured ternary patterns",
}

_FROM_SCRATCH = ("16ep", "32ep", "88ep")
_FROM_FLOAT = tuple(f"{recipe}{FINETUNE}" for recipe in _FROM_SCRATCH)


def _experiment(backbone: str, method: str, recipe: str) -> Experiment:
    train = named_recipe(recipe, backbone, method)
    init_from = float_weights("imagenet", backbone) if recipe in _FROM_FLOAT else None
    start = "scratch" if init_from is None else "torchvision's float weights"
    what = f"{_NETWORKS[backbone]}{_METHODS[method]}, {train.epochs} epochs from {start}"
    return Experiment(
        name=f"imagenet_{backbone}_{method}_{recipe}",
        dataset="imagenet",
        backbone=backbone,
        method=method,
        init_from=init_from,
        train=train,
        reference=Reference(what=what),
    )


def _recipes(method: str) -> tuple[str, ...]:
    """Float weights are no news to a float network, and have no place in frozen patterns."""
    return _FROM_SCRATCH if method in ("float", "step") else (*_FROM_SCRATCH, *_FROM_FLOAT)


EXPERIMENTS = [
    _experiment(backbone, method, recipe)
    for backbone in _NETWORKS
    for method in _METHODS
    for recipe in _recipes(method)
]
