from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import MobileNet_V2_Weights

from models import ModelError, create_model
from models.backbones.mobilenetv2 import round_channels
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters


@pytest.mark.parametrize(
    ("backbone", "num_classes", "image_size", "published"),
    [
        ("mobilenetv2", 1000, 224, MobileNet_V2_Weights.DEFAULT.meta["num_params"]),
        ("mobilenetv2", 10, 32, 2_296_922),
        ("mobilenetv2", 100, 32, 2_412_212),
        ("mobilenetv2", 200, 64, 2_540_312),
        ("mobilenetv2(form=cifar)", 16, 224, 2_304_608),
        ("mobilenetv2(form=cifar)", 1000, 224, 3_565_112),
        ("mobilenetv2(head=flattened)", 200, 64, 3_308_312),
        ("mobilenetv2(form=cifar100)", 100, 32, 2_369_380),
        ("mobilenetv2(form=cifar100)", 10, 32, 2_254_090),
    ],
)
def test_published_parameter_counts(
    backbone: str, num_classes: int, image_size: int, published: int
) -> None:
    model = on_meta(backbone, num_classes=num_classes, image_size=image_size)
    assert parameters(model) == published


@pytest.mark.parametrize(
    ("backbone", "num_classes", "image_size", "published_millions"),
    [
        ("mobilenetv2", 1000, 224, 1000 * MobileNet_V2_Weights.DEFAULT.meta["_ops"]),
        ("mobilenetv2", 10, 32, 91.15),
        ("mobilenetv2", 200, 64, 364.82),
        ("mobilenetv2(form=cifar)", 16, 224, 4_466.0),
        ("mobilenetv2(head=flattened)", 200, 64, 365.6),
        ("mobilenetv2(form=cifar100)", 10, 32, 64.8),
    ],
)
def test_published_macs(
    backbone: str, num_classes: int, image_size: int, published_millions: float
) -> None:
    model = on_meta(backbone, num_classes=num_classes, image_size=image_size)
    digit = 0.5 if image_size == 224 else 0.05
    assert macs(model, image_size) / 1e6 == pytest.approx(published_millions, abs=digit)


def test_the_cifar_form_has_the_convolution_weights_of_the_psconv_baseline() -> None:
    weights: Counter[str] = Counter()
    layers = [layer for layer in weight_layers(on_meta("mobilenetv2")) if layer.shape != "linear"]
    for layer in layers:
        weights[layer.shape] += layer.module.weight.numel()
    assert len(layers) == 57
    assert weights == {"depthwise": 64_224, "pointwise": 2_183_936, "spatial": 864}


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("mobilenetv2(form=imagenet)", {"projection": 17, "body": 34}),
        ("mobilenetv2(form=cifar)", {"projection": 17, "shortcut": 4, "body": 35}),
        ("mobilenetv2(form=cifar100)", {"projection": 17, "body": 35}),
    ],
)
def test_every_block_closes_with_a_projection(backbone: str, parts: dict[str, int]) -> None:
    layers = weight_layers(on_meta(backbone))
    assert Counter(layer.part for layer in layers) == {"stem": 1, "head": 1, **parts}
    assert {layer.shape for layer in layers if layer.part == "projection"} == {"pointwise"}
    assert layers[0].part == "stem"
    assert layers[-1].part == "head"


@pytest.mark.parametrize(
    ("backbone", "sides"),
    [
        ("mobilenetv2(form=cifar)", [32, 32, 16, 8, 8, 4, 4]),
        ("mobilenetv2(form=cifar100)", [34, 17, 9, 5, 5, 5, 5]),
    ],
)
def test_map_sizes_of_the_stages_at_32_pixels(backbone: str, sides: list[int]) -> None:
    shapes = output_shapes(on_meta(backbone), 32)
    last_blocks = (0, 2, 5, 9, 12, 15, 16)
    assert [shapes[f"layers.{block}"][1] for block in last_blocks] == sides


def test_torchvision_weights_load_strictly_and_give_its_logits() -> None:
    theirs = torchvision.models.mobilenet_v2(num_classes=5).eval()
    ours = create_model("mobilenetv2", num_classes=5, image_size=96).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_the_widths_of_the_imagenet_form_have_torchvision_counts() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.mobilenet_v2(width_mult=1.4)
    assert parameters(on_meta("mobilenetv2(width=1.4)", num_classes=1000, image_size=224)) == (
        parameters(theirs)
    )


def test_width_scales_the_small_forms() -> None:
    model = on_meta("mobilenetv2(width=0.5)")
    assert model.get_submodule("conv1").out_channels == 16
    assert model.get_submodule("layers.16.conv3").out_channels == 160
    assert model.get_submodule("linear").in_features == 1280


@pytest.mark.parametrize("channels", [0.5, 3, 8, 12, 17.5, 33, 44.8, 100, 1792])
@pytest.mark.parametrize("divisor", [4, 8])
def test_rounded_channels_are_the_nearest_multiple_above_nine_tenths(
    channels: float, divisor: int
) -> None:
    multiples = range(divisor, 4000, divisor)
    allowed = [multiple for multiple in multiples if multiple >= 0.9 * channels]
    assert round_channels(channels, divisor) == min(allowed, key=lambda m: (abs(m - channels), -m))


def test_a_block_adds_its_input_only_at_stride_one() -> None:
    # Zero gains of the last batch norms leave nothing but the shortcuts.
    model = create_model("mobilenetv2", num_classes=3, image_size=32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.zeros_(parameter)
    blocks = model.get_submodule("layers")
    assert isinstance(blocks, nn.Sequential)
    with torch.no_grad():
        same = torch.randn(1, 24, 8, 8)
        assert torch.equal(blocks[2](same), same)
        wider = torch.randn(1, 16, 8, 8)
        assert torch.equal(blocks[1](wider), blocks[1].get_submodule("shortcut")(wider))
        assert blocks[3](same).count_nonzero() == 0


def test_the_heads_agree_where_there_is_one_window() -> None:
    pooled = create_model("mobilenetv2", num_classes=4, image_size=32).eval()
    flattened = create_model("mobilenetv2(head=flattened)", num_classes=4, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(flattened(images), pooled(images))


@pytest.mark.parametrize("form", ["imagenet", "cifar", "cifar100"])
@pytest.mark.parametrize(("in_channels", "num_classes", "image_size"), [(1, 7, 33), (4, 3, 8)])
def test_any_image_gives_one_logit_per_class(
    form: str, in_channels: int, num_classes: int, image_size: int
) -> None:
    model = create_model(
        f"mobilenetv2(form={form}, width=0.25)",
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
    )
    images = torch.randn(2, in_channels, image_size, image_size)
    assert model(images).shape == (2, num_classes)


@pytest.mark.parametrize(
    ("backbone", "image_size", "message"),
    [
        ("mobilenetv2(width=0)", 32, "width must be at least 0.1"),
        ("mobilenetv2(head=flattened)", 24, "at least 25 pixels, not 24"),
        ("mobilenetv2(head=flattened)", 224, "not to form=imagenet"),
        ("mobilenetv2(form=cifar100, head=flattened)", 32, "not to form=cifar100"),
    ],
)
def test_what_cannot_be_built_is_refused(backbone: str, image_size: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        on_meta(backbone, image_size=image_size)
