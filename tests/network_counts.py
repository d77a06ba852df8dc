"""Counts of a network that do not use our profiler, and networks without memory to take them of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model


def on_meta(
    backbone: str, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32
) -> nn.Module:
    """Build a network on the meta device, where weights have shapes and no values."""
    with torch.device("meta"):
        return create_model(
            backbone, num_classes=num_classes, in_channels=in_channels, image_size=image_size
        ).eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, image_size: int, in_channels: int = 3) -> int:
    """Multiply-accumulates of a meta network for one image, by torch's own counter."""
    return sum(macs_by_module(model, image_size, in_channels).values())


def macs_by_module(model: nn.Module, image_size: int, in_channels: int = 3) -> dict[str, int]:
    """Multiply-accumulates of each module that computes by itself, by torch's own counter."""
    names = {
        f"{type(model).__name__}.{name}": name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, in_channels, image_size, image_size, device="meta"))
    counted = {
        names[key]: sum(flops.values()) // 2
        for key, flops in counter.get_flop_counts().items()
        if key in names
    }
    assert 2 * sum(counted.values()) == counter.get_total_flops()
    return counted


def output_shapes(model: nn.Module, image_size: int, in_channels: int = 3) -> dict[str, list[int]]:
    """Shape, without the batch, of every module's output for one image on the meta device."""
    shapes: dict[str, list[int]] = {}

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shapes[name] = list(output.shape[1:])

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        model(torch.empty(1, in_channels, image_size, image_size, device="meta"))
    return shapes
