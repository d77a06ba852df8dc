from __future__ import annotations

import weakref
from collections import Counter
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from models import ModelError, create_model, fold
from models.backbones import BACKBONES
from models.backbones.harmonic import (
    DenseBlock,
    HarmonicBlock,
    harmonic_links,
    harmonic_width,
)
from models.layers import TrimmedConv2d
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters

NETWORKS = [
    "hardnet39ds",
    "hardnet68",
    "hardnet68ds",
    "hardnet85",
    "threshnet28",
    "threshnet79",
    "threshnet95",
    "triplenets",
    "triplenetb",
]


def base(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("base").children())


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("network", "num_classes", "count", "convs"),
    [
        ("threshnet79", 10, 14_371_858, 79),
        ("threshnet79", 1000, 15_323_248, 79),
        ("threshnet95", 10, 16_189_202, 95),
        ("threshnet95", 1000, 17_140_592, 95),
        ("hardnet68", 10, 16_550_598, 67),
        ("hardnet68", 1000, 17_565_348, 67),
        ("hardnet85", 10, 35_402_022, 84),
        ("hardnet85", 1000, 36_670_212, 84),
        ("hardnet39ds", 1000, 3_488_228, 74),
        ("hardnet68ds", 1000, 4_180_602, 131),
        ("triplenets", 10, 8_965_434, 74),
        ("triplenets", 1000, 9_679_224, 74),
        ("triplenetb", 10, 11_567_874, 78),
        ("triplenetb", 1000, 12_638_064, 78),
        ("triplenetb(version=repository)", 10, 14_142_526, 88),
        ("triplenetb(version=repository)", 1000, 15_212_716, 88),
    ],
)
def test_parameters_and_convolutions_of_the_published_networks(
    network: str, num_classes: int, count: int, convs: int
) -> None:
    model = on_meta(network, num_classes=num_classes)
    assert parameters(model) == count
    assert len(convolutions(model)) == convs


@pytest.mark.parametrize(
    ("network", "giga"),
    [
        ("threshnet79", "3.4241"),
        ("threshnet95", "4.0282"),
        ("hardnet68", "4.2461"),
        ("hardnet85", "9.0741"),
        ("hardnet39ds", "0.4295"),
        ("hardnet68ds", "0.7753"),
        ("triplenets", "4.1392"),
        ("triplenetb", "4.2666"),
        ("triplenetb(version=repository)", "5.5536"),
    ],
)
def test_macs_of_the_published_networks_at_224_pixels(network: str, giga: str) -> None:
    model = on_meta(network, num_classes=1000, image_size=224)
    assert f"{macs(model, 224) / 1e9:.4f}" == giga


def test_the_reconstruction_of_threshnet28_says_that_it_is_ours_and_is_near_the_totals() -> None:
    assert "our reconstruction" in BACKBONES.get("threshnet28").note
    model = on_meta("threshnet28", num_classes=1000, image_size=224)
    assert len(convolutions(model)) == 28
    assert parameters(model) == pytest.approx(10.18e6, rel=0.002)
    # Published are torchstat's FLOPs, of which norms and activations are about one percent.
    assert macs(model, 224) == pytest.approx(2.28e9, rel=0.015)


def test_threshnet79_has_the_published_parameters_module_by_module() -> None:
    counts = [parameters(module) for module in base(on_meta("threshnet79"))]
    assert counts[:9] == [928, 18_560, 0, 335_040, 33_024, 0, 546_560, 74_112, 0]
    assert counts[9:14] == [1_019_520, 166_464, 4_656_716, 314_880, 0]
    assert counts[14:] == [6_443_804, 752_640, 9_610]


def test_the_middle_of_threshnet95_has_the_published_parameters() -> None:
    counts = [parameters(module) for module in base(on_meta("threshnet95"))]
    assert sum(counts[:6]) == 387_552
    assert counts[6:11] == [919_680, 131_584, 0, 1_625_600, 295_680]
    assert counts[11:] == [5_308_172, 314_880, 0, 6_443_804, 752_640, 9_610]


def test_a_dense_layer_has_130_c_plus_37120_parameters() -> None:
    with torch.device("meta"):
        block = DenseBlock(64, 3, 32)
    assert [parameters(layer) for layer in block] == [
        130 * channels + 37_120 for channels in (64, 96, 128)
    ]


