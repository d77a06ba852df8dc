from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import ModelError, apply_method, create_model, fold, profile
from models.layers import CompressedLayer
from models.masks import WeightMask
from models.methods import resolve_methods
from models.methods.sparse import Sparse
from models.surgery import weight_layers

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def masks_of(model: nn.Module) -> dict[str, WeightMask]:
    return {
        name: module.mask
        for name, module in model.named_modules()
        if isinstance(module, CompressedLayer) and module.mask is not None
    }


def layer_of(model: nn.Module, name: str) -> CompressedLayer:
    layer = model.get_submodule(name)
    assert isinstance(layer, CompressedLayer)
    return layer


def kept_parameters(model: nn.Module) -> int:
    """All parameters but the weights under masks."""
    masked = sum(
        layer_of(model, name).weight.numel() - mask.kept for name, mask in masks_of(model).items()
    )
    return sum(p.numel() for p in model.parameters()) - masked


def small_network(width: int = 9) -> nn.Module:
    """A network whose channels no period divides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width + 1, 3, stride=2, padding=1),
        nn.BatchNorm2d(width + 1),
        nn.ReLU(),
        nn.Conv2d(width + 1, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()


@pytest.mark.parametrize(
    ("method", "vgg16", "resnet18"),
    [
        ("sparse-psd2p8", 4_718_154, 3_697_738),
        ("sparse-psd4p8", 7_578_186, 5_833_802),
        ("sparse-psd4p16", 7_067_466, 5_452_362),
        ("sparse-psd2p16", 4_003_146, 3_163_722),
        ("sparse-psd1p8", 3_288_138, 2_629_706),
        ("sparse-psd1p16", 2_470_986, 2_019_402),
        ("sparse-ps4p4", 6_556_746, 5_070_922),
        ("sparse-ps2p6", 3_288_138, 2_629_706),
        ("sparse-ps1p9", 1_653_834, 1_409_098),
        ("sparse-psc4", 6_556_746, 5_070_922),
        ("sparse-psc2", 3_288_138, 2_629_706),
        ("sparse-psc1", 1_653_834, 1_409_098),
    ],
)
def test_published_parameters(method: str, vgg16: int, resnet18: int) -> None:
    for backbone, kept in (("vgg16(form=cifar)", vgg16), ("resnet18(form=cifar)", resnet18)):
        with torch.device("meta"):
            model = create_model(backbone, method, num_classes=10, image_size=32)
        assert kept_parameters(model) == kept


@pytest.mark.parametrize(
    ("method", "entries"),
    [("sparse-psd4p8", 37 / 8), ("sparse-psd2p8", 23 / 8), ("sparse-ps4p4", 4), ("sparse-psc1", 1)],
)
def test_kept_operations_are_the_average_entries_of_a_kernel_at_every_pixel(
    method: str, entries: float
) -> None:
    # Side of the maps, and channels in and out of the masked convolutions.
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    sides = [32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    vgg16 = 3 * 64 * 9 * 32**2 + 512 * 10
    vgg16 += sum(
        int(entries * inputs * outputs) * side**2
        for inputs, outputs, side in zip(widths, widths[1:], sides, strict=False)
    )
    resnet18 = 3 * 64 * 9 * 32**2 + 512 * 10 + 4 * int(entries * 64**2) * 32**2
    for width, side in ((128, 16), (256, 8), (512, 4)):
        inner = width // 2 * width + 3 * width**2
        resnet18 += (int(entries * inner) + width // 2 * width) * side**2
    for backbone, macs in (("vgg16(form=cifar)", vgg16), ("resnet18(form=cifar)", resnet18)):
        with torch.device("meta"):
            model = create_model(backbone, method, num_classes=10, image_size=32)
        assert profile(model, 32).kept_macs == macs


def test_the_short_forms_are_the_names_of_the_paper() -> None:
    assert resolve_methods("sparse-psd2p16") == [Sparse(kernel=2, period=16)]
    assert resolve_methods("sparse-ps1p9") == [Sparse(kernel=1, full=False)]
    assert resolve_methods("sparse-psc2(seed=3)") == [Sparse(kernel=2, pattern="random", seed=3)]
    assert resolve_methods("sparse") == resolve_methods("sparse(kernel=4)")


def test_the_stem_is_exempt_wherever_it_stands_and_so_are_1x1_and_linear_layers() -> None:
    layers = [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten()]
    layers.append(nn.Linear(8, 2))
    first = apply_method(nn.Sequential(*copy.deepcopy(layers)), "sparse")
    assert list(masks_of(first)) == ["1", "2"]
    declared = apply_method(nn.Sequential(*layers), "sparse", roles={"2": "stem"})
    assert list(masks_of(declared)) == ["1"]


@pytest.mark.parametrize("method", ["sparse", "sparse-psc2"])
def test_depthwise_kernels_are_masked_in_both_patterns(method: str) -> None:
    depthwise = nn.Conv2d(16, 16, 3, groups=16)
    model = apply_method(nn.Sequential(nn.Conv2d(3, 16, 3), depthwise), method)
    per_channel = masks_of(model)["1"].kept_per_filter().flatten().tolist()
    expected = {"sparse": [4, 4, 4, 4, 4, 4, 4, 9] * 2, "sparse-psc2": [2] * 16}
    assert per_channel == expected[method]


def test_kernels_too_small_for_a_support_stay_dense() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (1, 7)), nn.Conv2d(8, 8, 5)]
    model = apply_method(nn.Sequential(*layers), "sparse")
    assert list(masks_of(model)) == ["2"]
    assert masks_of(model)["2"].kept == 8 * (7 * 4 + 25)


def test_masks_do_not_depend_on_the_random_state_or_the_weights() -> None:
    full = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = create_model(
            "lenet5", "sparse-psc4(seed=7)", num_classes=10, image_size=28, seed=seed
        )
        full.append(masks_of(model)["conv2"].full())
    assert torch.equal(*full)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["sparse-psd2p8", "sparse-ps4p4", "sparse-psc2"])
def test_training_is_that_of_the_original_procedure_and_of_masked_weights(
    method: str, optimizer: str
) -> None:
    ours = apply_method(small_network(), method)
    masks = {f"{name}.weight": mask.full() for name, mask in masks_of(ours).items()}
    assert len(masks) == 2
    original, product = small_network(), small_network()
    with torch.no_grad():
        for name, mask in masks.items():
            original.get_parameter(name).mul_(mask)

    def masked_weights() -> dict[str, Tensor]:
        return {name: product.get_parameter(name) * mask for name, mask in masks.items()}

    def original_step(images: Tensor, labels: Tensor) -> None:
        functional.cross_entropy(original(images), labels).backward()
        for name, mask in masks.items():
            gradient = original.get_parameter(name).grad
            assert gradient is not None
            gradient.mul_(mask)

    def product_step(images: Tensor, labels: Tensor) -> None:
        logits = torch.func.functional_call(product, masked_weights(), images)
        functional.cross_entropy(logits, labels).backward()

    def our_step(images: Tensor, labels: Tensor) -> None:
        functional.cross_entropy(ours(images), labels).backward()

    steps = {original: original_step, product: product_step, ours: our_step}
    optimizers = {model: OPTIMIZERS[optimizer](model.parameters()) for model in steps}
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        for model, step in steps.items():
            optimizers[model].zero_grad()
            step(images, torch.arange(4))
            optimizers[model].step()

    for name, mask in masks.items():
        weight = ours.get_parameter(name)
        assert (weight[mask == 0] == 0).all()
        assert (weight[mask == 1] != 0).all()
        state = optimizers[ours].state[weight]
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert (value[mask == 0] == 0).all()
    trained = dict(original.named_parameters())
    products = dict(product.named_parameters()) | masked_weights()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        torch.testing.assert_close(parameter, products[name], rtol=1e-9, atol=1e-12)


def test_a_dense_checkpoint_is_brought_under_the_mask_and_a_masked_one_goes_round() -> None:
    model, other = apply_method(small_network(), "sparse"), apply_method(small_network(9), "sparse")
    dense = {name: torch.ones_like(value) for name, value in small_network().state_dict().items()}
    model.load_state_dict(dense, strict=True)
    assert torch.equal(layer_of(model, "3").weight, masks_of(model)["3"].full())
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize(
    "quantizer",
    ["ternary", "ternary(rule=twn)", "ternary(rule=ttq)", "ternary-x4", "binary-bwn(last=binary)"],
)
@pytest.mark.parametrize("mask", ["sparse-psd2p8", "sparse-psc1"])
def test_quantized_weights_are_zero_under_the_mask_and_follow_the_kept_ones(
    mask: str, quantizer: str
) -> None:
    model = apply_method(small_network(), f"{quantizer}+{mask}")
    for name, mask_module in masks_of(model).items():
        layer, kept = layer_of(model, name), mask_module.full() == 1
        used = layer.used_weight()
        assert (used[~kept] == 0).all()
        if quantizer.startswith("binary"):
            means = layer.weight.abs().sum((1, 2, 3)) / mask_module.kept_per_filter().flatten()
            torch.testing.assert_close(used.abs().amax((1, 2, 3)), means)
        else:
            # The kept weights on their own, as one vector, give the same levels.
            vector = nn.Linear(int(kept.sum()), 1, bias=False).double()
            vector.weight = nn.Parameter(layer.weight[kept].detach().view(1, -1))
            alone = apply_method(nn.Sequential(vector), quantizer)
            torch.testing.assert_close(used[kept], layer_of(alone, "0").used_weight().flatten())
        (gradient,) = torch.autograd.grad(used.sum(), layer.weight)
        assert (gradient[~kept] == 0).all()


@pytest.mark.parametrize(
    "method",
    ["sparse-psd2p8", "sparse-psc2", "sparse-ps1p9+ternary", "sparse+binary-bwn(last=binary)"],
)
def test_a_network_built_without_memory_has_its_masks_when_weights_are_assigned(
    method: str,
) -> None:
    with torch.device("meta"):
        model = apply_method(small_network(), method)
        assert model(torch.empty(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 4)
    trained = apply_method(small_network(), method)
    model.load_state_dict(trained.state_dict(), assign=True)
    assert len(masks_of(model)) == 2
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), trained.eval()(images))


def test_loading_a_dense_checkpoint_leaves_it_dense() -> None:
    model = apply_method(small_network(), "sparse")
    dense = {name: torch.ones_like(value) for name, value in small_network().state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(dense, assign=assign)
        assert dense["3.weight"].eq(1).all()
        assert torch.equal(layer_of(model, "3").weight, masks_of(model)["3"].full())


def test_fold_of_a_sparse_network_is_plain_and_keeps_the_outputs() -> None:
    model = apply_method(small_network(), "sparse").eval()
    folded = fold(model)
    assert {type(layer.module) for layer in weight_layers(folded)} == {nn.Conv2d}
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(folded(images), model(images))
    assert model._ddp_params_and_buffers_to_ignore == ["3.mask.period", "6.mask.period"]
    assert folded._ddp_params_and_buffers_to_ignore == []


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("sparse(kernel=3)", "kernel=3 is not valid.*one of 1, 2, 4"),
        ("sparse(period=1)", "period must be from 2 to 1024, not 1"),
        ("sparse(period=1000000000000)", "period must be from 2 to 1024, not 1000000000000"),
        ("sparse(full=false, period=8)", "with full=false the period is the number of supports"),
        ("sparse(pattern=random, period=8)", "pattern=random has neither a period nor full"),
        ("sparse-psc4(full=false)", "pattern=random has neither a period nor full"),
        ("sparse(seed=1)", "seed is for pattern=random"),
        ("sparse-psd8", "no short form 'psd8' \\(did you mean 'psd"),
        ("sparse+sparse", "sparse is named twice"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(method: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        apply_method(small_network(), method)


def test_a_mask_comes_before_a_quantizer_and_only_once() -> None:
    with pytest.raises(ModelError, match="masks come before them"):
        apply_method(apply_method(small_network(), "ternary"), "sparse")
    with pytest.raises(ModelError, match="already has a mask"):
        apply_method(apply_method(small_network(), "sparse"), "sparse-psc4")
    with pytest.raises(ModelError, match="finds no layer"):
        apply_method(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), "sparse")


def test_weights_trained_under_another_mask_are_refused() -> None:
    first = create_model("resnet20", "sparse-psc2", num_classes=10, image_size=32)
    for method in ("sparse(kernel=2, pattern=random, seed=1)", "sparse-psd2p8", "sparse-psd4p8"):
        other = create_model("resnet20", method, num_classes=10, image_size=32)
        with pytest.raises(RuntimeError, match=r"conv1\.weight seems to have been"):
            other.load_state_dict(first.state_dict())
    same = create_model("resnet20", "sparse-psc2", num_classes=10, image_size=32, seed=1)
    same.load_state_dict(first.state_dict())
