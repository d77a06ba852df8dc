"""Blurring before pixels are skipped, against its formula and what it is for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models import (
    ModelError,
    add_blurpool,
    apply_method,
    constant_buffers,
    create_model,
    fold,
    list_methods,
    profile,
)
from models.lowpass import BlurPool2d

METHODS = [*list_methods(), "sparse+ternary", "step+ternary", "ternary(rule=ttq)"]


def images(size: int = 32) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def build(method: str = "float", backbone: str = "resnet20", *, blurpool: bool = True) -> nn.Module:
    return create_model(backbone, method, num_classes=10, image_size=32, blurpool=blurpool)


def settled(model: nn.Module) -> nn.Module:
    """The network in evaluation mode, with the statistics of a batch, in float64."""
    model.double().train()(images().double())
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(images().double())
    return result


def blurred_by_hand(maps: Tensor, stride: int, rows: int, columns: int) -> Tensor:
    """The docstring's sum, pixel by pixel."""
    weights = (1.0, 2.0, 1.0)
    result = torch.zeros(*maps.shape[:2], rows, columns, dtype=maps.dtype)
    for i in range(rows):
        for j in range(columns):
            for a in range(3):
                for b in range(3):
                    row, column = stride * i + a - 1, stride * j + b - 1
                    if 0 <= row < maps.shape[2] and 0 <= column < maps.shape[3]:
                        factor = weights[a] * weights[b] / 16
                        result[:, :, i, j] += factor * maps[:, :, row, column]
    return result


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_blur_is_the_binomial_filter_with_zeros_around(size: tuple[int, int], stride: int) -> None:
    maps = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = (-(-side // stride) for side in size)
    expected = blurred_by_hand(maps, stride, rows, columns)
    torch.testing.assert_close(BlurPool2d(stride).double()(maps), expected)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("kernel", "padding"), [(2, 0), (3, 0), (3, 1)])
def test_blurred_pool_has_the_size_of_the_pool(kernel: int, padding: int, ceil_mode: bool) -> None:
    for size in range(kernel, kernel + 6):
        plain = nn.MaxPool2d(kernel, 2, padding, ceil_mode=ceil_mode)
        network = nn.Sequential(copy.deepcopy(plain))
        assert add_blurpool(network) == ["0"]
        maps = torch.randn(1, 2, size, size + 1)
        blurred, expected = network(maps), plain(maps)
        assert blurred.shape == expected.shape
        everywhere = nn.functional.max_pool2d(maps, kernel, 1, padding)
        by_hand = blurred_by_hand(everywhere, 2, *expected.shape[2:])
        torch.testing.assert_close(blurred, by_hand)


def test_blurred_network_moves_less_when_its_images_do() -> None:
    # Zhang's measure: how far features change under a shift by one pixel, which stride 2 aliases.
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blurred = copy.deepcopy(plain)
    assert add_blurpool(blurred) == ["0", "2"]
    maps = torch.randn(8, 16, 48, 48)

    @torch.no_grad()
    def change(network: nn.Module, shift: int) -> float:
        before = network(maps)
        after = network(maps.roll(shift, dims=-1)).roll(-(shift // 4), dims=-1)
        inner = slice(3, -3)
        difference = (after - before)[..., inner, inner].square().mean()
        return float(difference / before[..., inner, inner].var())

    assert change(blurred, 4) < 1e-10  # a multiple of the strides moves the features exactly
    assert change(blurred, 1) < 0.6 * change(plain, 1)


def test_keys_stay_so_float_weights_load() -> None:
    plain, blurred = build(blurpool=False), build()
    assert list(plain.state_dict()) == list(blurred.state_dict())
    blurred.load_state_dict(plain.state_dict(), strict=True)
    assert add_blurpool(build(blurpool=False)) == ["layer2.0.conv1", "layer3.0.conv1"]


def test_stem_and_what_skips_nothing_stay_as_they_are() -> None:
    network = create_model("resnet50(form=imagenet)", num_classes=5, image_size=64, blurpool=True)
    blurred = [name for name, module in network.named_modules() if isinstance(module, BlurPool2d)]
    assert blurred == ["maxpool.blur"] + [
        f"layer{stage}.0.{layer}.blur" for stage in (2, 3, 4) for layer in ("conv2", "downsample.0")
    ]


@pytest.mark.parametrize("backbone", ["resnet20", "lenet5"])
@pytest.mark.parametrize("method", METHODS)
def test_blur_composes_with_the_method(method: str, backbone: str) -> None:
    model = settled(build(method, backbone))
    expected = logits(model)
    folded = fold(model)
    assert sum(isinstance(module, BlurPool2d) for module in folded.modules()) == 2
    torch.testing.assert_close(logits(folded), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    for tensor in model.parameters():
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits(model), expected)
    plain = settled(build(method, backbone, blurpool=False))
    assert not torch.allclose(logits(plain), expected)


@pytest.mark.parametrize("method", ["ternary", "binary", "step"])
def test_method_may_also_come_behind_the_blur(method: str) -> None:
    before, after = build(method), apply_method(build(), method)
    after.load_state_dict(before.state_dict(), strict=True)  # the mixes of step are drawn
    assert torch.equal(logits(settled(after)), logits(settled(before)))


def test_folded_blurred_network_exports_for_any_batch() -> None:
    model = fold(settled(build("ternary")))
    dynamic = ({0: torch.export.Dim("batch_size")},)
    program = torch.export.export(model, (images()[:2].double(),), dynamic_shapes=dynamic)
    torch.testing.assert_close(program.module()(images().double()), logits(model))


def test_profile_counts_the_products_of_the_blur() -> None:
    plain, blurred = (profile(build(blurpool=blurpool), 32) for blurpool in (False, True))
    # Nine for each pixel that the two convolutions of stride 2 read.
    products = 9 * (16 * 32 * 32 + 32 * 16 * 16)
    for count in ("macs", "executed_macs", "nominal_macs", "kept_macs"):
        assert getattr(blurred, count) - getattr(plain, count) == products
    assert blurred.parameters == plain.parameters
    assert blurred.stored_bytes == plain.stored_bytes


def test_filter_is_a_constant_that_has_its_values_always() -> None:
    model = build()
    filters = [name for name in constant_buffers(model) if name.endswith("blur.filter")]
    assert filters == ["layer2.0.conv1.blur.filter", "layer3.0.conv1.blur.filter"]
    expected = model.get_buffer(filters[0]).clone()
    model.to("meta").to_empty(device="cpu")
    assert torch.equal(model.get_buffer(filters[0]), expected)
    assert expected.sum() == 1


def test_unpickled_layer_keeps_its_blur_when_others_add_hooks() -> None:
    pickled = pickle.dumps(build())
    taken, RemovableHandle.next_id = RemovableHandle.next_id, 0  # as in a new process
    try:
        layer = pickle.loads(pickled).layer2[0].conv1
        for _ in range(taken):
            layer.register_forward_pre_hook(lambda module, arguments: None)
    finally:
        RemovableHandle.next_id = max(taken, RemovableHandle.next_id)
    calls: list[Tensor] = []
    layer.blur.register_forward_hook(lambda module, arguments, output: calls.append(output))
    layer(torch.randn(1, 16, 8, 8))
    assert len(calls) == 1


def test_what_cannot_be_blurred_is_refused_in_one_line() -> None:
    skips_nothing = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3))
    with pytest.raises(ModelError, match="finds no layer of Sequential to change"):
        add_blurpool(skips_nothing)
    with pytest.raises(ModelError, match=r"layer2\.0\.conv1 of CifarResNet blurs already"):
        add_blurpool(build())
    for method in ("binary(placement=activation)", "binary(placement=activation, order=CBAP)"):
        backbone = "lenet5" if "order" in method else "resnet20"
        with pytest.raises(ModelError, match="would average quantized activations"):
            build(method, backbone)
