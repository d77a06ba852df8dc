from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters


def test_the_count_is_that_of_imgclsmob_but_for_its_three_deviations() -> None:
    # It counts 5,180,840 with 3x3 instead of 5x5 depthwise shortcuts (of 24 and 112 channels), a
    # batch norm of 1280 channels instead of a bias, and squeezed widths 18 and 30, not rounded up
    # to 20 and 32.
    shortcuts = (25 - 9) * (24 + 112)
    head = 2 * 1280 - 1280
    squeezed = 2 * (2 * 72 + 1) + 2 * (2 * 120 + 1)
    model = on_meta("ghostnet", num_classes=1000, image_size=224)
    assert parameters(model) == 5_180_840 + shortcuts - head + squeezed == 5_182_508


@pytest.mark.parametrize(
    ("backbone", "parameters_millions", "macs_millions"),
    [("ghostnet(width=0.5)", 2.6, 42), ("ghostnet", 5.2, 141), ("ghostnet(width=1.3)", 7.3, 226)],
)
def test_the_sizes_are_those_of_the_paper_within_a_percent(
    backbone: str, parameters_millions: float, macs_millions: int
) -> None:
    model = on_meta(backbone, num_classes=1000, image_size=224)
    assert parameters(model) / 1e6 == pytest.approx(parameters_millions, rel=0.01)
    assert macs(model, 224) / 1e6 == pytest.approx(macs_millions, rel=0.01)


def test_the_state_dict_has_the_keys_of_the_authors_code() -> None:
    keys = set(on_meta("ghostnet", image_size=224).state_dict())
    assert {
        "conv_stem.weight",
        "bn1.running_mean",
        "blocks.0.0.ghost1.primary_conv.0.weight",
        "blocks.1.0.ghost2.cheap_operation.1.bias",
        "blocks.3.0.conv_dw.weight",
        "blocks.3.0.bn_dw.weight",
        "blocks.3.0.se.conv_reduce.bias",
        "blocks.8.3.se.conv_expand.weight",
        "blocks.7.0.shortcut.3.running_var",
        "blocks.9.0.conv.weight",
        "blocks.9.0.bn1.weight",
        "conv_head.bias",
        "classifier.weight",
    } < keys
    assert {key.split(".")[0] for key in keys} == {
        "conv_stem",
        "bn1",
        "blocks",
        "conv_head",
        "classifier",
    }


@pytest.mark.parametrize(
    ("image_size", "sides"), [(224, [112, 56, 28, 14, 7]), (32, [32, 16, 8, 4, 2])]
)
def test_map_sizes(image_size: int, sides: list[int]) -> None:
    shapes = output_shapes(on_meta("ghostnet", image_size=image_size), image_size)
    assert [shapes[f"blocks.{stage}"][1] for stage in (0, 2, 4, 6, 9)] == sides


def test_parts_of_the_ghost_bottlenecks() -> None:
    layers = weight_layers(on_meta("ghostnet"))
    parts = Counter((layer.part, layer.shape) for layer in layers)
    assert parts["projection", "pointwise"] == 16
    assert parts["shortcut", "depthwise"] == parts["shortcut", "pointwise"] == 5
    assert parts["body", "spatial"] == 0
    assert layers[0].part == "stem"
    assert layers[-1].part == "head"


def test_a_ghost_module_derives_its_second_half_from_the_first() -> None:
    model = create_model("ghostnet", num_classes=2, image_size=32).eval()
    module = model.get_submodule("blocks.1.0.ghost1")
    weights = dict(module.named_parameters())
    x = torch.randn(2, 16, 5, 5)
    scale = (1 + 1e-5) ** -0.5  # batch norm at its start
    primary = functional.conv2d(x, weights["primary_conv.0.weight"]).mul(scale).relu()
    cheap = functional.conv2d(primary, weights["cheap_operation.0.weight"], padding=1, groups=24)
    with torch.no_grad():
        expected = torch.cat([primary, cheap.mul(scale).relu()], dim=1)
        torch.testing.assert_close(module(x), expected)


def test_squeeze_and_excitation_scales_each_map_by_its_formula() -> None:
    model = create_model("ghostnet", num_classes=2, image_size=32)
    module = model.get_submodule("blocks.3.0.se")
    weights = dict(module.named_parameters())
    x = 9 * torch.randn(2, 72, 3, 3)
    hidden = x.mean((2, 3)) @ weights["conv_reduce.weight"].flatten(1).T
    hidden = (hidden + weights["conv_reduce.bias"]).clamp(min=0)
    gate = hidden @ weights["conv_expand.weight"].flatten(1).T + weights["conv_expand.bias"]
    gate = (gate + 3).clamp(0, 6) / 6
    assert hidden.shape == (2, 20)
    torch.testing.assert_close(module(x), x * gate[:, :, None, None])


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
@pytest.mark.parametrize(("in_channels", "num_classes", "image_size"), [(1, 7, 33), (4, 3, 8)])
def test_any_image_gives_one_logit_per_class(
    form: str, in_channels: int, num_classes: int, image_size: int
) -> None:
    model = create_model(
        f"ghostnet(form={form}, width=0.3)",
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
    )
    images = torch.randn(2, in_channels, image_size, image_size)
    assert model(images).shape == (2, num_classes)


def test_a_width_of_zero_is_refused() -> None:
    with pytest.raises(ModelError, match=r"width must be at least 0\.1"):
        on_meta("ghostnet(width=0)")
