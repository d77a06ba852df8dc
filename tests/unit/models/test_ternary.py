from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from models import ModelError, apply_method, create_model, fold, quantized_layers
from models.ternary_quantizers import (
    TernaryQuantizer,
    TernaryWeightNetworkQuantizer,
    TrainedTernaryQuantizer,
)


def lenet5(method: str, seed: int = 0) -> nn.Module:
    return create_model("lenet5", method, num_classes=10, in_channels=1, image_size=28, seed=seed)


@pytest.mark.parametrize(
    ("rule", "quantizer"),
    [
        ("he", TernaryQuantizer),
        ("twn", TernaryWeightNetworkQuantizer),
        ("ttq", TrainedTernaryQuantizer),
    ],
)
def test_the_rule_chooses_the_quantizer_of_every_layer(rule: str, quantizer: type) -> None:
    layers = quantized_layers(lenet5(f"ternary(rule={rule})"))
    assert [name for name, _ in layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert {type(layer.weight_quantizer) for _, layer in layers} == {quantizer}
    ends_float = quantized_layers(lenet5(f"ternary(rule={rule}, first_last=float)"))
    assert [name for name, _ in ends_float] == ["conv2", "fc1"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("rule=twn, expansion=2", "expansion has no effect with rule=twn"),
        ("rule=ttq, expansion=4", "expansion has no effect with rule=ttq"),
        ("rule=twn, thresholds=.1", "thresholds has no effect with rule=twn"),
        ("rule=ttq, original=true", "original has no effect with rule=ttq"),
        ("rule=tnn", "rule=tnn is not valid.*one of he, twn, ttq"),
    ],
)
def test_an_option_without_effect_is_refused(arguments: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        lenet5(f"ternary({arguments})")


def test_trained_scales_are_two_parameters_of_each_layer_and_its_own() -> None:
    model = lenet5("ternary(rule=ttq)")
    extra = set(model.state_dict()) - set(lenet5("float").state_dict())
    names = ("conv1", "conv2", "fc1", "fc2")
    scales = ("positive", "negative")
    assert extra == {f"{name}.weight_quantizer.{scale}" for name in names for scale in scales}
    assert len({id(parameter) for parameter in model.parameters()}) == len(
        list(lenet5("float").parameters())
    ) + len(extra)


def test_trained_scales_start_from_the_weight_of_a_float_checkpoint() -> None:
    model, checkpoint = lenet5("ternary(rule=ttq)"), lenet5("float", seed=1).state_dict()
    checkpoint["fc1.weight"] *= 3
    model.load_state_dict(checkpoint, strict=True)
    assert "fc1.weight_quantizer.positive" not in checkpoint
    weight = checkpoint["fc1.weight"]
    mean = weight[weight > 0.05 * weight.abs().max()].mean()
    torch.testing.assert_close(model.get_parameter("fc1.weight_quantizer.positive").data, mean)


def test_trained_scales_are_restored_from_a_checkpoint_that_has_them() -> None:
    model, other = lenet5("ternary(rule=ttq)"), lenet5("ternary(rule=ttq)", seed=1)
    with torch.no_grad():
        model.get_parameter("conv2.weight_quantizer.negative").fill_(7)
    other.load_state_dict(model.state_dict(), strict=True)
    assert other.get_parameter("conv2.weight_quantizer.negative") == 7
    incomplete = model.state_dict()
    del incomplete["conv2.weight_quantizer.negative"]
    with pytest.raises(RuntimeError, match="conv2\\.weight_quantizer\\.negative"):
        other.load_state_dict(incomplete, strict=True)


def test_a_float_checkpoint_gives_a_network_without_memory_its_scales() -> None:
    with torch.device("meta"):
        model = lenet5("ternary(rule=ttq)")
    model.load_state_dict(lenet5("float").state_dict(), strict=True, assign=True)
    expected = lenet5("ternary(rule=ttq)").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("rule", ["twn", "ttq"])
def test_copies_and_folded_networks_have_the_same_outputs(rule: str) -> None:
    model = lenet5(f"ternary(rule={rule})").eval()
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fold(model)):
            assert torch.equal(other(images), expected)
    assert quantized_layers(fold(model)) == []


def test_training_moves_the_trained_scales() -> None:
    model = apply_method(nn.Sequential(nn.Linear(6, 4, bias=False)), "ternary(rule=ttq)")
    scales = [
        model.get_parameter(f"0.weight_quantizer.{side}") for side in ("positive", "negative")
    ]
    before = [scale.item() for scale in scales]
    inputs, target = torch.randn(8, 6), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = (model(inputs) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(scale.item() != start for scale, start in zip(scales, before, strict=True))
