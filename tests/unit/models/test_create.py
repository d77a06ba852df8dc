from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import models
from models import ModelError, create_model, list_backbones, list_methods, quantized_layers
from models.methods import METHODS, Kind, Method, resolve_methods
from models.methods.ternary import Ternary
from models.registry import Registry
from models.ternary_quantizers import TernaryQuantizer


def lenet5(method: str = "float", seed: int = 0) -> nn.Module:
    return create_model("lenet5", method, num_classes=10, in_channels=1, image_size=28, seed=seed)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = lenet5(seed=3)
    torch.manual_seed(2)
    assert same_weights(first, lenet5(seed=3))
    assert same_weights(first, lenet5("ternary-x4", seed=3))
    assert not torch.equal(first.get_parameter("fc1.weight"), lenet5().get_parameter("fc1.weight"))


def test_any_whole_number_is_a_seed() -> None:
    assert same_weights(lenet5(seed=2**64 + 3), lenet5(seed=3))
    assert same_weights(lenet5(seed=-1), lenet5(seed=2**64 - 1))


def test_building_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    lenet5("ternary")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_can_be_built_without_memory_for_its_weights() -> None:
    with torch.device("meta"):
        model = lenet5("ternary")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_dashed_short_form_means_the_arguments() -> None:
    assert resolve_methods("ternary-x4") == resolve_methods("ternary(expansion=4)")
    assert resolve_methods("ternary-x2(first_last=float)") == [
        Ternary(expansion=2, first_last="float")
    ]


def test_thresholds_replace_the_factors_of_the_paper() -> None:
    model = lenet5("ternary(expansion=2, thresholds=(.3, .6))")
    quantizers = {layer.weight_quantizer for _, layer in quantized_layers(model)}
    assert quantizers == {TernaryQuantizer((0.3, 0.6))}


def test_first_and_last_layer_can_stay_float() -> None:
    model = lenet5("ternary(first_last=float)")
    assert [name for name, _ in quantized_layers(model)] == ["conv2", "fc1"]
    assert sum(layer.weight.numel() for _, layer in quantized_layers(model)) == 870_400


@pytest.mark.parametrize(
    ("backbone", "method", "reason"),
    [
        ("lenet", "float", "unknown backbone 'lenet' \\(did you mean 'lenet5'\\?\\)"),
        ("lenet5", "ternay", "unknown method 'ternay' \\(did you mean 'ternary'\\?\\)"),
        ("lenet5+lenet5", "float", "cannot read 'lenet5\\+lenet5'"),
        ("lenet5(width=0)", "float", "width must be at least 1, not 0"),
        ("lenet5(width=100000)", "float", "cannot be built: .*can't allocate memory"),
        (f"lenet5(width={10**30})", "float", "cannot be built: .*Overflow"),
        ("lenet5(num_classes=3)", "float", "num_classes follows from the data"),
        ("lenet5", "ternary-x3", "no short form 'x3'.*ternary-x2, ternary-x4"),
        ("lenet5", "ternary-x4(expansion=2)", "already sets expansion"),
        ("lenet5", "ternary+ternary", "ternary is named twice"),
        ("lenet5", "float+ternary", "float leaves the network as it is"),
        ("lenet5", "ternary(expansion=2, thresholds=.1)", "needs 2 thresholds, not 1"),
        ("lenet5", "ternary(expansion=2, thresholds=(.2, .1))", "rising"),
        ("lenet5", "ternary(thresholds=1)", "between 0 and 1"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_reason(
    backbone: str, method: str, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        create_model(backbone, method, num_classes=10, in_channels=1, image_size=28)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["num_classes", "in_channels", "image_size"])
def test_sizes_must_be_positive(size: str) -> None:
    sizes: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": 28} | {size: 0}
    with pytest.raises(ModelError, match=f"{size} must be at least 1, not 0"):
        create_model("lenet5", "float", **sizes)


@pytest.fixture
def two_more_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a mask and a second quantizer while a test runs."""

    @dataclass(frozen=True)
    class Mask(Method):
        kind: ClassVar[Kind] = Kind.MASK

        def apply(self, model: nn.Module) -> list[str]:
            assert quantized_layers(model) == []
            return ["conv1"]

    @dataclass(frozen=True)
    class Rounded(Mask):
        kind: ClassVar[Kind] = Kind.QUANTIZER

    list_methods()
    monkeypatch.setitem(METHODS._entries, "amask", Mask)
    monkeypatch.setitem(METHODS._entries, "rounded", Rounded)


@pytest.mark.usefixtures("two_more_methods")
def test_methods_are_applied_in_the_order_of_their_kinds_whatever_the_text_says() -> None:
    for text in ("amask+ternary", "ternary+amask"):
        kinds = [method.kind for method in resolve_methods(text)]
        assert kinds == [Kind.MASK, Kind.QUANTIZER]
        assert len(quantized_layers(lenet5(text))) == 4


@pytest.mark.usefixtures("two_more_methods")
def test_two_methods_of_one_kind_are_refused() -> None:
    with pytest.raises(ModelError, match="ternary and rounded are both of kind quantizer"):
        resolve_methods("ternary+amask+rounded")


def test_a_new_file_in_a_package_is_enough_to_offer_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_networks"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from models.registry import Registry\nNETWORKS = Registry('network', __name__)\n"
    )
    (package / "tiny.py").write_text(
        "from some_networks import NETWORKS\nNETWORKS.add('tiny', object())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    networks = __import__("some_networks").NETWORKS
    assert networks.names() == ["tiny"]


def test_registry_names_fit_into_experiment_names() -> None:
    registry: Registry[int] = Registry("thing", "models.backbones")
    registry.add("resnet50", 1)
    with pytest.raises(ValueError, match="two entries share"):
        registry.add("resnet50", 2)
    with pytest.raises(ValueError, match="not lower-case letters and digits"):
        registry.add("res_net", 3)


def test_every_public_name_resolves_and_a_wrong_one_does_not() -> None:
    for name in models.__all__:
        assert getattr(models, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = models.creat_model


def test_the_slice_offers_its_backbone_and_methods() -> None:
    assert "lenet5" in list_backbones()
    assert {"float", "ternary"} <= set(list_methods())


@pytest.mark.parametrize(("size", "value"), [("num_classes", 10.0), ("image_size", "28")])
def test_sizes_must_be_whole_numbers(size: str, value: object) -> None:
    sizes: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": 28, size: value}
    with pytest.raises(ModelError, match=f"{size} must be a whole number, not {value!r}"):
        create_model("lenet5", "float", **sizes)