@pytest.mark.parametrize("image_size", [32, 64, 96, 224])
def test_the_maps_of_threshnet79_have_the_published_sizes(image_size: int) -> None:
    shapes = output_shapes(on_meta("threshnet79", num_classes=1000), image_size)
    scale = image_size / 224
    expected = {0: (32, 112), 1: (64, 112), 2: (64, 56), 3: (256, 56), 5: (128, 28), 6: (384, 28)}
    expected |= {8: (192, 14), 9: (576, 14), 10: (288, 14), 11: (654, 14), 13: (480, 7)}
    expected |= {14: (782, 7), 15: (960, 7)}
    for index, (channels, side) in expected.items():
        assert shapes[f"base.{index}"] == [channels, round(side * scale), round(side * scale)]
    assert shapes[""] == [1000]


@pytest.mark.parametrize("network", NETWORKS)
def test_images_of_any_size_and_channels_and_the_same_keys(network: str) -> None:
    sizes = [1, 28] if network in ("hardnet68ds", "hardnet85", "threshnet95") else [1, 8, 28, 45]
    keys = on_meta(network, image_size=224).state_dict().keys()
    for image_size in sizes:
        model = on_meta(network, num_classes=7, in_channels=1, image_size=image_size)
        assert model(torch.empty(2, 1, image_size, image_size, device="meta")).shape == (2, 7)
        assert model.state_dict().keys() == keys


@pytest.mark.parametrize("network", ["hardnet39ds", "threshnet28", "triplenets"])
def test_the_small_stem_takes_images_of_any_size(network: str) -> None:
    for image_size in (1, 8, 28):
        model = on_meta(f"{network}(stem=small)", image_size=image_size)
        assert model(torch.empty(2, 3, image_size, image_size, device="meta")).shape == (2, 10)


def test_the_small_stem_keeps_the_image_size() -> None:
    original = output_shapes(on_meta("threshnet79"), 32)
    small = output_shapes(on_meta("threshnet79(stem=small)"), 32)
    assert [original[f"base.{index}"][1] for index in (0, 1, 2, 15)] == [16, 16, 8, 1]
    assert [small[f"base.{index}"][1] for index in (0, 1, 2, 15)] == [32, 32, 32, 4]


@pytest.mark.parametrize("layers", [4, 8, 16, 18, 24])
def test_links_follow_the_published_rule(layers: int) -> None:
    for layer in range(1, layers + 1):
        rule = [layer - 2**i for i in range(10) if layer % 2**i == 0]
        assert harmonic_links(layer) == rule
    assert harmonic_links(6) == [5, 4]
    assert harmonic_links(16) == [15, 14, 12, 8, 0]


@pytest.mark.parametrize("width", [14, 16, 20, 24, 28, 36, 40, 48, 64, 160, 256])
@pytest.mark.parametrize("multiplier", ["1.6", "1.7"])
def test_widths_equal_the_closed_form_in_exact_arithmetic(width: int, multiplier: str) -> None:
    for power in range(5):
        exact = width * Fraction(multiplier) ** power
        expected = 2 * ((exact + 1) // 1 // 2)
        for odd in (1, 3):
            assert harmonic_width(odd * 2**power, width, float(multiplier)) == expected


def test_inputs_and_outputs_of_the_harmonic_blocks_of_threshnet() -> None:
    def widths(block: HarmonicBlock) -> list[tuple[int, int]]:
        return [(conv.in_channels, conv.out_channels) for conv in convolutions(block)]

    with torch.device("meta"):
        fourth = HarmonicBlock(288, 16, 40, 1.7, nn.ReLU, depthwise=False)
        fifth = HarmonicBlock(480, 4, 160, 1.7, nn.ReLU, depthwise=False)
    b = 288
    expected = [(b, 40), (b + 40, 68), (68, 40), (b + 108, 116), (116, 40), (156, 68), (68, 40)]
    expected += [(b + 224, 196), (196, 40), (236, 68), (68, 40), (304, 116), (116, 40), (156, 68)]
    expected += [(68, 40), (b + 420, 334)]
    assert widths(fourth) == expected
    assert widths(fifth) == [(480, 160), (640, 272), (272, 160), (912, 462)]
    assert (fourth.out_channels, fifth.out_channels) == (654, 782)


def test_the_output_of_a_dense_block_begins_with_its_input_then_layer_by_layer() -> None:
    block = DenseBlock(5, 3, 4).eval()
    new: list[Tensor] = []
    for layer in block:
        layer.register_forward_hook(lambda module, inputs, output: new.append(output))
    images = torch.randn(2, 5, 6, 6)
    with torch.no_grad():
        output = block(images)
    assert torch.equal(output, torch.cat([images, *new], 1))


@pytest.mark.parametrize("depthwise", [False, True])
def test_the_output_of_a_harmonic_block_is_its_odd_layers_and_the_last(depthwise: bool) -> None:
    block = HarmonicBlock(3, 6, 8, 1.7, nn.ReLU6, depthwise).eval()
    made: list[Tensor] = []
    seen: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0])
        made.append(output)

    for layer in block.layers:
        layer.register_forward_hook(record)
    images = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        output = block(images)
    assert torch.equal(output, torch.cat([made[0], made[2], made[4], made[5]], 1))
    by_number = [images, *made]
    for number, input in enumerate(seen, start=1):
        links = [number - 2**i for i in range(3) if number % 2**i == 0]
        assert torch.equal(input, torch.cat([by_number[link] for link in links], 1))


