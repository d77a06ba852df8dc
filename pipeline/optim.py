"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import models

if TYPE_CHECKING:
    from pipeline.config import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Split the trained parameters by how they decay.

    Latent weights behind a quantizer form a group of their own, and so do norms and biases
    (``ndim <= 1``), so that the decay of each can be set apart.
    """
    latent = {id(layer.weight) for _, layer in models.quantized_layers(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = {
        "weights": (recipe.weight_decay, lambda p: p.ndim > 1 and id(p) not in latent),
        "latent": (recipe.latent_weight_decay, lambda p: id(p) in latent),
        "norms_and_biases": (
            recipe.norm_weight_decay,
            lambda p: p.ndim <= 1 and id(p) not in latent,
        ),
    }
    return [
        {
            "name": name,
            "params": members,
            "weight_decay": recipe.weight_decay if decay is None else decay,
        }
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
    # Fused: one pass over the memory (measured 2.5 to 5 times as fast as torch's default on a
    # CPU), and under float16 it skips a step without asking the device.
    if recipe.optimizer == "sgd":
        sgd = torch.optim.SGD(
            groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True
        )
        if recipe.momentum:
            # torch leaves them uninitialized when float16 skips the very first step.
            for parameter in (p for group in groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, fused=True)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=recipe.lr, momentum=recipe.momentum)
    from pytorch_optimizer import Lamb

    # As the paper has it: no bias correction, and the decay counts in the trust ratio.
    return Lamb(groups, lr=recipe.lr, adam_debias=True, weight_decouple=False)


def peak_rate(recipe: Recipe) -> float:
    """The peak learning rate: ``lr``, scaled with the batch where ``lr_batch_size`` is set.

    The linear scaling rule of Goyal et al. 2017 (arXiv 1706.02677).
    """
    if recipe.lr_batch_size is None:
        return recipe.lr
    return recipe.lr * recipe.batch_size / recipe.lr_batch_size


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0), a pure function.

    Linear warm-up from ``peak / warm-up steps`` to the peak, then constant, a half cosine to zero
    one step after the last (Loshchilov and Hutter 2017, without restarts), or a factor at each
    milestone.
    With ``schedule_unit=epoch`` the rate of an epoch's first step holds for all of it.
    Of ``plateau`` this is the rate before any drop, see ``plateau_factor``.
    """
    peak = peak_rate(recipe)
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    if recipe.schedule_unit == "epoch":
        step = max(warmup, step - step % steps_per_epoch)
    if recipe.schedule == "cosine":
        total = recipe.epochs * steps_per_epoch
        progress = (step - warmup) / max(1, total - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.schedule == "multistep":
        passed = sum(step >= round(mark * steps_per_epoch) for mark in recipe.milestones)
        if isinstance(recipe.gamma, tuple):
            return peak * math.prod(recipe.gamma[:passed])
        return peak * recipe.gamma**passed
    return peak


def plateau_factor(recipe: Recipe, losses: Sequence[float]) -> float:
    """What the learning rate is multiplied with after these held-out losses of whole epochs.

    The whole history is played to torch's ``ReduceLROnPlateau``, so that a continued run has the
    factor of an uninterrupted one. 1 for every other schedule.
    """
    if recipe.schedule != "plateau":
        return 1.0
    gamma = recipe.gamma[0] if isinstance(recipe.gamma, tuple) else recipe.gamma
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = ReduceLROnPlateau(stand_in, factor=gamma, patience=recipe.patience, eps=0)
    for loss in losses:
        scheduler.step(loss)
    return float(stand_in.param_groups[0]["lr"])
