from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models import ModelError, apply_method, create_model, fold, fold_periodic
from models.layers import CompressedConv2d
from models.periodic import PeriodicConv2d


def masked_layer(layer: nn.Conv2d, method: str) -> CompressedConv2d:
    model = apply_method(nn.Sequential(nn.Conv2d(1, layer.in_channels, 1), layer), method)
    masked = model.get_submodule("1")
    assert isinstance(masked, CompressedConv2d)
    return masked


@pytest.mark.parametrize(
    "method",
    [
        "sparse-psd2p8",
        "sparse-psd4p16",
        "sparse-ps1p9",
        "sparse-ps2p6+ternary",
        "sparse+ternary(expansion=4, original=true)",  # adds the bias four times
    ],
)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.Conv2d(10, 23, 3, stride=2, padding=1),
        nn.Conv2d(3, 18, 3, padding=(0, 2), dilation=2),
        nn.Conv2d(5, 40, 5, stride=(1, 2)),
    ],
)
@pytest.mark.parametrize("images", [1, 3])
def test_small_products_are_the_masked_convolution_in_value_and_gradient(
    method: str, layer: nn.Conv2d, images: int
) -> None:
    masked = masked_layer(layer.double(), method)
    assert masked.mask is not None
    periodic = PeriodicConv2d(masked, masked.mask)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(
        images, layer.in_channels, 7, 6, generator=generator, dtype=torch.float64
    ).requires_grad_()
    expected = masked(inputs)
    output = periodic(inputs)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(output, inputs, upstream)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(ours, theirs)


def test_as_many_weights_are_multiplied_as_the_mask_keeps() -> None:
    masked = masked_layer(nn.Conv2d(32, 64, 3), "sparse-psd2p8")
    assert masked.mask is not None
    assert (
        PeriodicConv2d(masked, masked.mask).weights.numel() == masked.mask.kept == 64 * 32 * 2.875
    )


def test_a_network_folded_for_its_images_has_the_outputs_of_the_folded_one() -> None:
    model = create_model("resnet20", "sparse-ps1p9+ternary", num_classes=10, image_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    fast = fold_periodic(model, images)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), fold(model)(images), rtol=1e-4, atol=1e-4)
    kinds = {type(module) for module in fast.modules()}
    assert CompressedConv2d not in kinds


def test_a_random_mask_has_no_products_to_share() -> None:
    model = apply_method(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "sparse-psc1")
    fast = fold_periodic(model, torch.randn(1, 3, 8, 8))
    assert {type(layer) for layer in fast.children()} == {nn.Conv2d}


def test_layers_that_are_shared_or_never_called_are_folded_too() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.idle = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.body = nn.Conv2d(16, 16, 3, stride=2)
            self.again = self.body

        def forward(self, images: Tensor) -> Tensor:
            return self.again(self.body(self.stem(images)))

    model = apply_method(Network(), "sparse-ps1p9").eval()
    images = torch.randn(1, 3, 24, 24)
    fast = fold_periodic(model, images)
    assert type(fast.idle) is nn.Conv2d
    assert fast.again is fast.body
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-4)


def test_other_devices_than_the_cpu_are_refused() -> None:
    with pytest.raises(ModelError, match="for inference on the CPU"):
        fold_periodic(nn.Conv2d(3, 8, 3, device="meta"), torch.randn(1, 3, 8, 8))
