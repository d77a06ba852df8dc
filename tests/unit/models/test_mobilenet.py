from __future__ import annotations

import pytest
import torch

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, on_meta, output_shapes, parameters


@pytest.mark.parametrize(
    ("backbone", "published"),
    [
        # osmr/imgclsmob counts the same networks.
        ("mobilenet", 4_231_976),
        ("mobilenet(width=0.75)", 2_585_560),
        ("mobilenet(width=0.5)", 1_331_592),
        ("mobilenet(width=0.25)", 470_072),
    ],
)
def test_published_parameter_counts_for_imagenet(backbone: str, published: int) -> None:
    assert parameters(on_meta(backbone, num_classes=1000, image_size=224)) == published


@pytest.mark.parametrize(
    ("backbone", "published_millions"),
    [
        ("mobilenet", 569),
        ("mobilenet(width=0.75)", 325),
        ("mobilenet(width=0.5)", 149),
        ("mobilenet(width=0.25)", 41),
    ],
)
def test_macs_are_those_of_the_paper(backbone: str, published_millions: int) -> None:
    model = on_meta(backbone, num_classes=1000, image_size=224)
    assert macs(model, 224) / 1e6 == pytest.approx(published_millions, abs=0.6)


def test_the_small_form_has_the_published_counts() -> None:
    assert parameters(on_meta("mobilenet", num_classes=100)) == 3_315_428
    assert parameters(on_meta("mobilenet")) == 3_223_178
    assert macs(on_meta("mobilenet"), 32) / 1e6 == pytest.approx(46.4, abs=0.05)


@pytest.mark.parametrize(
    ("image_size", "sides"),
    [(224, [112, 56, 28, 14, 7]), (32, [32, 16, 8, 4, 2])],
)
def test_map_sizes(image_size: int, sides: list[int]) -> None:
    shapes = output_shapes(on_meta("mobilenet", image_size=image_size), image_size)
    assert [shapes[f"layers.{layer}"][1] for layer in (0, 2, 4, 10, 12)] == sides


def test_depthwise_and_pointwise_layers_alternate() -> None:
    stem, *layers, head = weight_layers(on_meta("mobilenet"))
    assert (stem.part, stem.shape) == ("stem", "spatial")
    assert (head.part, head.shape) == ("head", "linear")
    assert [layer.shape for layer in layers] == ["depthwise", "pointwise"] * 13
    assert {layer.part for layer in layers} == {"body"}


@pytest.mark.parametrize("form", ["imagenet", "cifar"])
@pytest.mark.parametrize(("in_channels", "num_classes", "image_size"), [(1, 7, 33), (4, 3, 8)])
def test_any_image_gives_one_logit_per_class(
    form: str, in_channels: int, num_classes: int, image_size: int
) -> None:
    model = create_model(
        f"mobilenet(form={form}, width=0.25)",
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
    )
    images = torch.randn(2, in_channels, image_size, image_size)
    assert model(images).shape == (2, num_classes)


def test_a_width_that_leaves_no_channel_is_refused() -> None:
    with pytest.raises(ModelError, match="width must be at least 1/32"):
        on_meta("mobilenet(width=0.01)")