def test_a_harmonic_block_lets_go_of_what_no_later_layer_sees() -> None:
    block = HarmonicBlock(3, 16, 4, 1.7, nn.ReLU, depthwise=False).eval()
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[int]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        alive.append([number for number, ref in enumerate(made, start=1) if ref() is not None])
        made.append(weakref.ref(output))

    for layer in block.layers:
        layer.register_forward_hook(record)
    with torch.no_grad():
        block(torch.randn(1, 3, 4, 4))
    assert alive[8] == [1, 3, 5, 7, 8]  # while layer 9 runs: 2, 4 and 6 are gone
    assert alive[15] == [1, 3, 5, 7, 8, 9, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("dense_blocks", range(6))
def test_the_threshold_says_how_many_leading_blocks_are_dense(dense_blocks: int) -> None:
    growth = ", growth=24" if dense_blocks else ""
    model = on_meta(f"threshnet79(dense_blocks={dense_blocks}{growth})")
    kinds = [type(m) for m in base(model) if isinstance(m, DenseBlock | HarmonicBlock)]
    assert kinds == [DenseBlock] * dense_blocks + [HarmonicBlock] * (5 - dense_blocks)
    layers = [6, 8, 12, 16, 4]
    dense, harmonic = sum(layers[:dense_blocks]), sum(layers[dense_blocks:])
    assert len(convolutions(model)) == 2 + 2 * dense + harmonic + 5
    growths = {m.out_channels for n, m in model.named_modules() if n.endswith(".conv2")}
    assert growths <= {24}
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("options", ["dense_blocks=6", "dense_blocks=-1", "growth=0"])
def test_impossible_options_are_refused(options: str) -> None:
    with pytest.raises(ModelError, match=options.split("=")[0] + " must be"):
        create_model(f"threshnet79({options})", num_classes=10, image_size=32)


def test_growth_without_a_dense_block_is_refused() -> None:
    with pytest.raises(ModelError, match="growth has no effect with dense_blocks=0"):
        on_meta("threshnet79(dense_blocks=0, growth=64)")


@pytest.mark.parametrize(
    ("network", "relu6", "dropout"),
    [
        ("threshnet28", False, []),
        ("threshnet79", False, []),
        ("threshnet95", False, []),
        ("hardnet68", True, [0.1]),
        ("hardnet85", True, [0.1, 0.2]),
        ("hardnet39ds", True, [0.05]),
        ("hardnet68ds", True, [0.05]),
        ("triplenets", True, [0.1]),
        ("triplenetb", True, [0.1]),
    ],
)
def test_activations_dropout_and_biases_are_the_authors(
    network: str, relu6: bool, dropout: list[float]
) -> None:
    model = on_meta(network)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == dropout
    for name, module in model.named_modules():
        if name.endswith(".relu"):
            assert type(module) is (nn.ReLU6 if relu6 else nn.ReLU), name
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            assert type(module) is nn.ReLU, name
        if isinstance(module, nn.Conv2d):
            assert (module.bias is not None) == name.endswith("shortcut.0"), name


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("threshnet79", {"stem": 1, "head": 1, "bottleneck": 26}),
        ("hardnet68", {"stem": 1, "head": 1}),
        ("hardnet39ds", {"stem": 1, "head": 1}),
        ("triplenetb", {"stem": 1, "head": 1, "bottleneck": 9, "shortcut": 3}),
    ],
)
def test_layers_play_their_parts(network: str, expected: dict[str, int]) -> None:
    layers = weight_layers(on_meta(network))
    assert Counter(layer.part for layer in layers if layer.part != "body") == expected
    assert layers[0].part == "stem"
    assert layers[-1].part == "head"


