from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from pipeline.config import Recipe
from pipeline.optim import build_optimizer, learning_rate, parameter_groups


def test_groups_split_latent_weights_from_norms_and_biases():
    model = models.create_model(
        "lenet5", "ternary(first_last=float)", num_classes=10, in_channels=1, image_size=28
    )
    groups = {
        group["name"]: group
        for group in parameter_groups(model, Recipe(weight_decay=0.1, latent_weight_decay=0.2))
    }
    sizes = {name: sum(p.numel() for p in group["params"]) for name, group in groups.items()}
    # Layer table of LeNet5: conv1 800, conv2 51,200, fc1 819,200, fc2 5,120 weights.
    assert sizes == {"weights": 5_920, "latent": 870_400, "norms_and_biases": 1_216 + 618}
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    assert decay == {"weights": 0.1, "latent": 0.2, "norms_and_biases": 0.0}


def test_a_float_network_has_no_latent_group_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(model, Recipe())
    assert [group["name"] for group in groups] == ["weights", "norms_and_biases"]
    assert sum(len(group["params"]) for group in groups) == 3


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_optimizer_is_torch_s_own(name):
    optimizer = build_optimizer(nn.Linear(2, 2), Recipe(optimizer=name, lr=0.25, momentum=0.5))
    assert type(optimizer).__name__.lower() == name
    assert optimizer.param_groups[0]["lr"] == 0.25


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    total = recipe.epochs * steps_per_epoch
    return [learning_rate(recipe, step, steps_per_epoch) for step in range(total)]


def test_cosine_equals_torch_s_schedule():
    recipe = Recipe(epochs=5, lr=0.3, schedule="cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=35)
    for rate in rates(recipe, 7):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_multistep_gives_the_paper_s_rates():
    """He et al. 2018, CIFAR-10: 0.1, then a tenth at epochs 80 and 120."""
    recipe = Recipe(epochs=160, lr=0.1, schedule="multistep", milestones=(80, 120), gamma=0.1)
    per_epoch = rates(recipe, 2)[::2]
    assert per_epoch == pytest.approx([0.1] * 80 + [0.01] * 40 + [0.001] * 40)


def test_warmup_rises_in_equal_steps_to_the_peak():
    recipe = Recipe(epochs=4, lr=0.8, schedule="constant", warmup_epochs=0.5)
    assert rates(recipe, 8) == pytest.approx([0.2, 0.4, 0.6, 0.8] + [0.8] * 28)


def test_cosine_after_warmup_starts_at_the_peak_and_ends_near_zero():
    recipe = Recipe(epochs=10, lr=1.0, warmup_epochs=1)
    all_rates = rates(recipe, 100)
    assert max(all_rates) == 1.0
    assert all_rates[99] == all_rates[100] == 1.0
    assert 0 < all_rates[-1] < 1e-4


def test_warmup_may_take_the_whole_training():
    recipe = Recipe(epochs=1, lr=1.0, warmup_epochs=1)
    assert rates(recipe, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_step_leaves_the_latent_weights_of_a_binary_network_clipped():
    model = models.create_model(
        "lenet5", "binary(last=float)", num_classes=10, in_channels=1, image_size=28
    )
    optimizer = build_optimizer(model, Recipe(optimizer="sgd", lr=100.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, layer in models.quantized_layers(model):
        assert torch.equal(layer.weight, torch.full_like(layer.weight, -1.0)), name
    assert model.get_parameter("fc2.weight").max() < -90  # float layers are not clipped
