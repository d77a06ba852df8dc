from __future__ import annotations

import copy
import json
import math
from itertools import cycle

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from models import (
    ModelError,
    apply_method,
    create_model,
    fold,
    list_backbones,
    list_methods,
    profile,
    quantized_layers,
)
from models.backbones import BACKBONES
from models.layers import TrimmedConv2d, compress
from models.masks import WeightMask
from models.storage import Storage
from models.surgery import Part
from models.ternary_quantizers import TernaryQuantizer

RESNET_ROLES: dict[str, Part] = {
    "conv1": "stem",
    "fc": "head",
    "layer*.downsample.0": "shortcut",
}


@pytest.mark.parametrize(
    ("method", "ratio"),
    [
        ("ternary", 15.78),
        ("ternary(first_last=float)", 9.51),
        ("ternary-x2", 10.57),
        ("ternary-x4", 7.95),
    ],
)
def test_published_size_ratios_of_resnet18(method: str, ratio: float) -> None:
    with torch.device("meta"):
        net = torchvision.models.resnet18()
    result = profile(apply_method(net, method, roles=RESNET_ROLES), 224)
    assert result.macs == result.nominal_macs == result.kept_macs == 1_814_073_344
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
    # A scale and a shift for each of 608 channels, and of the ten logits, which learn neither.
    assert sum(layer.stored_bytes for layer in batch_norm) == 4 * 2 * 618
    assert result.stored_bytes == result.float32_bytes == 4 * 878_154 + 4 * 2 * 10
    assert result.ratio == result.ideal_ratio == 1


@pytest.mark.parametrize(
    ("expansion", "bits", "smaller"), [(1, 2, 8 / 5), (2, 3, 3), (4, 4, 16 / 5)]
)
def test_stored_bytes_count_codes_scales_and_the_float_rest(
    expansion: int, bits: int, smaller: float
) -> None:
    model = create_model(
        "lenet5(bias=false)",
        f"ternary(expansion={expansion})",
        num_classes=10,
        in_channels=1,
        image_size=28,
    )
    result = profile(model, 28)
    rest = 4 * 4 * expansion + 4 * 2 * 618
    codes = sum(math.ceil(smaller * n / 8) for n in (800, 51_200, 819_200, 5_120))
    assert result.stored_bytes == codes + rest
    whole_bits = sum(math.ceil(bits * n / 8) for n in (800, 51_200, 819_200, 5_120))
    assert result.stored_bytes_in(f"{bits}-bit") == whole_bits + rest
    assert result.parameter_bits() == 8 * whole_bits + 32 * (4 * expansion + 1216)
    assert result.quantized_weights == 876_320
    assert result.float32_bytes == 4 * 876_320 + 4 * 2 * 618
    assert result.ratio == result.float32_bytes / result.stored_bytes


def test_codes_are_filled_up_to_a_whole_byte_per_layer() -> None:
    # 9 weights are 18 bits or two groups of five; the scale and the bias are float32.
    first, second = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, bias=False)
    result = profile(apply_method(nn.Sequential(first, second), "ternary"), 8)
    assert [layer.stored_bytes for layer in result.layers] == [2 + 4 + 4, 2 + 4]
    sizes = [layer.stored_bytes_in("2-bit") for layer in result.layers]
    assert sizes == [3 + 4 + 4, 3 + 4]


def test_density_is_the_share_of_non_zero_weights_that_are_used() -> None:
    model = create_model("lenet5", "ternary", num_classes=10, in_channels=1, image_size=28)
    result = profile(model, 28)
    used = [layer.used_weight() for _, layer in quantized_layers(model)]
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


class FrozenConvolution(nn.Module):
    """A convolution with a constant weight, as a method with frozen filters makes it."""

    weight: Tensor

    def __init__(self, filters: int, channels: int) -> None:
        super().__init__()
        values = torch.arange(filters * channels * 9) % 3 - 1
        bank = values.float().reshape(filters, channels, 3, 3)
        self.register_buffer("weight", bank, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images, self.weight, padding=1)

    def weight_storage(self) -> Storage:
        filters = self.weight.numel() // 9
        return Storage(
            "patterns", self.weight.numel(), levels=3, frozen=True, code_bits=7 * filters
        )

    def used_weight(self) -> Tensor:
        return self.weight


