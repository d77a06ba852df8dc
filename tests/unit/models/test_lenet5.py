from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import ModelError, create_model
from tests.network_counts import macs_by_module, on_meta, parameters


def lenet5(
    backbone: str = "lenet5", *, num_classes: int = 10, in_channels: int = 1, image_size: int = 28
) -> nn.Module:
    return create_model(
        backbone, num_classes=num_classes, in_channels=in_channels, image_size=image_size
    )


def test_published_parameter_counts() -> None:
    assert parameters(lenet5()) == 878_154
    assert parameters(lenet5("lenet5(bias=false)")) == 877_536
    # The paper's binary network of double width has no biases: 1,849,920 weights, rest BN.
    assert parameters(lenet5("lenet5(width=2, bias=false)")) == 1_851_328
    assert parameters(lenet5("lenet5(xnor=true, bias=false)")) == 877_600


def test_published_macs() -> None:
    model = on_meta("lenet5", in_channels=1, image_size=28)
    published = {"conv1": 627_200, "conv2": 5_120_000, "fc1": 819_200, "fc2": 5_120}
    assert macs_by_module(model, 28, in_channels=1) == published
    wide = on_meta("lenet5(width=2)", in_channels=1, image_size=28)
    assert sum(macs_by_module(wide, 28, in_channels=1).values()) == 23_377_920


def test_state_dict_names_are_those_of_the_paper_code() -> None:
    modules = {name.split(".")[0] for name in lenet5().state_dict()}
    assert modules == {"conv1", "conv2", "fc1", "fc2", "bn1", "bn2", "bn3", "bn4"}
    assert "bn4.weight" not in lenet5().state_dict()
    modules = {name.split(".")[0] for name in lenet5("lenet5(xnor=true)").state_dict()}
    assert modules == {"conv1", "conv2", "fc1", "fc2", "bn1", "bn2", "bn3", "bn5"}


def with_moved_norms(backbone: str) -> nn.Module:
    """Build a network in eval mode whose batch norms are not the identity."""
    model = lenet5(backbone).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.startswith("bn") and value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    return model


def normalize(x: Tensor, model: nn.Module, name: str) -> Tensor:
    """Batch norm by its definition, with the model's statistics."""
    tensors = model.state_dict()
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
    x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
    if f"{name}.weight" not in tensors:
        return x
    return x * tensors[f"{name}.weight"].view(shape) + tensors[f"{name}.bias"].view(shape)


def test_the_forward_pass_is_conv_bn_relu_pool_and_a_norm_on_the_logits() -> None:
    model = with_moved_norms("lenet5")
    tensors = model.state_dict()
    images = torch.rand(3, 1, 28, 28)
    x = functional.conv2d(images, tensors["conv1.weight"], tensors["conv1.bias"], padding=2)
    x = functional.max_pool2d(normalize(x, model, "bn1").clamp(min=0), 2)
    x = functional.conv2d(x, tensors["conv2.weight"], tensors["conv2.bias"])
    x = functional.max_pool2d(normalize(x, model, "bn2").clamp(min=0), 2)
    x = x.reshape(3, 1600) @ tensors["fc1.weight"].T + tensors["fc1.bias"]
    x = normalize(x, model, "bn3").clamp(min=0) @ tensors["fc2.weight"].T + tensors["fc2.bias"]
    expected = normalize(x, model, "bn4")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_the_xnor_form_rectifies_each_convolution_and_leaves_the_logits_alone() -> None:
    model = with_moved_norms("lenet5(xnor=true, bias=false, order=CPBA)")
    tensors = model.state_dict()
    images = torch.rand(3, 1, 28, 28)
    x = functional.conv2d(images, tensors["conv1.weight"], padding=2)
    x = functional.max_pool2d(normalize(x, model, "bn5").clamp(min=0), 2)
    x = normalize(x, model, "bn1").clamp(min=0)
    x = functional.max_pool2d(functional.conv2d(x, tensors["conv2.weight"]).clamp(min=0), 2)
    x = normalize(x, model, "bn2").clamp(min=0).reshape(3, 1600) @ tensors["fc1.weight"].T
    expected = normalize(x, model, "bn3").clamp(min=0) @ tensors["fc2.weight"].T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_weights_start_xavier_normal() -> None:
    weight = lenet5().get_parameter("fc1.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (1600 + 512)), rel=0.01)
    weight = lenet5().get_parameter("conv2.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (25 * (32 + 64))), rel=0.02)


@pytest.mark.parametrize("backbone", ["lenet5", "lenet5(xnor=true, order=CPBA)"])
@pytest.mark.parametrize("image_size", [12, 13, 14, 28, 32, 33])
@pytest.mark.parametrize(("in_channels", "num_classes"), [(1, 10), (3, 7)])
def test_any_image_from_12_pixels_gives_one_logit_per_class(
    backbone: str, image_size: int, in_channels: int, num_classes: int
) -> None:
    model = lenet5(
        backbone, image_size=image_size, in_channels=in_channels, num_classes=num_classes
    )
    logits = model(torch.rand(2, in_channels, image_size, image_size))
    assert logits.shape == (2, num_classes)


def test_smaller_images_are_refused() -> None:
    with pytest.raises(ModelError, match="at least 12 pixels, not 11"):
        lenet5(image_size=11)
