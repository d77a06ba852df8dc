from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import ModelError, apply_method, create_model, fold, profile, quantized_layers
from models.methods.step import StructuredTernaryPatterns
from models.pattern_layers import FrozenConv2d, MixedConv2d
from models.patterns import OriginalPatterns
from models.surgery import weight_layers

#: The paper's networks: frozen and learned parameters without the classifier, learned ones for each
#: class, and the number below 2**31 that the original's generator gives next after building one.
PUBLISHED = {
    "vgg16(form=cifar)": (13_934_754, 830_016, 513, 959614058),
    "resnet50(form=cifar)": (11_318_976, 12_181_376, 2049, 333114606),
    "mobilenetv2(form=cifar)": (1_091_810, 1_255_952, 1281, 1208293929),
    "efficientnetb0(form=cifar, original=true)": (1_644_578, 1_930_588, 321, 1413483935),
    "stepnet(original=true)": (3_776_962, 200_512, 131, 1079771382),
}

#: (32 bits of each learned parameter + 2 of each frozen one) in MB, from the repository's logs.
LOGGED_MEGABYTES = {
    "vgg16(form=cifar)": {10: 6.8242725, 100: 7.0089525, 16: 6.8365845},
    "resnet50(form=cifar)": {10: 51.637208, 100: 52.374848, 16: 51.686384},
    "mobilenetv2(form=cifar)": {10: 5.3480005, 100: 5.8091605, 16: 5.3787445},
    "efficientnetb0(form=cifar, original=true)": {10: 8.1463365, 100: 8.2618965, 16: 8.1540405},
    "stepnet(original=true)": {10: 1.7515285, 100: 1.7986885, 16: 1.7546725},
}


def counts(model: nn.Module) -> tuple[int, int]:
    """Frozen and learned parameters."""
    frozen = sum(layer.weight.numel() for layer in banks(model).values())
    return frozen, sum(parameter.numel() for parameter in model.parameters())


def banks(model: nn.Module) -> dict[str, FrozenConv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenConv2d)}


def build(backbone: str, method: str = "step", classes: int = 10, size: int = 32) -> nn.Module:
    return create_model(backbone, method, num_classes=classes, image_size=size)


