from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import SqueezeNet1_0_Weights, SqueezeNet1_1_Weights

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters

PUBLISHED = {
    "squeezenet": SqueezeNet1_1_Weights.DEFAULT.meta,
    "squeezenet(version=1.0)": SqueezeNet1_0_Weights.DEFAULT.meta,
}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_the_imagenet_forms_have_the_counts_that_torchvision_publishes(backbone: str) -> None:
    model = on_meta(backbone, num_classes=1000, image_size=224)
    assert parameters(model) == PUBLISHED[backbone]["num_params"]
    assert macs(model, 224) / 1e9 == pytest.approx(PUBLISHED[backbone]["_ops"], abs=0.0005)


def test_the_small_form_has_the_published_counts() -> None:
    assert parameters(on_meta("squeezenet", num_classes=100)) == 781_156
    assert parameters(on_meta("squeezenet")) == 734_986
    assert macs(on_meta("squeezenet"), 32) / 1e6 == pytest.approx(52.5, abs=0.05)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_torchvision_weights_load_strictly_and_give_its_logits(version: str) -> None:
    name = f"squeezenet{version.replace('.', '_')}"
    theirs = torchvision.models.get_model(name, num_classes=5).eval()
    ours = create_model(f"squeezenet(version={version})", num_classes=5, image_size=96).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
def test_the_spatial_layers_of_the_fires_are_bottlenecks(form: str) -> None:
    layers = weight_layers(on_meta(f"squeezenet(form={form})"))
    parts = Counter((layer.part, layer.shape) for layer in layers)
    assert parts == {
        ("stem", "spatial"): 1,
        ("body", "pointwise"): 16,
        ("bottleneck", "spatial"): 8,
        ("head", "pointwise"): 1,
    }


def test_fires_3_5_and_7_add_their_input() -> None:
    model = create_model("squeezenet", num_classes=3, image_size=32).eval()
    received: dict[str, torch.Tensor] = {}
    returned: dict[str, torch.Tensor] = {}

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            received[name], returned[name] = inputs[0], output

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    for fire, follower in (("fire3", "fire4"), ("fire5", "fire6"), ("fire7", "fire8")):
        assert torch.equal(received[follower], returned[fire] + received[fire])
    assert torch.equal(received["fire3"], returned["fire2"])
    assert torch.equal(received["fire7"], returned["fire6"])


def test_map_sizes_at_32_pixels() -> None:
    shapes = output_shapes(on_meta("squeezenet"), 32)
    assert [shapes[f"fire{n}"] for n in (2, 4, 5, 8, 9)] == [
        [128, 16, 16],
        [256, 16, 16],
        [256, 8, 8],
        [512, 8, 8],
        [512, 4, 4],
    ]


@pytest.mark.parametrize(
    ("backbone", "smallest"),
    [
        ("squeezenet(form=cifar)", 8),
        ("squeezenet(form=imagenet)", 17),
        ("squeezenet(form=imagenet, version=1.0)", 21),
    ],
)
def test_the_smallest_image_leaves_one_pixel_and_smaller_ones_are_refused(
    backbone: str, smallest: int
) -> None:
    model = create_model(backbone, num_classes=7, in_channels=1, image_size=smallest)
    assert model(torch.randn(2, 1, smallest, smallest)).shape == (2, 7)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 1, smallest - 1, smallest - 1))
    with pytest.raises(ModelError, match=f"at least {smallest} pixels, not {smallest - 1}"):
        create_model(backbone, num_classes=7, image_size=smallest - 1)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("squeezenet(version=1.2)", "version is 1.0 or 1.1, not 1.2"),
        ("squeezenet(version=1.0)", "version belongs to form=imagenet"),
    ],
)
def test_versions_that_do_not_exist_are_refused(backbone: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        on_meta(backbone)
