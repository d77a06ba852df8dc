from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from models import create_model
from models.backbones.resnet import ZeroPaddedShortcut
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters


@pytest.mark.parametrize(
    ("backbone", "num_classes", "image_size", "published"),
    [
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet34", 1000, 224, 21_797_672),
        ("resnet50", 1000, 224, 25_557_032),
        ("resnet101", 1000, 224, 44_549_160),
        ("resnet18", 10, 32, 11_173_962),
        ("resnet18", 200, 64, 11_271_432),
        ("resnet50", 10, 32, 23_520_842),
        ("resnet50", 100, 32, 23_705_252),
        ("resnet50", 200, 64, 23_910_152),
        ("resnet50(form=cifar)", 16, 224, 23_533_136),
        ("resnet50(form=cifar)", 1000, 224, 25_549_352),
        ("resnet20", 10, 32, 269_722),
        ("resnet20", 100, 32, 269_722 + 5_850),
        ("resnet32", 10, 32, 464_154),
        ("resnet44", 10, 32, 658_586),
        ("resnet56", 10, 32, 853_018),
    ],
)
def test_published_parameter_counts(
    backbone: str, num_classes: int, image_size: int, published: int
) -> None:
    model = on_meta(backbone, num_classes=num_classes, image_size=image_size)
    assert parameters(model) == published


@pytest.mark.parametrize(
    ("backbone", "image_size", "published"),
    [
        ("resnet18", 224, 1_814_073_344),
        ("resnet34", 224, 3_663_761_408),
        ("resnet50", 224, 4_089_184_256),
        ("resnet101", 224, 7_801_405_440),
    ],
)
def test_published_macs_at_a_thousand_classes(
    backbone: str, image_size: int, published: int
) -> None:
    model = on_meta(backbone, num_classes=1000, image_size=image_size)
    assert macs(model, image_size) == published


@pytest.mark.parametrize(
    ("backbone", "published"),
    [
        ("resnet20", 40_551_040),
        ("resnet32", 68_862_592),
        ("resnet44", 97_174_144),
        ("resnet56", 125_485_696),
    ],
)
def test_published_macs_of_the_cifar_networks(backbone: str, published: int) -> None:
    assert macs(on_meta(backbone), 32) == published


@pytest.mark.parametrize(
    ("backbone", "num_classes", "image_size", "published_millions"),
    [
        ("resnet50", 10, 32, 1_297.83),
        ("resnet50", 200, 64, 5_191.65),
        ("resnet50(form=cifar)", 16, 224, 63_592.7),
        ("resnet18", 10, 32, 555.4),
        ("resnet18", 200, 64, 2_221.8),
    ],
)
def test_published_macs_with_the_small_stem(
    backbone: str, num_classes: int, image_size: int, published_millions: float
) -> None:
    model = on_meta(backbone, num_classes=num_classes, image_size=image_size)
    assert macs(model, image_size) / 1e6 == pytest.approx(published_millions, abs=0.05)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_the_imagenet_form_is_torchvisions_network(depth: int) -> None:
    with torch.device("meta"):
        reference = torchvision.models.get_model(f"resnet{depth}", num_classes=7)
    ours = on_meta(f"resnet{depth}", num_classes=7, image_size=224)
    assert type(ours) is type(reference)
    assert repr(ours) == repr(reference)
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes


def test_a_torchvision_checkpoint_loads_strictly_and_gives_the_same_logits() -> None:
    reference = torchvision.models.resnet18(num_classes=7).eval()
    ours = create_model("resnet18(form=imagenet)", num_classes=7, image_size=40).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(ours(images), reference(images))


def test_the_imagenet_form_starts_from_torchvisions_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        reference = torchvision.models.resnet18(num_classes=7).state_dict()
    ours = create_model("resnet18", num_classes=7, image_size=224, seed=3).state_dict()
    for key, value in reference.items():
        assert torch.equal(ours[key], value), key


def test_images_up_to_64_pixels_get_the_small_stem() -> None:
    for image_size, kernel, stride in ((32, 3, 1), (64, 3, 1), (65, 7, 2), (224, 7, 2)):
        stem = on_meta("resnet18", image_size=image_size).get_submodule("conv1")
        assert isinstance(stem, nn.Conv2d)
        assert (stem.kernel_size, stem.stride) == ((kernel, kernel), (stride, stride))


