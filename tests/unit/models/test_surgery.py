from __future__ import annotations

import copy
from collections import Counter, OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from models import ModelError, apply_method, create_model, fold, quantized_layers
from models.surgery import Part, constant_buffers, replace_layers, weight_layers

RESNET_ROLES: dict[str, Part] = {
    "conv1": "stem",
    "fc": "head",
    "layer*.downsample.0": "shortcut",
}


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    """Torchvision's network in eval mode with random weights."""
    model: nn.Module = torchvision.models.resnet18(num_classes=5)
    return model.eval()


def quantized_weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for _, layer in quantized_layers(model))


@pytest.mark.parametrize(
    ("depth", "layers_float_ends", "weights_float_ends", "layers_all", "weights_all"),
    [
        (18, 19, 11_157_504, 21, 11_678_912),
        (34, 35, 21_258_240, 37, 21_779_648),
        (50, 52, 23_445_504, 54, 25_502_912),
        (101, 103, 42_385_408, 105, 44_442_816),
    ],
)
def test_surgery_on_torchvision_resnets_touches_the_published_layers(
    depth: int,
    layers_float_ends: int,
    weights_float_ends: int,
    layers_all: int,
    weights_all: int,
) -> None:
    with torch.device("meta"):
        all_ternary = torchvision.models.get_model(f"resnet{depth}")
        float_ends = torchvision.models.get_model(f"resnet{depth}")
    keys = list(all_ternary.state_dict())
    apply_method(all_ternary, "ternary", roles=RESNET_ROLES)
    apply_method(float_ends, "ternary(first_last=float)", roles=RESNET_ROLES)
    assert len(quantized_layers(all_ternary)) == layers_all
    assert quantized_weights(all_ternary) == weights_all
    assert len(quantized_layers(float_ends)) == layers_float_ends
    assert quantized_weights(float_ends) == weights_float_ends
    assert list(all_ternary.state_dict()) == keys
    assert type(float_ends.conv1) is nn.Conv2d
    assert type(float_ends.fc) is nn.Linear


@pytest.mark.parametrize("method", ["ternary", "ternary-x4", "ternary(first_last=float)"])
def test_torchvision_weights_load_strictly_and_fold_keeps_the_outputs(
    method: str, resnet18: nn.Module
) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=5)
    apply_method(model, method, roles=RESNET_ROLES)
    model.load_state_dict(copy.deepcopy(resnet18.state_dict()), strict=True, assign=True)
    # At 32 pixels the last maps have one: the layers leave out taps, the folded ones do not.
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fold(model.eval())(images), model(images), rtol=1e-4, atol=1e-4)
        assert not torch.equal(resnet18(images), model(images))


def test_layers_know_their_part_and_shape() -> None:
    with torch.device("meta"):
        resnet = torchvision.models.resnet50()
        mobilenet = torchvision.models.mobilenet_v2()
    apply_method(resnet, "float", roles=RESNET_ROLES)
    parts = Counter(layer.part for layer in weight_layers(resnet))
    assert parts == {"stem": 1, "head": 1, "shortcut": 4, "body": 48}
    shapes = Counter(layer.shape for layer in weight_layers(resnet))
    assert shapes == {"spatial": 17, "pointwise": 36, "linear": 1}
    shapes = Counter(layer.shape for layer in weight_layers(mobilenet))
    assert shapes == {"spatial": 1, "depthwise": 17, "pointwise": 34, "linear": 1}


def test_a_layer_used_twice_is_replaced_by_one_layer_in_both_places() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared))
    apply_method(model, "ternary")
    inner = model.get_submodule("1.1")
    assert model[0] is inner
    assert len(quantized_layers(model)) == 1
    folded = fold(model)
    assert folded.get_submodule("0") is folded.get_submodule("1.1")


def test_fold_leaves_the_model_as_it_was() -> None:
    model = apply_method(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "ternary-x2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    assert quantized_layers(folded) == []
    assert len(quantized_layers(model)) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_fold_of_a_bare_quantized_layer_is_a_plain_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    apply_method(model, "ternary")
    assert type(fold(model[0])) is nn.Linear


def test_replace_layers_reports_what_it_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    layers = [layer for layer in weight_layers(model) if layer.name == "2"]
    assert replace_layers(model, layers, lambda layer: nn.Identity()) == ["2"]
    assert isinstance(model[2], nn.Identity)
    assert isinstance(model[0], nn.Linear)


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert weight_layers(attention) == []


@pytest.mark.parametrize(
    ("model", "method", "roles", "reason"),
    [
        (
            nn.Sequential(nn.ReLU()),
            "ternary",
            None,
            "ternary finds no layer of Sequential to change",
        ),
        (nn.Linear(2, 2), "ternary", None, "ternary finds no layer of Linear to change"),
        (
            nn.Sequential(nn.Linear(2, 2)),
            "ternary(first_last=float)",
            None,
            "needs to know the head and stem of Sequential",
        ),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "ternary(first_last=float)",
            {"0": "stem", "1": "head"},
            "finds no layer",
        ),
        (
            nn.Sequential(OrderedDict(entry=nn.Linear(2, 2))),
            "ternary",
            {"enty": "stem"},
            "declares 'enty' as stem, but has no such layer \\(did you mean 'entry'",
        ),
        (nn.Sequential(nn.Linear(2, 2)), "ternary", {"0": "front"}, "role 'front' of '0'"),
    ],
)
def test_a_method_that_cannot_apply_says_why(
    model: nn.Module, method: str, roles: dict[str, Part] | None, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        apply_method(model, method, roles=roles)


def test_a_network_is_not_quantized_twice() -> None:
    model = apply_method(nn.Sequential(nn.Linear(2, 2)), "ternary")
    with pytest.raises(ModelError, match="already has quantized layers"):
        apply_method(model, "ternary")


def test_masks_are_constant_buffers_and_running_statistics_are_not() -> None:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    model = apply_method(nn.Sequential(*layers), "sparse")
    assert constant_buffers(model) == ["2.mask.period"]
    assert model._ddp_params_and_buffers_to_ignore == ["2.mask.period"]


def test_a_refused_composition_leaves_the_network_as_it_was() -> None:
    network = create_model("vgg11", num_classes=10, image_size=32)
    before = str(network)
    wrong: dict[str, Part] = {"conv": "stem"}
    for method, roles in (("step+sparse", None), ("ternary", wrong)):
        with pytest.raises(ModelError):
            apply_method(network, method, roles=roles)
        assert str(network) == before
    apply_method(network, "ternary")