def test_state_dict_keys_are_those_of_the_published_checkpoints() -> None:
    keys = list(on_meta("hardnet68").state_dict())
    assert len(keys) == 67 * 6 + 2
    assert keys[:2] == ["base.0.conv.weight", "base.0.norm.weight"]
    assert {"base.3.layers.7.conv.weight", "base.4.norm.running_var"} <= set(keys)
    assert keys[-2:] == ["base.16.3.weight", "base.16.3.bias"]
    separable = on_meta("hardnet39ds").state_dict()
    assert {
        "base.2.dwconv.weight",
        "base.3.layers.0.layer1.conv.weight",
        "base.3.layers.0.layer2.dwconv.weight",
        "base.3.layers.0.layer2.norm.bias",
    } <= separable.keys()
    assert "base.14.3.weight" in separable


def idle_weights(network: str, image_size: int) -> int:
    """How many weights of 3x3 kernels lie at taps that got no gradient in the whole layer."""
    model = create_model(network, num_classes=10, image_size=image_size)
    images = torch.randn(4, 3, image_size, image_size)
    model(images).square().sum().backward()
    idle = 0
    for conv in convolutions(model):
        assert conv.weight.grad is not None
        touched = conv.weight.grad.ne(0).any(0).any(0)
        idle += int((~touched).sum()) * conv.weight[:, :, 0, 0].numel()
    return idle


@pytest.mark.parametrize(
    ("network", "image_size", "idle"),
    [("threshnet79", 32, 5_725_952), ("threshnet95", 32, 5_725_952), ("threshnet79", 64, 0)],
)
def test_weights_that_one_pixel_maps_never_train(network: str, image_size: int, idle: int) -> None:
    assert idle_weights(network, image_size) == idle


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"), [(3, 1, 1), (3, 2, 4), (5, 1, 2), (5, 2, 1)]
)
def test_a_trimmed_convolution_equals_the_plain_one(
    size: tuple[int, int], kernel: int, stride: int, groups: int
) -> None:
    trimmed = TrimmedConv2d(4, 8, kernel, stride, kernel // 2, groups=groups, dtype=torch.float64)
    plain = trimmed.folded()
    assert type(plain) is nn.Conv2d
    inputs = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    copied = inputs.detach().clone().requires_grad_()
    output, expected = trimmed(inputs), plain(copied)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(expected)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs.grad, copied.grad)
    torch.testing.assert_close(trimmed.weight.grad, plain.weight.grad)


def test_at_one_pixel_only_the_centre_tap_counts() -> None:
    conv = TrimmedConv2d(6, 4, 3, padding=1, bias=False, dtype=torch.float64)
    inputs = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    centre = inputs.flatten(1) @ conv.weight[:, :, 1, 1].t()
    torch.testing.assert_close(conv(inputs).flatten(1), centre)


@pytest.mark.parametrize("network", ["threshnet28", "hardnet39ds"])
def test_a_network_with_trimmed_convolutions_equals_the_plain_one(network: str) -> None:
    model = create_model(network, num_classes=10, image_size=32).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model(images)
    model.eval()
    plain = fold(model)
    assert not any(isinstance(module, TrimmedConv2d) for module in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images))


def test_true_operations_at_32_pixels_leave_out_the_idle_taps() -> None:
    model = on_meta("threshnet79")
    nominal = macs(fold(model), 32)
    assert f"{nominal / 1e9:.4f}" == "0.0699"
    assert macs(model, 32) == nominal - 5_725_952