class LearnedScales(nn.Module):
    """A ternary quantizer that learns its two levels."""

    scheme, levels, keeps_zeros = "ternary", 3, True

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.ones(()))
        self.negative = nn.Parameter(torch.ones(()))

    def scales(self, weight: Tensor) -> int:
        return 2

    def forward(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        return torch.where(weight > 0, self.positive, -self.negative)


def test_frozen_weights_are_parameters_that_take_no_bytes_unless_asked_for() -> None:
    network = nn.Sequential(FrozenConvolution(10, 3), nn.Conv2d(10, 4, 1), nn.BatchNorm2d(4))
    result = profile(network, 8)
    assert (result.frozen, result.learned, result.parameters) == (270, 44 + 8, 322)
    assert result.quantized_weights == 0
    assert result.by_bits == {0.0: 270, 32.0: 52}
    assert result.stored_bytes == 4 * (44 + 8)
    assert result.stored_bytes_in("2-bit") == result.stored_bytes + 68  # 540 bits
    assert result.stored_bytes_in("patterns") == result.stored_bytes + 27  # 30 filters of 7 bits
    assert result.float32_bytes == 4 * 322
    assert result.parameter_bits("2-bit") == 32 * 52 + 2 * 270  # the size metric of STeP
    assert result.density == pytest.approx((180 + 40) / 310)
    assert result.macs == 64 * (270 + 40)
    codes = ["2-bit", "3-bit", "4-bit", "5-trit", "base-9"]
    assert list(result.by_format) == ["seed", *codes, "patterns", "float32"]
    assert result.by_format["float32"] == result.float32_bytes


# Megabytes of the frozen filters alone: 32 bits, 2 bits, five trits in a byte, pattern codes.
@pytest.mark.parametrize(
    ("backbone", "sizes"),
    [
        ("vgg16(form=cifar)", (55.739, 3.484, 2.787, 1.355)),
        ("mobilenetv2(form=cifar)", (4.367, 0.273, 0.218, 0.205)),
        ("stepnet(original=true)", (15.108, 0.944, 0.755, 0.340)),
    ],
)
def test_sizes_of_the_frozen_filters_of_step_in_each_format(
    backbone: str, sizes: tuple[float, ...]
) -> None:
    with torch.device("meta"):
        model = create_model(backbone, "step(mode=original)", num_classes=10, image_size=32)
    result = profile(model, 32)
    for name, size in zip(("float32", "2-bit", "5-trit", "patterns"), sizes, strict=True):
        frozen_bits = result.parameter_bits(name) - 32 * result.learned
        assert round(frozen_bits / 8e6, 3) == size
    assert result.parameter_bits() == 32 * result.learned


def test_the_ideal_ratio_of_frozen_filters_is_that_of_the_size_metric_of_step() -> None:
    with torch.device("meta"):
        vgg = create_model(
            "vgg16(form=cifar)", "step(mode=original)", num_classes=10, image_size=32
        )
    result = profile(vgg, 32)
    # 14,769,900 parameters in 32 bits against the 6.8242725 MB of the repository's log.
    assert result.ideal_ratio == 14_769_900 * 32 / (6.8242725 * 8e6)
    assert round(result.ideal_ratio, 2) == 8.66


def test_an_unknown_format_is_refused() -> None:
    result = profile(create_model("lenet5", "ternary", num_classes=10, image_size=28), 28)
    for size in (result.stored_bytes_in, result.parameter_bits):
        with pytest.raises(ModelError, match=r"unknown format '2bit' \(did you mean '2-bit'\?\)"):
            size("2bit")


def test_a_compiled_network_has_the_profile_of_the_network_itself() -> None:
    model = create_model("lenet5", "ternary", num_classes=10, in_channels=1, image_size=28)
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    assert profile(compiled, 28) == profile(model, 28)


def test_a_transposed_convolution_multiplies_each_input_by_its_filters() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 5, 5))
    assert 2 * profile(network, 5).macs == counter.get_total_flops()
    assert profile(network, 5).layers[1].macs == 25 * 4 * (3 * 9)


def test_scales_that_a_quantizer_learns_are_parameters_and_stored_once() -> None:
    layer = compress(nn.Conv2d(2, 2, 3), weight_quantizer=LearnedScales())
    result = profile(nn.Sequential(layer), 8)
    assert [row.name for row in result.layers] == ["0"]
    assert result.parameters == 36 + 2 + 2
    assert result.quantized_weights == 36
    assert result.by_bits == {1.6: 36, 32.0: 4}
    assert result.stored_bytes == 8 + 2 * 4 + 2 * 4
    assert result.float32_bytes == 4 * 38
    assert result.ideal_ratio == 32 * 38 / (2 * 36 + 32 * 4)


