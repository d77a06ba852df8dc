from __future__ import annotations

import pytest
import torch
from torch import nn

from models import ModelError, create_model
from models.backbones.shufflenet import ChannelShuffle
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters


@pytest.mark.parametrize(
    ("options", "published"),
    [
        # osmr/imgclsmob's counts of its ShuffleNets.
        ("groups=1", 1_531_936),
        ("groups=2", 1_733_848),
        ("groups=3", 1_865_728),
        ("groups=4", 1_968_344),
        ("groups=8", 2_434_768),
        ("groups=3, width=0.25", 305_902),
        ("groups=3, width=0.5", 718_324),
        ("groups=3, width=0.75", 1_238_266),
        ("groups=1, width=0.5", 534_484),
        ("groups=1, width=0.75", 975_214),
    ],
)
def test_published_parameter_counts_for_imagenet(options: str, published: int) -> None:
    model = on_meta(f"shufflenet({options})", num_classes=1000, image_size=224)
    assert parameters(model) == published


@pytest.mark.parametrize(
    ("options", "published_millions"),
    [
        ("groups=1", 143),
        ("groups=2", 140),
        ("groups=3", 137),
        ("groups=4", 133),
        ("groups=8", 137),
        ("groups=3, width=0.5", 38),
        ("groups=8, width=0.5", 40),
        ("groups=3, width=2", 524),
    ],
)
def test_the_complexity_is_near_that_of_the_paper(options: str, published_millions: int) -> None:
    model = on_meta(f"shufflenet({options})", num_classes=1000, image_size=224)
    assert macs(model, 224) / 1e6 == pytest.approx(published_millions, rel=0.015)


def test_the_small_form_has_the_published_counts() -> None:
    model = on_meta("shufflenet", num_classes=100)
    assert parameters(model) == 1_012_108
    assert macs(model, 32) / 1e6 == pytest.approx(41.7, abs=0.05)


@pytest.mark.parametrize(
    ("image_size", "sides"), [(224, [112, 28, 14, 7]), (32, [32, 16, 8, 4]), (33, [33, 17, 9, 5])]
)
def test_map_sizes_and_channels(image_size: int, sides: list[int]) -> None:
    shapes = output_shapes(on_meta("shufflenet", image_size=image_size), image_size)
    stages = [shapes[name] for name in ("conv1", "layers.3", "layers.11", "layers.15")]
    assert [channels for channels, _, _ in stages] == [24, 240, 480, 960]
    assert [side for _, side, _ in stages] == sides


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_the_shuffle_deals_the_channels_of_each_group_in_turn(groups: int) -> None:
    shuffle = ChannelShuffle(groups)
    x = torch.arange(12.0).view(1, 12, 1, 1).expand(2, 12, 3, 2)
    dealt = [
        group * (12 // groups) + place for place in range(12 // groups) for group in range(groups)
    ]
    for layout in (torch.contiguous_format, torch.channels_last):
        assert shuffle(x.contiguous(memory_format=layout))[0, :, 0, 0].tolist() == dealt


def test_only_the_first_layer_of_the_imagenet_form_has_no_groups() -> None:
    for image_size, first in ((224, 1), (32, 3)):
        pointwise = [
            layer.module
            for layer in weight_layers(on_meta("shufflenet", image_size=image_size))
            if layer.shape == "pointwise"
        ]
        assert [m.groups for m in pointwise if isinstance(m, nn.Conv2d)] == [first] + [3] * 31


def test_a_unit_of_stride_two_joins_the_averaged_input_and_others_add_theirs() -> None:
    model = create_model("shufflenet", num_classes=3, image_size=32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.zeros_(parameter)
    x = torch.rand(1, 24, 8, 8)
    with torch.no_grad():
        output = model.get_submodule("layers.0")(x)
        average = nn.functional.avg_pool2d(x, 3, stride=2, padding=1)
        assert torch.equal(output[:, :24], average)
        assert output[:, 24:].count_nonzero() == 0
        assert torch.equal(model.get_submodule("layers.1")(output), output)


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("in_channels", "num_classes", "image_size"), [(1, 7, 33)])
def test_any_image_gives_one_logit_per_class(
    form: str, groups: int, in_channels: int, num_classes: int, image_size: int
) -> None:
    model = create_model(
        f"shufflenet(form={form}, groups={groups})",
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
    )
    images = torch.randn(2, in_channels, image_size, image_size)
    assert model(images).shape == (2, num_classes)


def test_widths_that_the_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ModelError, match="stage 2 74 channels, but with groups=3 they must be"):
        on_meta("shufflenet(width=0.31, groups=3)")
