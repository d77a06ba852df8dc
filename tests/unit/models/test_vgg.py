from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters


@pytest.mark.parametrize(
    ("backbone", "num_classes", "image_size", "published"),
    [
        ("vgg11", 10, 32, 9_231_114),
        ("vgg13", 10, 32, 9_416_010),
        ("vgg16", 10, 32, 14_728_266),
        ("vgg19", 10, 32, 20_040_522),
        ("vgg16", 100, 32, 14_774_436),
        ("vgg16", 200, 64, 14_825_736),
        ("vgg16(head=flattened)", 200, 64, 15_132_936),
        ("vgg16(form=cifar)", 16, 224, 14_731_344),
        ("vgg16(form=cifar)", 1000, 224, 15_236_136),
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
        ("vgg16", 10, 32, 313.20),
        ("vgg16", 200, 64, 1_252.89),
        ("vgg16(head=flattened)", 200, 64, 1_253.2),
        ("vgg16(form=cifar)", 16, 224, 15_346.6),
    ],
)
def test_published_macs(
    backbone: str, num_classes: int, image_size: int, published_millions: float
) -> None:
    model = on_meta(backbone, num_classes=num_classes, image_size=image_size)
    assert macs(model, image_size) / 1e6 == pytest.approx(published_millions, abs=0.05)


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
@pytest.mark.parametrize(("option", "suffix"), [("", "_bn"), ("(batch_norm=false)", "")])
def test_the_imagenet_form_is_torchvisions_network(depth: int, option: str, suffix: str) -> None:
    with torch.device("meta"):
        reference = torchvision.models.get_model(f"vgg{depth}{suffix}", num_classes=7).eval()
    ours = on_meta(f"vgg{depth}{option}", num_classes=7, image_size=224)
    assert type(ours) is type(reference)
    assert repr(ours) == repr(reference)
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


def test_the_small_form_is_convolution_norm_relu_and_one_linear_layer() -> None:
    model = create_model("vgg11", num_classes=10, image_size=64).eval()
    tensors = dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for value in tensors.values():
        if value.is_floating_point() and value.ndim == 1:
            value.uniform_(0.5, 1.5, generator=generator)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    x, index = images, 0
    for pool in (True, True, False, True, False, True, False, True):
        weight, bias = (tensors[f"features.{index}.{key}"] for key in ("weight", "bias"))
        x = functional.conv2d(x, weight, bias, padding=1)
        keys = ("running_mean", "running_var", "weight", "bias")
        x = functional.batch_norm(x, *(tensors[f"features.{index + 1}.{key}"] for key in keys))
        x = x.clamp(min=0)
        x = functional.max_pool2d(x, 2) if pool else x
        index += 4 if pool else 3
    expected = x.mean((2, 3)) @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_maps_and_state_dict_are_those_of_the_papers() -> None:
    model = on_meta("vgg16")
    assert len(model.state_dict()) == 93
    convolutions = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    assert [layer.name for layer in weight_layers(model)] == [
        *(f"features.{index}" for index in convolutions),
        "classifier",
    ]
    shapes = output_shapes(model, 32)
    maps = [shapes[f"features.{index}"][1] for index in convolutions]
    assert maps == [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    assert shapes["features"] == [512, 1, 1]


def test_layers_know_their_part() -> None:
    for image_size, head in ((32, "classifier"), (224, "classifier.6")):
        layers = weight_layers(on_meta("vgg13", image_size=image_size))
        parts = {layer.name: layer.part for layer in layers if layer.part != "body"}
        assert parts == {"features.0": "stem", head: "head"}


def test_a_flattened_head_reads_every_value_of_the_last_maps() -> None:
    model = create_model("vgg11(head=flattened)", num_classes=5, image_size=64)
    classifier = model.get_submodule("classifier")
    assert isinstance(classifier, nn.Linear)
    assert classifier.in_features == 2048
    images = torch.randn(2, 3, 64, 64)
    features = model.get_submodule("features")
    with torch.no_grad():
        expected = classifier(features.eval()(images).reshape(2, 2048))
        assert torch.equal(model.eval()(images), expected)


def test_xavier_weights_are_those_of_the_sparse_papers_code() -> None:
    model = create_model("vgg16(init=xavier)", num_classes=10, image_size=32)
    weight = model.get_parameter("features.3.weight")
    bound = 0.0360844  # 0.5 sqrt(6 / (9 * 64 + 9 * 64))
    assert bound * 0.999 < weight.abs().max().item() <= bound * 1.00001
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert model.get_parameter("features.3.bias").count_nonzero() == 0
    assert torch.equal(model.get_parameter("features.4.weight"), torch.full((64,), 0.5))
    assert model.get_parameter("classifier.weight").std().item() == pytest.approx(0.01, rel=0.05)
    assert model.get_parameter("classifier.bias").count_nonzero() == 0


def test_other_weights_start_as_pytorchs_default() -> None:
    weight = create_model("vgg11", num_classes=10, image_size=32).get_parameter("features.4.weight")
    bound = 1 / math.sqrt(9 * 64)
    assert bound * 0.999 < weight.abs().max().item() <= bound


@pytest.mark.parametrize(
    "backbone",
    ["vgg11", "vgg19(batch_norm=false)", "vgg13(form=cifar, head=flattened)"],
)
@pytest.mark.parametrize("image_size", [32, 63, 64, 224])
def test_any_image_from_32_pixels_gives_one_logit_per_class(backbone: str, image_size: int) -> None:
    model = on_meta(backbone, num_classes=7, in_channels=1, image_size=image_size)
    logits = model(torch.empty(2, 1, image_size, image_size, device="meta"))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("backbone", "image_size", "reason"),
    [
        ("vgg16", 31, "at least 32 pixels, not 31"),
        ("vgg16(init=xavier)", 224, "init=xavier is for form=cifar, and this is form=imagenet"),
        ("vgg16(head=flattened, form=imagenet)", 32, "head=flattened is for form=cifar"),
    ],
)
def test_what_has_no_meaning_is_refused(backbone: str, image_size: int, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        on_meta(backbone, image_size=image_size)
