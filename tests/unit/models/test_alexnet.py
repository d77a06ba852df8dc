from __future__ import annotations

import math

import pytest
import torch

from models import ModelError, create_model
from models.surgery import weight_layers
from tests.network_counts import macs, macs_by_module, on_meta, output_shapes, parameters

#: Name, weights and map size of each layer for 224 pixels and 1000 classes, as published.
LAYERS = [
    ("features.0", 34_848, 55),
    ("features.4", 614_400, 27),
    ("features.8", 884_736, 13),
    ("features.11", 1_327_104, 13),
    ("features.14", 884_736, 13),
    ("classifier.0", 37_748_736, 1),
    ("classifier.3", 16_777_216, 1),
    ("classifier.6", 4_096_000, 1),
]


def test_layers_weights_maps_and_macs_are_the_published_ones() -> None:
    model = on_meta("alexnet", num_classes=1000, image_size=224)
    assert parameters(model) == 62_387_912
    weights = {layer.name: layer.module.weight.numel() for layer in weight_layers(model)}
    assert weights == {name: count for name, count, _ in LAYERS}
    assert macs(model, 224) == 1_135_256_096
    assert macs_by_module(model, 224) == {name: count * side**2 for name, count, side in LAYERS}


def test_pools_halve_the_maps_to_six_by_six() -> None:
    shapes = output_shapes(on_meta("alexnet", image_size=224), 224)
    pools = [shapes[f"features.{index}"] for index in (3, 7, 17)]
    assert pools == [[96, 27, 27], [256, 13, 13], [256, 6, 6]]


def test_the_ends_stay_float_in_the_papers_first_variant() -> None:
    layers = weight_layers(on_meta("alexnet", num_classes=1000, image_size=224))
    body = [layer for layer in layers if layer.part == "body"]
    assert len(body) == 6
    assert sum(layer.module.weight.numel() for layer in body) == 58_236_928


def test_only_the_last_layer_has_a_bias() -> None:
    layers = weight_layers(on_meta("alexnet", image_size=64))
    assert [layer.name for layer in layers if layer.module.bias is not None] == ["classifier.6"]


def test_weights_start_he_normal() -> None:
    model = create_model("alexnet", num_classes=50, image_size=63)
    weight = model.get_parameter("features.4.weight")  # (256, 96, 5, 5): fan out
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (25 * 256)), rel=0.01)
    weight = model.get_parameter("classifier.0.weight")  # (4096, 256): fan in
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.01)
    assert model.get_parameter("classifier.6.bias").count_nonzero() == 0


@pytest.mark.parametrize("image_size", [63, 64, 94, 95, 127, 224, 227])
def test_any_image_from_63_pixels_gives_one_logit_per_class(image_size: int) -> None:
    model = on_meta("alexnet", num_classes=7, in_channels=1, image_size=image_size)
    logits = model(torch.empty(2, 1, image_size, image_size, device="meta"))
    assert logits.shape == (2, 7)


def test_smaller_images_are_refused() -> None:
    with pytest.raises(ModelError, match="at least 63 pixels, not 62"):
        on_meta("alexnet", image_size=62)
