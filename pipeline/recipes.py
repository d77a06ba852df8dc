"""Named recipes, each derived from another by replacing fields."""

from __future__ import annotations

from typing import Any

from pipeline.config import Recipe


def derive(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some fields replaced, validated anew."""
    return Recipe.model_validate({**recipe.model_dump(), **changes})


#: For any network of which nothing is known: SGD with Nesterov momentum and a cosine schedule.
DEFAULT = Recipe(epochs=30, batch_size=128, lr=0.1, weight_decay=5e-4, warmup_epochs=1)

#: LeNet5 on MNIST in five epochs: high peak rate, cosine to zero, shifts of two pixels.
MNIST = derive(DEFAULT, epochs=5, batch_size=128, lr=0.05, warmup_epochs=0.5, shift=2)

#: LeNet5 on the 1,437 digits: many short epochs, small batches.
DIGITS = derive(MNIST, epochs=20, batch_size=64, warmup_epochs=1)
