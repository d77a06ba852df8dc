from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, macs_by_module, on_meta, output_shapes, parameters

#: Weights, MACs and map size (before the pool) of each layer at width 1, as published.
LAYERS = {
    "conv1": (3_456, 3_110_400, 30),
    "conv2": (147_456, 132_710_400, 30),
    "conv3": (294_912, 66_355_200, 15),
    "conv4": (589_824, 132_710_400, 15),
    "conv5": (1_179_648, 57_802_752, 7),
    "conv6": (2_359_296, 115_605_504, 7),
    "fc1": (4_718_592, 4_718_592, 1),
    "fc2": (1_048_576, 1_048_576, 1),
    "fc3": (10_240, 10_240, 1),
}


@pytest.mark.parametrize(
    ("backbone", "published"),
    [
        ("vggnet7", 10_363_530),
        ("vggnet7(bias=false)", 10_359_680),
        ("vggnet7(bias=false, width=2)", 28_798_720),
        ("vggnet7(bias=false, width=4)", 93_103_616),
        ("vggnet7(bias=false, width=.5)", 4_568_512),
    ],
)
def test_published_parameter_counts(backbone: str, published: int) -> None:
    assert parameters(on_meta(backbone)) == published


def test_published_weights_macs_and_maps_of_each_layer() -> None:
    model = on_meta("vggnet7")
    weights = {layer.name: layer.module.weight.numel() for layer in weight_layers(model)}
    assert weights == {name: counts[0] for name, counts in LAYERS.items()}
    counted = macs_by_module(model, 32)
    assert counted == {name: counts[1] for name, counts in LAYERS.items()}
    assert sum(counted.values()) == 514_072_064
    shapes = output_shapes(model, 32)
    for name, (_, _, side) in LAYERS.items():
        if name.startswith("conv"):
            assert shapes[name][1:] == [side, side]
    assert shapes["flatten"] == [4608]


@pytest.mark.parametrize(("width", "millions"), [(0.5, 131.3), (2, 2_037.5), (4, 8_115.3)])
def test_published_macs_of_other_widths(width: float, millions: float) -> None:
    counted = macs(on_meta(f"vggnet7(width={width})"), 32)
    assert counted / 1e6 == pytest.approx(millions, abs=0.05)


def test_state_dict_names_are_those_of_the_paper_code() -> None:
    keys = on_meta("vggnet7").state_dict()
    modules = {name.split(".")[0] for name in keys}
    assert modules == {*LAYERS, *(f"bn{index}" for index in range(1, 10))}
    assert "bn9.weight" not in keys


def test_layers_know_their_part() -> None:
    parts = {layer.name: layer.part for layer in weight_layers(on_meta("vggnet7"))}
    assert parts == dict.fromkeys(LAYERS, "body") | {"conv1": "stem", "fc3": "head"}


def correlate(maps: Tensor, weight: Tensor, bias: Tensor, replicated: int) -> Tensor:
    """Convolution as a sum over taps, after the border is repeated by indexing."""
    size, kernel = maps.shape[2], weight.shape[2]
    rows = torch.arange(-replicated, size + replicated).clamp(0, size - 1)
    maps = maps[:, :, rows][:, :, :, rows]
    side = len(rows) - kernel + 1
    result = bias.view(1, -1, 1, 1).repeat(len(maps), 1, side, side)
    for row in range(kernel):
        for column in range(kernel):
            window = maps[:, :, row : row + side, column : column + side]
            result += torch.einsum("nihw,oi->nohw", window, weight[:, :, row, column])
    return result


def normalize(x: Tensor, model: nn.Module, name: str) -> Tensor:
    """Batch norm by its definition, with the model's statistics."""
    tensors = model.state_dict()
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
    x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
    if f"{name}.weight" not in tensors:
        return x
    return x * tensors[f"{name}.weight"].view(shape) + tensors[f"{name}.bias"].view(shape)


def test_the_forward_pass_pads_by_replication_and_pools_every_second_block() -> None:
    model = create_model("vggnet7(width=.125)", num_classes=10, image_size=32).double().eval()
    tensors = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if name.startswith("bn") and value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    x = images
    for layer in range(1, 7):
        weight, bias = tensors[f"conv{layer}.weight"], tensors[f"conv{layer}.bias"]
        x = correlate(x, weight, bias, replicated=0 if layer == 1 else 1)
        x = normalize(x, model, f"bn{layer}").clamp(min=0)
        if layer % 2 == 0:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    x = x.reshape(2, -1)
    for layer in (1, 2, 3):
        x = x @ tensors[f"fc{layer}.weight"].T + tensors[f"fc{layer}.bias"]
        x = normalize(x, model, f"bn{layer + 6}")
        x = x if layer == 3 else x.clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(images), x, rtol=1e-9, atol=1e-9)


def test_weights_start_xavier_normal() -> None:
    model = create_model("vggnet7(width=.25)", num_classes=10, image_size=32)
    weight = model.get_parameter("conv3.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * (32 + 64))), rel=0.03)
    weight = model.get_parameter("fc1.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (1152 + 1024)), rel=0.01)


@pytest.mark.parametrize("order", ["CBAP", "CPBA"])
@pytest.mark.parametrize("image_size", [10, 17, 18, 28, 32, 64, 224])
def test_any_image_from_10_pixels_gives_one_logit_per_class(order: str, image_size: int) -> None:
    backbone = f"vggnet7(order={order}, width=.3)"
    model = on_meta(backbone, num_classes=7, in_channels=1, image_size=image_size)
    logits = model(torch.empty(2, 1, image_size, image_size, device="meta"))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("backbone", "image_size", "reason"),
    [
        ("vggnet7", 9, "at least 10 pixels, not 9"),
        ("vggnet7(width=0)", 32, "width must be at least 1/128, not 0.0"),
        ("vggnet7(order=PCBA)", 32, "order is one of CBAP, CPBA"),
    ],
)
def test_what_cannot_be_built_is_refused(backbone: str, image_size: int, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        on_meta(backbone, image_size=image_size)
