"""The rules of torchstat one by one; test_profiler.py has whole networks against its tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import profile
from models.torchstat import Torchstat, count_call

ELEMENTS = 4 * 6 * 6
POOLED = 4 * 3 * 3


@pytest.mark.parametrize(
    ("module", "flops", "madd", "given", "traffic"),
    [
        (nn.Conv2d(4, 8, 3, bias=False), 4608, 2 * 4608 - 128, 128, ELEMENTS + 288 + 128),
        (nn.Conv2d(4, 8, 3), 4608 + 128, 2 * 4608, 128, ELEMENTS + 296 + 128),
        (nn.Conv2d(4, 8, 3, groups=4), 1152 + 128, 2 * 1152, 128, ELEMENTS + 80 + 128),
        (nn.BatchNorm2d(4), 2 * ELEMENTS, 4 * ELEMENTS, ELEMENTS, 2 * ELEMENTS + 8),
        (nn.BatchNorm2d(4, affine=False), ELEMENTS, 4 * ELEMENTS, ELEMENTS, 2 * ELEMENTS + 8),
        (nn.ReLU(), ELEMENTS, ELEMENTS, ELEMENTS, 2 * ELEMENTS),
        (nn.ReLU6(), ELEMENTS, ELEMENTS, ELEMENTS, 2 * ELEMENTS),
        (nn.LeakyReLU(), ELEMENTS, 0, ELEMENTS, 2 * ELEMENTS),
        (nn.PReLU(), ELEMENTS, 0, ELEMENTS, 2 * ELEMENTS + 1),
        (nn.MaxPool2d(2), ELEMENTS, 3 * POOLED, POOLED, ELEMENTS + POOLED),
        (nn.MaxPool2d((3, 1), (2, 2), (1, 0)), ELEMENTS, 2 * POOLED, POOLED, ELEMENTS + POOLED),
        (nn.AvgPool2d(2), ELEMENTS, 4 * POOLED, POOLED, ELEMENTS + POOLED),
        (nn.Upsample(scale_factor=2), 4 * ELEMENTS, 0, 4 * ELEMENTS, 0),
        (nn.AdaptiveAvgPool2d(1), 0, 0, 4, 0),
        (nn.SiLU(), 0, 0, ELEMENTS, 0),
    ],
    ids=str,
)
def test_a_module_counts_by_its_rule(
    module: nn.Module, flops: int, madd: int, given: int, traffic: int
) -> None:
    images = torch.zeros(1, 4, 6, 6)
    assert count_call(module, images, module(images)) == Torchstat(
        flops, madd, 4 * given, 4 * traffic
    )


def test_a_linear_layer_counts_its_bias_as_memory_only() -> None:
    layer, features = nn.Linear(10, 3), torch.zeros(1, 10)
    assert count_call(layer, features, layer(features)) == Torchstat(30, 57, 12, 4 * (10 + 33 + 3))


def test_a_module_that_is_called_twice_counts_with_its_last_call() -> None:
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.Conv2d(8, 2, 1), shared)
    last = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Identity(), nn.Conv2d(8, 2, 1), nn.ReLU())
    identity = Torchstat(memory_bytes=4 * 8 * 16)
    assert profile(twice, 4).torchstat + identity == profile(last, 4).torchstat
