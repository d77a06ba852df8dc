from __future__ import annotations

import json
import math

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from models import ModelError, apply_method, create_model, fold, profile, quantized_layers
from models.surgery import Part

RESNET_ROLES: dict[str, Part] = {
    "conv1": "stem",
    "fc": "head",
    "layer*.downsample.0": "shortcut",
}


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv_a = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn_a = nn.BatchNorm2d(channels)
        self.conv_b = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn_b = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn_b(self.conv_b(functional.relu(self.bn_a(self.conv_a(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        missing = out.shape[1] - shortcut.shape[1]
        return functional.relu(out + functional.pad(shortcut, (0, 0, 0, 0, 0, missing)))


def cifar_resnet(blocks: int) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    channels = 16
    for width in (16, 32, 64):
        for index in range(blocks):
            stride = 2 if index == 0 and width > 16 else 1
            net.append(CifarBlock(channels, width, stride))
            channels = width
    return net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)])


@pytest.mark.parametrize(
    ("depth", "layers", "parameters", "weights", "macs", "ratio"),
    [
        (20, 20, 269_722, 268_336, 40_551_040, 14.84),
        (32, 32, 464_154, 461_872, 68_862_592, 14.89),
        (44, 44, 658_586, 655_408, 97_174_144, 14.91),
        (56, 56, 853_018, 848_944, 125_485_696, 14.92),
    ],
)
def test_published_counts_of_the_cifar_resnets(
    depth: int, layers: int, parameters: int, weights: int, macs: int, ratio: float
) -> None:
    with torch.device("meta"):
        net = cifar_resnet((depth - 2) // 6)
    result = profile(apply_method(net, "ternary"), 32)
    assert len(quantized_layers(net)) == layers
    assert result.parameters == parameters
    assert result.quantized_weights == weights
    assert result.macs == macs
    assert round(result.ideal_ratio, 2) == ratio


@pytest.mark.parametrize(
    ("depth", "method", "ratio"),
    [
        (18, "ternary", 15.78),
        (18, "ternary(first_last=float)", 9.51),
        (18, "ternary-x2", 10.57),
        (18, "ternary-x4", 7.95),
        (34, "ternary", 15.80),
        (50, "ternary", 15.51),
        (101, "ternary", 15.45),
    ],
)
def test_published_size_ratios_of_the_imagenet_resnets(
    depth: int, method: str, ratio: float
) -> None:
    with torch.device("meta"):
        net = torchvision.models.get_model(f"resnet{depth}")
    result = profile(apply_method(net, method, roles=RESNET_ROLES), 224)
    macs = {18: 1_814_073_344, 34: 3_663_761_408, 50: 4_089_184_256, 101: 7_801_405_440}
    assert result.macs == macs[depth]
    assert result.parameters == sum(p.numel() for p in net.parameters())
    assert round(result.ideal_ratio, 2) == ratio
    assert result.density is None


def test_published_counts_and_bytes_of_lenet5() -> None:
    lenet = create_model("lenet5", num_classes=10, in_channels=1, image_size=28)
    result = profile(lenet, 28)
    assert result.parameters == 878_154
    assert result.macs == 6_571_520
    assert [layer.macs for layer in result.layers if layer.weights] == [
        627_200,
        5_120_000,
        819_200,
        5_120,
    ]
    batch_norm = [layer for layer in result.layers if layer.kind.startswith("BatchNorm")]
    assert sum(layer.stored_bytes for layer in batch_norm) == 9_808
    assert result.stored_bytes == result.float32_bytes == 4 * 878_154 + 4 * 2 * 618
    assert result.ratio == result.ideal_ratio == 1


@pytest.mark.parametrize(("expansion", "bits"), [(1, 2), (2, 3), (4, 4)])
def test_stored_bytes_count_codes_scales_and_the_float_rest(expansion: int, bits: int) -> None:
    model = create_model(
        "lenet5(bias=false)",
        f"ternary(expansion={expansion})",
        num_classes=10,
        in_channels=1,
        image_size=28,
    )
    result = profile(model, 28)
    codes = sum(math.ceil(bits * n / 8) for n in (800, 51_200, 819_200, 5_120))
    assert result.stored_bytes == codes + 4 * 4 * expansion + 9_808
    assert result.quantized_weights == 876_320
    assert result.float32_bytes == 4 * 876_320 + 9_808
    assert result.ratio == result.float32_bytes / result.stored_bytes


def test_codes_are_filled_up_to_a_whole_byte_per_layer() -> None:
    # 9 weights of 2 bits are 18 bits: 3 bytes; the scale and the bias are float32.
    first, second = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, bias=False)
    result = profile(apply_method(nn.Sequential(first, second), "ternary"), 8)
    assert [layer.stored_bytes for layer in result.layers] == [3 + 4 + 4, 3 + 4]


def test_density_is_the_share_of_non_zero_weights_that_are_used() -> None:
    model = create_model("lenet5", "ternary", num_classes=10, in_channels=1, image_size=28)
    result = profile(model, 28)
    used = [layer.quantized_weight() for _, layer in quantized_layers(model)]
    nonzero = sum(int((weight != 0).sum()) for weight in used)
    assert result.density is not None
    assert result.density == pytest.approx(nonzero / 876_320)
    assert 0.7 < result.density < 0.95
    folded = profile(fold(model), 28)
    assert folded.density == pytest.approx(result.density)
    assert folded.stored_bytes == folded.float32_bytes == result.float32_bytes


def test_profiling_does_not_touch_the_model_its_mode_or_the_random_state() -> None:
    model = create_model("lenet5", "ternary", num_classes=10, in_channels=1, image_size=28)
    model.get_submodule("bn2").eval()
    modes = [module.training for module in model.modules()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    profile(model, 28)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name])


def test_shared_layers_and_tied_parameters_are_stored_once_and_computed_twice() -> None:
    convolution = nn.Conv2d(3, 3, 3, padding=1)
    tied = nn.Conv2d(3, 3, 3, padding=1)
    tied.weight = convolution.weight
    result = profile(nn.Sequential(convolution, convolution, tied), 4)
    assert result.parameters == 81 + 3 + 3
    assert result.macs == 3 * 81 * 16
    assert result.activation_bytes == 3 * 3 * 16 * 4


def test_grouped_convolutions_count_the_operations_they_do() -> None:
    result = profile(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False)), 5)
    assert result.macs == 9 * 8 * 9
    assert result.layers[0].kind == "depthwise"
    result = profile(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False)), 5)
    assert result.macs == 9 * 6 * (2 * 9)
    assert result.layers[0].kind == "spatial"


def test_the_profile_is_plain_data_for_json() -> None:
    model = create_model("lenet5", "ternary", num_classes=10, in_channels=1, image_size=28)
    result = profile(model, 28)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["parameters"] == 878_154
    assert data["layers"][0]["name"] == "conv1"
    assert data["layers"][0]["part"] == "stem"
    assert data["layers"][0]["output_shape"] == [32, 28, 28]
    assert sum(layer["stored_bytes"] for layer in data["layers"]) == data["stored_bytes"]


def test_a_network_that_does_not_take_the_image_is_one_clear_line() -> None:
    lenet = create_model("lenet5", num_classes=10, in_channels=1, image_size=28)
    with pytest.raises(ModelError, match="LeNet5 does not take images of 1x20x20: ") as caught:
        profile(lenet, 20)
    assert "\n" not in str(caught.value)
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.BatchNorm2d(2))
    with pytest.raises(ModelError, match="does not take images of 1x28x28: expected 4D input"):
        profile(flat, 28)
    with pytest.raises(ModelError, match="no convolution"):
        profile(nn.Linear(2, 2), 28)