def test_the_small_stem_keeps_the_size_of_the_image_for_the_first_stage() -> None:
    shapes = output_shapes(on_meta("resnet50"), 32)
    stages = [shapes[f"layer{stage}"] for stage in (1, 2, 3, 4)]
    assert stages == [[256, 32, 32], [512, 16, 16], [1024, 8, 8], [2048, 4, 4]]


def test_the_cifar_form_starts_from_pytorchs_default_weights() -> None:
    model = create_model("resnet18", num_classes=10, image_size=32)
    for name, fan_in in (("conv1", 27), ("layer2.0.downsample.0", 64), ("layer3.1.conv2", 2304)):
        weight = model.get_parameter(f"{name}.weight")
        bound = 1 / math.sqrt(fan_in)
        assert bound * 0.98 < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_the_cifar_networks_start_he_normal() -> None:
    model = create_model("resnet56", num_classes=100, image_size=32)
    weight = model.get_parameter("layer2.0.conv1.weight")  # (32, 16, 3, 3): fan out, not fan in
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)
    assert model.get_parameter("fc.weight").std().item() == pytest.approx(
        math.sqrt(2 / 64), rel=0.05
    )
    assert model.get_parameter("fc.bias").count_nonzero() == 0


def test_a_stem_for_other_channels_starts_as_torchvisions() -> None:
    model = create_model("resnet18", num_classes=10, in_channels=9, image_size=224)
    weight = model.get_parameter("conv1.weight")
    assert weight.shape == (64, 9, 7, 7)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.03)


@pytest.mark.parametrize("size", [1, 6, 7])
def test_the_weightless_shortcut_takes_every_second_pixel_and_appends_zeros(size: int) -> None:
    maps = torch.randn(2, 3, size, size)
    result = ZeroPaddedShortcut(5)(maps)
    half = functional.avg_pool2d(maps, 1, stride=2)
    assert torch.equal(result, torch.cat([half, half.new_zeros(2, 5, *half.shape[2:])], dim=1))
    assert ZeroPaddedShortcut(1)(torch.full((1, 1, 2, 2), math.inf)).tolist() == [
        [[[math.inf]], [[0.0]]]
    ]


def test_resnet20_is_the_network_of_the_paper() -> None:
    model = create_model("resnet20", num_classes=10, image_size=32).eval()
    tensors = dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if "bn" in name and value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)

    def convolve(x: torch.Tensor, name: str, norm: str, stride: int = 1) -> torch.Tensor:
        x = functional.conv2d(x, tensors[f"{name}.weight"], stride=stride, padding=1)
        keys = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(tensors[f"{norm}.{key}"] for key in keys))

    images = torch.randn(2, 3, 32, 32, generator=generator)
    x = convolve(images, "conv1", "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(3):
            stride = 2 if stage > 1 and block == 0 else 1
            prefix = f"layer{stage}.{block}"
            inner = convolve(x, f"{prefix}.conv1", f"{prefix}.bn1", stride).clamp(min=0)
            inner = convolve(inner, f"{prefix}.conv2", f"{prefix}.bn2")
            inner[:, : x.shape[1]] += x[:, :, ::stride, ::stride]
            x = inner.clamp(min=0)
    expected = x.mean((2, 3)) @ tensors["fc.weight"].T + tensors["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_layers_know_their_part() -> None:
    parts = Counter(layer.part for layer in weight_layers(on_meta("resnet50")))
    assert parts == {"stem": 1, "head": 1, "shortcut": 4, "bottleneck": 16, "body": 32}
    parts = Counter(layer.part for layer in weight_layers(on_meta("resnet34", image_size=224)))
    assert parts == {"stem": 1, "head": 1, "shortcut": 3, "body": 32}
    parts = Counter(layer.part for layer in weight_layers(on_meta("resnet20")))
    assert parts == {"stem": 1, "head": 1, "body": 18}


@pytest.mark.parametrize("backbone", ["resnet18", "resnet18(form=imagenet)", "resnet20"])
@pytest.mark.parametrize("image_size", [1, 9, 32, 33, 224])
def test_any_image_gives_one_logit_per_class(backbone: str, image_size: int) -> None:
    model = on_meta(backbone, num_classes=7, in_channels=1, image_size=image_size)
    logits = model(torch.empty(2, 1, image_size, image_size, device="meta"))
    assert logits.shape == (2, 7)
