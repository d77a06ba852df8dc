from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from pipeline.config import Recipe
from pipeline.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    peak_rate,
    plateau_factor,
)


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


def test_norms_and_biases_decay_where_the_recipe_says_so():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for setting, decay in ((None, 0.1), (0.3, 0.3)):
        groups = parameter_groups(model, Recipe(weight_decay=0.1, norm_weight_decay=setting))
        assert [group["weight_decay"] for group in groups] == [0.1, decay]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_the_optimizer_is_torch_s_own(name):
    optimizer = build_optimizer(nn.Linear(2, 2), Recipe(optimizer=name, lr=0.25, momentum=0.5))
    assert type(optimizer).__name__.lower() == name
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_sgd_moves_as_its_textbook_form():
    """v <- m v + g + d w, w <- w - lr (g + d w + m v): Nesterov's form in torch."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(layer, Recipe(lr=0.1, momentum=0.9, weight_decay=0.01))
    weight, velocity = layer.weight.detach().clone(), torch.zeros(2, 3)
    for _ in range(4):
        gradient = torch.randn(2, 3)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        decayed = gradient + 0.01 * weight
        velocity = 0.9 * velocity + decayed
        weight = weight - 0.1 * (decayed + 0.9 * velocity)
        assert torch.allclose(layer.weight, weight, atol=1e-6)


def test_lamb_moves_as_the_algorithm_of_its_paper():
    """You et al. 2020 (arXiv 1904.00962), algorithm 2 in version 3: without bias correction."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(layer, Recipe(optimizer="lamb", lr=0.01, weight_decay=0.1))
    weight = layer.weight.detach().clone()
    mean, square = torch.zeros(2, 3), torch.zeros(2, 3)
    for _ in range(4):
        gradient = torch.randn(2, 3)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        update = mean / (square.sqrt() + 1e-6) + 0.1 * weight
        weight = weight - 0.01 * weight.norm() / update.norm() * update
        assert torch.allclose(layer.weight, weight, atol=1e-6)


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


def test_the_factors_of_the_milestones_compound():
    """He et al. 2018, CIFAR-10: 0.1, 0.01, 0.001, 0.0005."""
    recipe = Recipe(
        epochs=200, lr=0.1, schedule="multistep", milestones=(80, 120, 160), gamma=(0.1, 0.1, 0.5)
    )
    expected = [0.1] * 80 + [0.01] * 40 + [0.001] * 40 + [0.0005] * 40
    assert rates(recipe, 3)[1::3] == pytest.approx(expected)


def test_a_schedule_by_epochs_holds_still_within_an_epoch():
    """Kyrkou 2024: cosine annealing that steps once per epoch."""
    recipe = Recipe(epochs=8, lr=0.1, schedule="cosine", schedule_unit="epoch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    per_epoch = [rates(recipe, 5)[5 * epoch : 5 * epoch + 5] for epoch in range(8)]
    for epoch_rates in per_epoch:
        assert epoch_rates == pytest.approx([optimizer.param_groups[0]["lr"]] * 5, rel=1e-9)
        optimizer.step()
        schedule.step()


def test_the_peak_grows_with_the_batch_where_the_recipe_names_its_own():
    assert peak_rate(Recipe(lr=0.1, batch_size=1024)) == 0.1
    scaled = Recipe(lr=0.1, batch_size=1024, lr_batch_size=256, schedule="constant")
    assert peak_rate(scaled) == pytest.approx(0.4)
    assert rates(scaled, 2)[-1] == pytest.approx(0.4)


def test_a_plateau_lowers_the_rate_after_so_many_epochs_without_a_lower_loss():
    recipe = Recipe(epochs=20, schedule="plateau", validation=5, patience=1, gamma=0.5)
    losses = [1.0, 0.9, 0.95, 0.94, 0.8, 0.81, 0.82, 0.83, 0.84, 0.7]
    factors = [plateau_factor(recipe, losses[:epoch]) for epoch in range(len(losses) + 1)]
    # The second epoch in a row that is no better than the best lowers it, and the count restarts.
    assert factors == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert plateau_factor(Recipe(), losses) == 1


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