def without_data(backbone: str, method: str = "step", classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return build(backbone, method, classes)


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_the_original_s_counts_and_megabytes_are_the_published_ones(backbone: str) -> None:
    frozen, learned, per_class, _ = PUBLISHED[backbone]
    for classes in (10, 1000):
        model = without_data(backbone, "step(mode=original)", classes)
        assert counts(model) == (frozen, learned + per_class * classes)
    for classes, megabytes in LOGGED_MEGABYTES[backbone].items():
        logged = without_data(backbone, "step(mode=original)", classes)
        assert profile(logged, 32).parameter_bits("2-bit") / 8e6 == megabytes


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_the_original_s_stream_ends_where_it_ended_for_the_authors(backbone: str) -> None:
    method = StructuredTernaryPatterns(mode="original")
    source = OriginalPatterns(42)
    method.replace(create_model(backbone, num_classes=10, image_size=32), source)
    assert source.peek(1)[0] & (2**31 - 1) == PUBLISHED[backbone][3]


@pytest.mark.parametrize("backbone", ["vgg16", "mobilenetv2", "efficientnetb0"])
def test_first_filters_of_the_original_are_those_of_the_paper_s_code(backbone: str) -> None:
    network = create_model(backbone, num_classes=10, image_size=32)
    stem_only = nn.Sequential(weight_layers(network)[0].module)
    apply_method(stem_only, "step(mode=original)", roles={"0": "stem"})
    stem = banks(stem_only)["0.bank"].weight
    assert stem.shape == (6, 3, 3, 3)
    assert [stem[:3].count_nonzero(), stem[:3].sum()] == [46, 0]
    assert [stem[3:].count_nonzero(), stem[3:].sum()] == [32, -2]


def original_block(images: Tensor, norm: nn.BatchNorm2d, order: list[int]) -> Tensor:
    """Depthwise layer, batch norm, ReLU and projection as the original computes them."""
    source = OriginalPatterns(42)
    lbp, haar = source.draw("lbp", (4, 2, 3, 3)), source.draw("haar", (4, 2, 3, 3))
    projection = torch.from_numpy(source.draw("ternary", (6, 8, 1, 1))).double()
    maps = [
        functional.conv2d(images, torch.from_numpy(bank).double(), padding=1, groups=4)
        for bank in (lbp, haar)
    ]
    normed = functional.batch_norm(
        torch.cat(maps, dim=1),
        None,
        None,
        norm.weight[order],
        norm.bias[order],
        training=True,
    )
    return functional.conv2d(normed.relu(), projection)


def test_a_frozen_inverted_residual_is_the_original_s_function() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    norm = nn.BatchNorm2d(8)
    block = nn.Sequential(depthwise, norm, nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False))
    apply_method(block.double(), "step(mode=original)", roles={"3": "projection"})
    generator = torch.Generator().manual_seed(0)
    for parameter in (norm.weight, norm.bias):
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    images = torch.randn(3, 8, 5, 5, generator=generator, dtype=torch.float64)
    # The original has all LBP maps first: channels 0, 2, 4, 6 of ours.
    expected = original_block(images, norm, order=[0, 2, 4, 6, 1, 3, 5, 7])
    torch.testing.assert_close(block(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("original", "size", "expected"),
    [
        (True, 32, [30, 28, 26, 24, 12, 12, 6, 6, 3, 3, 3]),
        (True, 64, [62, 60, 58, 56, 28, 28, 14, 14, 7, 7, 5]),
        (True, 224, [222, 220, 218, 216, 108, 108, 54, 54, 27, 27, 15]),
        (False, 32, [32, 32, 32, 32, 16, 16, 8, 8, 4, 4, 2]),
        (False, 64, [64, 64, 64, 64, 32, 32, 16, 16, 8, 8, 4]),
        (False, 224, [224, 224, 224, 224, 112, 112, 56, 56, 28, 28, 14]),
    ],
)
def test_maps_of_stepnet_shrink_in_the_original_only(
    original: bool, size: int, expected: list[int]
) -> None:
    sizes = []
    mode = "original" if original else "fixed"
    with torch.device("meta"):
        model = build(f"stepnet(original={original})", f"step(mode={mode})", size=size)
        for module in model.modules():
            if isinstance(module, MixedConv2d):
                module.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
        model(torch.empty(2, 3, size, size))
    assert sizes == expected


def test_odd_class_counts_work_and_are_refused_by_the_original() -> None:
    head = without_data("stepnet", classes=7).get_submodule("block11.conv")
    assert isinstance(head, MixedConv2d) and head.mix.groups == 1
    with pytest.raises(ModelError, match=r"block11.conv: 256 maps and 7 outputs do not divide"):
        without_data("stepnet(original=true)", "step(mode=original)", classes=7)
    with pytest.raises(ModelError, match="conv1: the original has no patterns for one input"):
        create_model("lenet5", "step(mode=original)", num_classes=10, in_channels=1, image_size=28)


@pytest.mark.parametrize(("mode", "kernels"), [("original", {3}), ("fixed", {3, 5})])
def test_depthwise_kernels_become_3x3_in_the_original_and_keep_their_maps(
    mode: str, kernels: set[int]
) -> None:
    model = without_data("efficientnetb0", f"step(mode={mode})")
    depthwise = [layer for layer in banks(model).values() if layer.groups > 1]
    assert {layer.kernel_size[0] for layer in depthwise} == kernels
    assert all(layer.padding[0] == layer.kernel_size[0] // 2 for layer in depthwise)
    assert model(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 10)


@pytest.mark.parametrize(
    ("backbone", "arguments", "stem"),
    [
        ("resnet50", "", FrozenConv2d),
        ("resnet50", "stem=mixed", MixedConv2d),
        ("resnet50", "stem=learned", nn.Conv2d),
        ("resnet18", "", MixedConv2d),
        ("resnet18", "mix=none", FrozenConv2d),
        ("mobilenetv2", "", MixedConv2d),
        ("mobilenetv2", "stem=plain", FrozenConv2d),
    ],
)
def test_the_stem_is_mixed_where_the_network_has_no_bottlenecks(
    backbone: str, arguments: str, stem: type[nn.Module]
) -> None:
    assert type(without_data(backbone, f"step({arguments})").get_submodule("conv1")) is stem


def test_mixes_come_where_they_are_asked_for() -> None:
    def mixes(method: str) -> int:
        return sum(isinstance(m, MixedConv2d) for m in without_data("resnet50", method).modules())

    assert [mixes("step"), mixes("step(mix=all)"), mixes("step(mix=none)")] == [0, 17, 0]
    frozen, _ = counts(without_data("mobilenetv2", "step(projection=learned)"))
    assert frozen == 128_448 + 162
    _, learned = counts(without_data("vgg16", "step(mode=original, mix_groups=1)"))
    assert learned == 1_652_490


def test_relu_leaks_in_networks_of_mixed_convolutions_only() -> None:
    def leaks(backbone: str, method: str) -> bool:
        modules = without_data(backbone, method).modules()
        return any(isinstance(module, nn.LeakyReLU) for module in modules)

    assert leaks("vgg16", "step") and leaks("resnet50", "step(activation=leaky)")
    assert not leaks("vgg16", "step(activation=kept)")
    assert not any(leaks(name, "step") for name in ("resnet50", "mobilenetv2", "efficientnetb0"))


@pytest.mark.parametrize("family", ["lbp", "haar", "ternary", "binary01"])
def test_ablations_use_one_family_everywhere(family: str) -> None:
    model = build("lenet5", f"step(families={family})")
    layer = banks(model)["conv2.bank"]
    values = set((layer.weight / layer.weight.max()).unique().tolist())
    assert values == ({0.0, 1.0} if family == "binary01" else {-1.0, 0.0, 1.0})
    antisymmetric = torch.equal(layer.weight, -layer.weight.flip(2, 3))
    assert antisymmetric == (family == "lbp")
    assert type(fold(model)).__name__ == "LeNet5"


def test_odd_widths_lose_no_channel() -> None:
    net = nn.Sequential(nn.Conv2d(9, 4, 3, padding=1), nn.Conv2d(5, 5, 3, groups=5))
    apply_method(net, "step")
    mixed, alone = net
    assert isinstance(mixed, MixedConv2d) and mixed.bank.out_channels == 9
    assert mixed.mix.groups == 1
    assert isinstance(alone, FrozenConv2d) and alone.groups == 5
    images = torch.randn(1, 9, 4, 4, requires_grad=True)
    mixed(images).square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum((0, 2, 3)).all()


def test_banks_depend_on_the_method_s_seed_and_mixes_on_the_network_s() -> None:
    def parts(seed: int, method: str = "step") -> tuple[Tensor, Tensor]:
        model = create_model("resnet20", method, num_classes=10, image_size=32, seed=seed)
        block = model.get_submodule("layer1.0.conv1")
        assert isinstance(block, MixedConv2d)
        return block.bank.weight, block.mix.weight

    before = torch.random.get_rng_state()
    bank, mix = parts(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, other_seed, other_method = parts(0), parts(1), parts(0, "step(seed=1)")
    assert torch.equal(bank, again[0]) and torch.equal(mix, again[1])
    assert torch.equal(bank, other_seed[0]) and not torch.equal(mix, other_seed[1])
    assert not torch.equal(bank, other_method[0])


def test_ternary_weights_compose_and_leave_the_banks() -> None:
    model = build("resnet20", "step+ternary")
    names = [name for name, _ in quantized_layers(model)]
    assert "layer1.0.conv1.mix" in names and "fc" in names
    plain = build("resnet20", "step")
    for name, layer in banks(model).items():
        assert torch.equal(layer.weight, banks(plain)[name].weight)
    with pytest.raises(ModelError, match="already has banks of patterns"):
        apply_method(plain, "step")
    kept = quantized_layers(build("resnet20", "step+ternary(first_last=float)"))
    assert "conv1.mix" not in [name for name, _ in kept]


def test_a_mix_plays_the_part_of_the_layer_in_whose_place_it_came() -> None:
    model = build("stepnet")
    for network in (model, fold(model)):
        parts = {layer.name: layer.part for layer in weight_layers(network)}
        stem, head = (next(name for name in parts if parts[name] == p) for p in ("stem", "head"))
        assert stem.startswith("block1.conv") and head.startswith("block11.conv")
        assert profile(network, 32).macs > 0


def test_the_fixed_banks_of_a_network_never_change() -> None:
    weights = [layer.weight.numpy().ravel() for layer in banks(build("resnet20")).values()]
    values = np.concatenate(weights).astype("<f4").tobytes()
    assert hashlib.sha256(values).hexdigest()[:16] == "55f6af9ff2897a1f"


def test_what_has_no_patterns_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="step: 0 is 1x3, but patterns are square"):
        apply_method(nn.Sequential(nn.Conv2d(2, 2, (1, 3))), "step")
    with pytest.raises(ModelError, match=r"features.0: .* 3x3 and 5x5, not 11x11; mode=fixed"):
        create_model("alexnet", "step(mode=original)", num_classes=10, image_size=64)
    with pytest.raises(ModelError, match="the original pairs channels; their number 5 is odd"):
        apply_method(nn.Sequential(nn.Conv2d(5, 5, 3, groups=5)), "step(mode=original)")
    with pytest.raises(ModelError, match=r"conv1: .* not for this 7x7; mode=fixed .* form=cifar$"):
        create_model("resnet50", "step(mode=original)", num_classes=10, image_size=224)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, 5),
        nn.Conv2d(4, 4, 5, padding="valid"),
        nn.Conv2d(4, 4, 5, padding=4, dilation=2),
        nn.Conv2d(4, 4, 7, padding=3, groups=4),
    ],
    ids=str,
)
def test_only_a_padded_5x5_becomes_3x3_in_the_original(layer: nn.Conv2d) -> None:
    with pytest.raises(ModelError, match="step: 0: the original has unmixed patterns of 3x3 alone"):
        apply_method(nn.Sequential(layer), "step(mode=original, mix=none)")
    for padding in (2, "same"):
        padded = nn.Sequential(nn.Conv2d(4, 4, 5, padding=padding))
        apply_method(padded, "step(mode=original, mix=none)")
        assert banks(padded)["0"].kernel_size == (3, 3)
        assert padded(torch.ones(1, 4, 7, 7)).shape == (1, 4, 7, 7)


