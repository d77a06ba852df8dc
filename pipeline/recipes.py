"""Named recipes, each derived from another by replacing fields."""

from __future__ import annotations

from typing import Any

from pipeline.config import Recipe


def derive(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some fields replaced, validated anew."""
    return Recipe.model_validate({**recipe.model_dump(), **changes})


#: For any network of which nothing is known: SGD with Nesterov momentum and a cosine schedule.
DEFAULT = Recipe(epochs=30, batch_size=128, lr=0.1, weight_decay=5e-4, warmup_epochs=1)

#: What keeps the class of an image, by data set. Photographs of any size: a random window, as
#: in Szegedy et al. 2015, and the central crop of 224 out of 256 pixels; small ones: the shift and
#: flip of Lee et al. 2015. House numbers are not mirrored.
_PHOTOGRAPHS = {"crop_area": (0.08, 1.0), "flip": True, "test_crop": 224 / 256}
_AUGMENTATION: dict[str, dict[str, Any]] = {
    "imagenet": _PHOTOGRAPHS,
    "imagenet16": _PHOTOGRAPHS,
    "folder": _PHOTOGRAPHS,
    "tinyimagenet": {"shift": 8, "flip": True},
    "cifar10": {"shift": 4, "flip": True},
    "cifar100": {"shift": 4, "flip": True},
    "svhn": {"shift": 4},
}


def default_recipe(dataset: str) -> Recipe:
    """The recipe of a combination that nobody has tuned, with the data set's augmentation."""
    return derive(DEFAULT, **_AUGMENTATION.get(dataset, {}))


#: LeNet5 on MNIST in five epochs: high peak rate, cosine to zero, shifts of two pixels.
MNIST = derive(DEFAULT, epochs=5, batch_size=128, lr=0.05, warmup_epochs=0.5, shift=2)

#: LeNet5 on the 1,437 digits: many short epochs, small batches.
DIGITS = derive(MNIST, epochs=20, batch_size=64, warmup_epochs=1)