def test_predefined_zeros_are_no_parameters_and_no_kept_operations() -> None:
    period = torch.ones(1, 4, 3, 3)
    period[:, :, 0] = 0
    convolution = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    mask = WeightMask(period, 6, bank_bits=9)
    sparse = profile(nn.Sequential(compress(convolution, mask=mask)), 8)
    assert (sparse.parameters, sparse.masked, sparse.quantized_weights) == (144, 72, 0)
    assert (sparse.macs, sparse.nominal_macs, sparse.kept_macs) == (64 * 216, 64 * 216, 64 * 144)
    assert sparse.stored_bytes == 4 * 144 + 2
    assert sparse.float32_bytes == 4 * 216
    assert sparse.ideal_ratio == 1.5
    assert sparse.density == pytest.approx(144 / 216)
    both = compress(convolution, mask=mask, weight_quantizer=TernaryQuantizer())
    result = profile(nn.Sequential(both), 8)
    assert (result.parameters, result.masked, result.quantized_weights) == (144, 72, 144)
    assert result.stored_bytes == 29 + 4 + 2


@pytest.mark.parametrize(("image_size", "taps"), [(1, 1), (2, 9), (3, 9)])
def test_taps_that_see_only_padding_are_nominal_but_not_executed(
    image_size: int, taps: int
) -> None:
    plain = nn.Conv2d(3, 5, 3, padding=1)
    trimmed = TrimmedConv2d(3, 5, 3, padding=1)
    pixels = image_size**2
    result = profile(nn.Sequential(trimmed), image_size)
    assert result.macs == pixels * 15 * taps
    assert result.nominal_macs == pixels * 15 * 9
    assert result.torchstat == profile(nn.Sequential(plain), image_size).torchstat


QUICK = {"alexnet", "lenet5", "mobilenetv2", "resnet18", "squeezenet", "stepnet", "vgg16", "vgg19"}


# Each network once, each method on several networks of different families.
@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        pytest.param(*pair, marks=[] if pair[0] in QUICK else pytest.mark.slow)
        for pair in zip(list_backbones(), cycle(list_methods()), strict=False)
    ],
)
def test_operations_equal_those_of_the_counter_of_torch(backbone: str, method: str) -> None:
    size = max(32, BACKBONES.get(backbone).smallest_image)
    with torch.device("meta"):
        model = create_model(backbone, method, num_classes=10, image_size=size).eval()
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert 2 * profile(model, size).executed_macs == counter.get_total_flops()


# The complexity tables of ThreshNet's older READMEs, made with torchstat: 224 pixels, 1000 classes.
@pytest.mark.parametrize(
    ("network", "madd", "flops", "memory", "traffic"),
    [
        ("resnet50", 8.22, 4.12, 109.69, 317.43),
        ("resnet101", 15.66, 7.84, 161.75, 494.00),
        ("resnext50_32x4d", 8.51, 4.27, 134.76, 365.56),
        ("wide_resnet50_2", 22.85, 11.43, 134.76, 532.85),
        ("densenet121", 5.74, 2.88, 147.10, 359.71),
        ("densenet169", 6.81, 3.42, 174.14, 448.55),
    ],
)
def test_published_figures_of_torchstat_come_out_to_the_digit(
    network: str, madd: float, flops: float, memory: float, traffic: float
) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(network)
    counts = profile(model, 224).torchstat
    assert round(counts.madd / 1e9, 2) == madd
    assert round(counts.flops / 1e9, 2) == flops
    assert round(counts.memory_mb, 2) == memory
    assert round(counts.traffic_mb, 2) == traffic


def test_peak_memory_is_the_largest_input_and_output_of_one_module() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    result = profile(network, 8)
    assert result.peak_activation_bytes == 4 * max(192 + 128, 128 + 128, 128 + 32)


def test_no_weight_is_copied() -> None:
    frozen, convolution = FrozenConvolution(4, 3), nn.Conv2d(4, 4, 3)
    network = nn.Sequential(frozen, convolution, nn.BatchNorm2d(4))
    # A tensor that depends on another one cannot be copied.
    frozen.weight = torch.ones(4, 3, 3, 3) * convolution.weight.sum()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(network)
    assert profile(network, 8).frozen == 108


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