@pytest.mark.parametrize(
    ("backbone", "option", "missing"),
    [
        ("efficientnetb0", "activation=leaky", "ReLU"),
        ("resnet20", "projection=learned", "projection"),
        ("resnet50", "mix_groups=2", "mixed layer"),
        ("mobilenetv2", "mix=all", "bottleneck"),
    ],
)
def test_an_option_without_effect_is_refused(backbone: str, option: str, missing: str) -> None:
    with pytest.raises(ModelError, match=f"{option} has no effect: the network has no {missing}$"):
        without_data(backbone, f"step({option})")
    with pytest.raises(ModelError, match=r"stem=learned has no effect: .* no declared stem"):
        apply_method(nn.Sequential(nn.Conv2d(2, 2, 3)), "step(stem=learned)")


@pytest.mark.parametrize("before", ["sparse", "ternary", "binary"])
def test_a_mask_or_a_quantizer_is_not_dropped_unsaid(before: str) -> None:
    model = without_data("resnet20", before)
    with pytest.raises(ModelError, match="already has masked or quantized layers; step comes bef"):
        apply_method(model, "step")


def test_blocks_of_one_family_are_mixed_in_one_group_unless_asked_otherwise() -> None:
    def groups(options: str) -> int:
        block = without_data("lenet5", f"step({options})").get_submodule("conv2")
        assert isinstance(block, MixedConv2d)
        return block.mix.groups

    assert [groups("mode=fixed"), groups("families=haar")] == [2, 1]
    assert groups("families=haar, mode=original") == 1
    assert groups("families=haar, mix_groups=2") == 2


