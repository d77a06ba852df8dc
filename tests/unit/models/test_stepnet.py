from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters

CHANNELS = [3, 64, 64, 128, 128, 256, 256, 256, 256, 256, 256]
KERNELS = [5, 5, 5, 5, 3, 3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("image_size", "maps"),
    [
        (32, [30, 28, 26, 24, 12, 12, 6, 6, 3, 3, 3]),
        (64, [62, 60, 58, 56, 28, 28, 14, 14, 7, 7, 5]),
        (224, [222, 220, 218, 216, 108, 108, 54, 54, 27, 27, 15]),
    ],
)
def test_the_originals_maps_are_the_published_ones(image_size: int, maps: list[int]) -> None:
    model = on_meta("stepnet(original=true)", image_size=image_size)
    shapes = output_shapes(model, image_size)
    assert [shapes[f"block{index}"][1] for index in range(1, 12)] == maps


def test_padding_keeps_the_maps_otherwise() -> None:
    shapes = output_shapes(on_meta("stepnet"), 32)
    maps = [shapes[f"block{index}"][1] for index in range(1, 12)]
    assert maps == [32, 32, 32, 32, 16, 16, 8, 8, 4, 4, 2]
    assert shapes["block11"] == [10, 2, 2]


@pytest.mark.parametrize("num_classes", [7, 10])
def test_parameters_and_macs_follow_from_the_table_of_blocks(num_classes: int) -> None:
    outputs = [*CHANNELS[1:], num_classes]
    weights = [
        kernel**2 * inner * outer
        for kernel, inner, outer in zip(KERNELS, CHANNELS, outputs, strict=True)
    ]
    norms = 2 * sum(CHANNELS[1:])
    original = on_meta("stepnet(original=true)", num_classes=num_classes)
    assert parameters(original) == sum(weights) + sum(outputs) + norms + 2 * num_classes
    fixed = on_meta("stepnet", num_classes=num_classes)
    assert parameters(fixed) == sum(weights) + norms + num_classes
    maps = [32, 32, 32, 32, 16, 16, 8, 8, 4, 4, 2]
    assert macs(fixed, 32) == sum(w * m**2 for w, m in zip(weights, maps, strict=True))


def test_layers_know_their_part() -> None:
    layers = weight_layers(on_meta("stepnet"))
    parts = {layer.name: layer.part for layer in layers if layer.part != "body"}
    assert len(layers) == 11
    assert parts == {"block1.conv": "stem", "block11.conv": "head"}


def reference_logits(model: nn.Module, images: Tensor, original: bool) -> Tensor:
    """The network in plain functions, from the weights of `model`."""
    tensors = model.state_dict()
    x = images
    for index, kernel in enumerate(KERNELS, start=1):
        prefix = f"block{index}"
        weight, bias = tensors[f"{prefix}.conv.weight"], tensors.get(f"{prefix}.conv.bias")
        x = functional.conv2d(x, weight, bias, padding=1 if original else (kernel - 1) // 2)
        if original or index < 11:
            keys = ("running_mean", "running_var", "weight", "bias")
            x = functional.batch_norm(x, *(tensors[f"{prefix}.bn.{key}"] for key in keys))
            x = torch.where(x > 0, x, 0.1 * x)
        if index in (4, 6, 8, 10):
            x = functional.max_pool2d(x, 2)
    return x.mean((2, 3))


def with_moved_norms(backbone: str) -> nn.Module:
    """Build a network in eval mode whose batch norms are not the identity."""
    model = create_model(backbone, num_classes=6, image_size=32).eval()
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            value.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize(
    ("backbone", "original"), [("stepnet", False), ("stepnet(original=true)", True)]
)
def test_the_forward_pass_is_blocks_pools_and_the_mean_of_the_class_maps(
    backbone: str, original: bool
) -> None:
    model = with_moved_norms(backbone)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), reference_logits(model, images, original), rtol=1e-4, atol=1e-4
        )


def test_eight_of_nine_cells_of_the_originals_class_maps_are_constant_at_32_pixels() -> None:
    model = with_moved_norms("stepnet(original=true)")
    maps: list[Tensor] = []
    model.get_submodule("block11").register_forward_hook(
        lambda module, inputs, output: maps.append(output)
    )
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    border = maps[0].flatten(2)[:, :, [0, 1, 2, 3, 5, 6, 7, 8]]
    torch.testing.assert_close(border, border[:1, :, :1].expand_as(border))
    assert not torch.allclose(maps[0][0, :, 1, 1], maps[0][1, :, 1, 1])


def test_weights_start_as_pytorchs_default() -> None:
    weight = create_model("stepnet", num_classes=3, image_size=16).get_parameter(
        "block2.conv.weight"
    )
    bound = 1 / math.sqrt(25 * 64)
    assert bound * 0.999 < weight.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [
        *(("stepnet", size) for size in (16, 17, 32, 224)),
        *(("stepnet(original=true)", size) for size in (24, 33, 224)),
    ],
)
def test_any_image_gives_one_logit_per_class(backbone: str, image_size: int) -> None:
    model = on_meta(backbone, num_classes=7, in_channels=1, image_size=image_size)
    logits = model(torch.empty(2, 1, image_size, image_size, device="meta"))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("backbone", "smallest"), [("stepnet", 16), ("stepnet(original=true)", 24)]
)
def test_smaller_images_are_refused(backbone: str, smallest: int) -> None:
    with pytest.raises(ModelError, match=f"at least {smallest} pixels, not {smallest - 1}"):
        on_meta(backbone, image_size=smallest - 1)
