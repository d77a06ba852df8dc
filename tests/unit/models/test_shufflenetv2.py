from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import (
    ShuffleNet_V2_X0_5_Weights,
    ShuffleNet_V2_X1_0_Weights,
    ShuffleNet_V2_X1_5_Weights,
    ShuffleNet_V2_X2_0_Weights,
)

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters

PUBLISHED = {
    "0.5": ShuffleNet_V2_X0_5_Weights.DEFAULT.meta,
    "1": ShuffleNet_V2_X1_0_Weights.DEFAULT.meta,
    "1.5": ShuffleNet_V2_X1_5_Weights.DEFAULT.meta,
    "2": ShuffleNet_V2_X2_0_Weights.DEFAULT.meta,
}


@pytest.mark.parametrize("width", PUBLISHED)
def test_the_imagenet_forms_have_the_counts_that_torchvision_publishes(width: str) -> None:
    model = on_meta(f"shufflenetv2(width={width})", num_classes=1000, image_size=224)
    assert parameters(model) == PUBLISHED[width]["num_params"]
    assert macs(model, 224) / 1e9 == pytest.approx(PUBLISHED[width]["_ops"], abs=0.0006)


def test_the_small_form_has_the_published_counts() -> None:
    assert parameters(on_meta("shufflenetv2", num_classes=100)) == 1_360_896
    assert parameters(on_meta("shufflenetv2")) == 1_268_646
    assert macs(on_meta("shufflenetv2"), 32) / 1e6 == pytest.approx(43.6, abs=0.05)


def test_torchvision_weights_load_strictly_and_give_its_logits() -> None:
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=5).eval()
    ours = create_model("shufflenetv2(width=0.5)", num_classes=5, image_size=96).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
def test_three_units_have_a_convolved_shortcut(form: str) -> None:
    layers = weight_layers(on_meta(f"shufflenetv2(form={form})"))
    shortcuts = Counter(layer.shape for layer in layers if layer.part == "shortcut")
    assert shortcuts == {"depthwise": 3, "pointwise": 3}
    assert layers[0].part == "stem"
    assert layers[-1].part == "head"


@pytest.mark.parametrize(
    ("image_size", "sides"), [(32, [32, 16, 8, 4]), (64, [64, 32, 16, 8]), (33, [33, 17, 9, 5])]
)
def test_map_sizes_and_channels_of_the_small_form(image_size: int, sides: list[int]) -> None:
    shapes = output_shapes(on_meta("shufflenetv2", image_size=image_size), image_size)
    stages = [shapes[name] for name in ("conv1", "layers.3", "layers.11", "layers.15")]
    assert [channels for channels, _, _ in stages] == [24, 116, 232, 464]
    assert [side for _, side, _ in stages] == sides


def test_a_unit_keeps_the_first_half_and_interleaves_it_with_the_branch() -> None:
    model = create_model("shufflenetv2", num_classes=3, image_size=32).eval()
    unit = model.get_submodule("layers.1")
    x = torch.randn(2, 116, 4, 4)
    with torch.no_grad():
        output = unit(x)
        assert torch.equal(output[:, 0::2], x[:, :58])
        assert torch.equal(output[:, 1::2], unit.get_submodule("branch")(x[:, 58:]))


def test_the_small_stem_has_no_activation() -> None:
    model = create_model("shufflenetv2", num_classes=3, image_size=32).eval()
    first = model.get_submodule("layers.0")
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert seen[0].min() < 0


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
@pytest.mark.parametrize("width", PUBLISHED)
def test_any_image_gives_one_logit_per_class(form: str, width: str) -> None:
    model = create_model(
        f"shufflenetv2(form={form}, width={width})", num_classes=7, in_channels=1, image_size=9
    )
    assert isinstance(model, nn.Module)
    assert model(torch.randn(2, 1, 9, 9)).shape == (2, 7)


def test_widths_that_the_paper_does_not_have_are_refused() -> None:
    with pytest.raises(ModelError, match=r"width is 0\.5, 1, 1\.5 or 2, not 0\.75"):
        on_meta("shufflenetv2(width=0.75)")