def test_the_mix_of_a_grouped_layer_does_not_cut_across_families() -> None:
    net = nn.Sequential(nn.Conv2d(12, 8, 3, groups=2))
    apply_method(net, "step")
    block = net[0]
    assert isinstance(block, MixedConv2d) and (block.bank.groups, block.mix.groups) == (2, 1)
    grouped = nn.Sequential(nn.Conv2d(12, 8, 3, groups=2))
    with pytest.raises(ModelError, match="0: the maps of a layer with 2 groups are not in order"):
        apply_method(grouped, "step(mode=original)")
    with pytest.raises(ModelError, match="0: the original's 8 maps do not divide into the 3 gro"):
        apply_method(nn.Sequential(nn.Conv2d(9, 6, 3, groups=3)), "step(mode=original)")


def test_frozen_layers_have_the_part_and_shape_of_those_in_whose_place_they_came() -> None:
    layers = {layer.name: layer for layer in profile(without_data("resnet50"), 32).layers}
    assert (layers["conv1"].part, layers["conv1"].kind) == ("stem", "spatial")
    assert layers["layer1.0.conv2"].part == "bottleneck"
    mixed = {layer.name: layer for layer in profile(without_data("mobilenetv2"), 32).layers}
    assert mixed["conv1.bank"].part == mixed["conv1.mix"].part == "stem"
    assert {mixed[name].part for name in mixed if mixed[name].scheme == "ternary"} == {"projection"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_mixed_block_with_its_norm_is_that_of_two_branches(training: bool, stride: int) -> None:
    convolution = nn.Conv2d(64, 32, 3, stride, padding=1)
    block = nn.Sequential(convolution, nn.BatchNorm2d(32), nn.ReLU())
    apply_method(block, "step(mode=original)").train(training)
    mixed, norm, activation = block
    assert isinstance(mixed, MixedConv2d) and isinstance(activation, nn.LeakyReLU)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean, norm.running_var = torch.randn(32), torch.rand(32) + 100
    images = torch.randn(4, 64, 8, 8, requires_grad=True)
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    ours = block(images)
    source = OriginalPatterns(42)
    maps = [
        functional.conv2d(
            images, torch.from_numpy(source.draw(f, (32, 64, 3, 3))).float(), None, stride, 1
        )
        for f in ("lbp", "haar")
    ]
    normed = functional.batch_norm(
        mixed.mix(torch.cat(maps, dim=1)), *statistics, norm.weight, norm.bias, training
    )
    expected = functional.leaky_relu(normed, 0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    learned = [images, mixed.mix.weight, norm.weight, norm.bias]
    gradients = [
        torch.autograd.grad((output * weights).sum(), learned) for output in (ours, expected)
    ]
    for found, reference in zip(*gradients, strict=True):
        tolerance = 1e-4 * reference.abs().max().item()
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=tolerance)
