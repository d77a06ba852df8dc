"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import models

if TYPE_CHECKING:
    from pipeline.config import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Split the trained parameters by how they decay.

    Norms and biases (``ndim <= 1``) do not decay; latent weights behind a quantizer form a group
    of their own, so that their decay can be set apart.
    """
    latent = {id(layer.weight) for _, layer in models.quantized_layers(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    latent_decay = recipe.latent_weight_decay
    groups = {
        "weights": (recipe.weight_decay, lambda p: p.ndim > 1 and id(p) not in latent),
        "latent": (
            recipe.weight_decay if latent_decay is None else latent_decay,
            lambda p: id(p) in latent,
        ),
        "norms_and_biases": (0.0, lambda p: p.ndim <= 1 and id(p) not in latent),
    }
    return [
        {"name": name, "params": members, "weight_decay": decay}
        for name, (decay, belongs) in groups.items()
        if (members := [parameter for parameter in trained if belongs(parameter)])
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameter groups.

    Each of its steps ends with what the model's method asks for, such as clipped latent weights.
    """
    optimizer = _optimizer(parameter_groups(model, recipe), recipe)
    after_step = models.after_step(model)
    optimizer.register_step_post_hook(lambda *_: after_step())
    return optimizer


def _optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov
        )
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0), a pure function.

    Linear warm-up from ``lr / warm-up steps`` to ``lr``, then constant, a half cosine to zero at
    the last step (Loshchilov and Hutter 2017, without restarts), or ``gamma`` at each milestone.
    """
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    total = recipe.epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.schedule == "multistep":
        passed = sum(step >= round(mark * steps_per_epoch) for mark in recipe.milestones)
        return recipe.lr * recipe.gamma**passed
    return recipe.lr
