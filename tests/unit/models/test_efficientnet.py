from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights
from torchvision.ops import StochasticDepth

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters


@pytest.mark.parametrize(
    ("backbone", "num_classes", "image_size", "published"),
    [
        ("efficientnetb0", 1000, 224, EfficientNet_B0_Weights.DEFAULT.meta["num_params"]),
        ("efficientnetb0(original=true)", 10, 32, 3_599_686),
        ("efficientnetb0(original=true)", 100, 32, 3_628_576),
        ("efficientnetb0(original=true)", 200, 64, 3_660_676),
        ("efficientnetb0(form=cifar, original=true)", 16, 224, 3_601_612),
        ("efficientnetb0", 10, 32, 3_599_686 - 1_088),
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
        ("efficientnetb0", 1000, 224, 1000 * EfficientNet_B0_Weights.DEFAULT.meta["_ops"]),
        ("efficientnetb0", 10, 32, 30.33),
        ("efficientnetb0", 200, 64, 119.50),
        ("efficientnetb0(form=cifar)", 16, 224, 1_456.0),
    ],
)
def test_published_macs(
    backbone: str, num_classes: int, image_size: int, published_millions: float
) -> None:
    model = on_meta(backbone, num_classes=num_classes, image_size=image_size)
    digit = 0.5 if image_size == 224 else 0.05
    assert macs(model, image_size) / 1e6 == pytest.approx(published_millions, abs=digit)


def test_map_sizes_of_the_stages_at_32_pixels() -> None:
    shapes = output_shapes(on_meta("efficientnetb0"), 32)
    last_blocks = (0, 2, 4, 7, 10, 14, 15)
    assert [shapes[f"layers.{block}"][1] for block in last_blocks] == [32, 16, 8, 4, 4, 2, 2]


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
def test_every_block_closes_with_a_projection(form: str) -> None:
    layers = weight_layers(on_meta(f"efficientnetb0(form={form})"))
    parts = Counter(layer.part for layer in layers)
    assert parts["projection"] == 16
    assert {layer.shape for layer in layers if layer.part == "projection"} == {"pointwise"}
    assert layers[0].part == "stem"
    assert layers[-1].part == "head"


def test_torchvision_weights_load_strictly_and_give_its_logits() -> None:
    theirs = torchvision.models.efficientnet_b0(num_classes=5).eval()
    ours = create_model("efficientnetb0", num_classes=5, image_size=96).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_squeeze_and_excitation_scales_each_map_by_its_formula() -> None:
    model = create_model("efficientnetb0", num_classes=2, image_size=32)
    module = model.get_submodule("layers.1.se")
    weights = dict(module.named_parameters())
    x = torch.randn(2, 96, 4, 4)
    mean = x.mean((2, 3))
    hidden = mean @ weights["se1.weight"].flatten(1).T + weights["se1.bias"]
    hidden = hidden * torch.sigmoid(hidden)
    gate = torch.sigmoid(hidden @ weights["se2.weight"].flatten(1).T + weights["se2.bias"])
    assert hidden.shape == (2, 4)  # a quarter of the 16 channels that enter the block
    torch.testing.assert_close(module(x), x * gate[:, :, None, None])


def test_drop_connect_rises_linearly_over_the_blocks() -> None:
    model = on_meta("efficientnetb0")
    rates = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.2 * block / 16 for block in range(16)])


def test_drop_connect_drops_whole_images_in_training_and_none_in_evaluation() -> None:
    torch.manual_seed(0)
    model = create_model("efficientnetb0", num_classes=2, image_size=32).eval()
    block = model.get_submodule("layers.14")  # adds its input
    drop = block.get_submodule("drop_connect")
    assert isinstance(drop, StochasticDepth)
    drop.p = 0.5
    x = torch.randn(16, 192, 2, 2)
    with torch.no_grad():
        branch = block(x) - x
        drop.train()  # alone, so that the batch norms stay as they are
        output = block(x) - x
    kept = [not torch.equal(image, torch.zeros_like(image)) for image in output]
    assert 0 < sum(kept) < 16
    for index, survives in enumerate(kept):
        expected = 2 * branch[index] if survives else torch.zeros_like(branch[index])
        torch.testing.assert_close(output[index], expected, rtol=1e-4, atol=1e-4)


def test_the_original_owns_an_unused_layer_and_never_drops() -> None:
    model = create_model("efficientnetb0(original=true)", num_classes=2, image_size=32)
    model.get_submodule("dropout").eval()
    images = torch.randn(2, 3, 32, 32)
    logits: Tensor = model(images)
    logits.sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == [f"layers.0.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias")]
    assert sum(model.get_parameter(name).numel() for name in unused) == 1_088
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
@pytest.mark.parametrize(("in_channels", "num_classes", "image_size"), [(1, 7, 33), (4, 3, 8)])
def test_any_image_gives_one_logit_per_class(
    form: str, in_channels: int, num_classes: int, image_size: int
) -> None:
    model = create_model(
        f"efficientnetb0(form={form})",
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
    )
    assert isinstance(model, nn.Module)
    images = torch.randn(2, in_channels, image_size, image_size)
    assert model(images).shape == (2, num_classes)


def test_original_is_refused_in_the_imagenet_form() -> None:
    with pytest.raises(ModelError, match="original=true belongs to form=cifar"):
        on_meta("efficientnetb0(original=true)", image_size=224)
