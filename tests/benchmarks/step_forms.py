"""The frozen layers of STeP as they are computed, against the original's form of two branches.

The original convolves with the LBP and with the Haar patterns, and joins the maps. Each distinct
layer of the paper's networks is timed in both forms and both memory layouts; the rounds are
interleaved, so that a noisy machine disturbs them alike; on a CPU it is the processor time of one
thread. A ratio below 1 is a gain. `forward` is without gradients, `training` forward and backward,
`folded` the plain convolutions of models.fold against the two branches without gradients.

    python tests/benchmarks/step_forms.py
    python tests/benchmarks/step_forms.py --device cuda --dtype bfloat16 --batch 256
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from models import create_model
from models.methods.step import StructuredTernaryPatterns
from models.pattern_layers import FrozenConv2d, MixedConv2d

NETWORKS = ("vgg16", "resnet50", "mobilenetv2", "stepnet")
IMAGE = 32
Layer = MixedConv2d | FrozenConv2d
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


class TwoBranches(nn.Module):
    """The original's form of a layer, with the same patterns."""

    lbp: Tensor
    haar: Tensor

    def __init__(self, bank: FrozenConv2d, mix: nn.Module) -> None:
        super().__init__()
        self.bank = bank
        half = (bank.out_channels + 1) // 2
        paired = bank.groups > 1
        self.register_buffer("lbp", bank.weight[0::2] if paired else bank.weight[:half])
        self.register_buffer("haar", bank.weight[1::2] if paired else bank.weight[half:])
        self.mix = mix

    def forward(self, images: Tensor) -> Tensor:
        bank = self.bank
        maps = [
            functional.conv2d(images, w, None, bank.stride, bank.padding, groups=bank.groups)
            for w in (self.lbp, self.haar)
        ]
        mixed: Tensor = self.mix(torch.cat(maps, dim=1))
        return mixed


@dataclass
class Case:
    """A distinct layer: how often a network has it, the shape of its input, and its forms."""

    shape: torch.Size
    ours: nn.Module
    two_branches: nn.Module
    folded: nn.Module
    count: int = 1


def cases(backbone: str, batch: int) -> dict[str, Case]:
    """The distinct layers of a network with patterns of both kinds."""
    model = create_model(backbone, "step", num_classes=10, image_size=IMAGE)
    found: dict[str, Case] = {}

    def record(layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        bank = layer.bank if isinstance(layer, MixedConv2d) else layer
        assert isinstance(bank, FrozenConv2d)
        if bank.weight_storage().scheme != "patterns":
            return  # a frozen projection
        if bank is layer and bank.in_channels == 3:
            return  # the stem of ResNet-50, which has Haar patterns alone
        mix = layer.mix if isinstance(layer, MixedConv2d) else nn.Identity()
        shape = inputs[0].shape
        size, kernel = "x".join(map(str, shape[1:])), bank.kernel_size[0]
        groups = f" groups {bank.groups}" if bank.groups > 1 else ""
        name = f"{size} -> {output.shape[1]}, {kernel}x{kernel} stride {bank.stride[0]}{groups}"
        if name in found:
            found[name].count += 1
        else:
            forms = (layer, TwoBranches(bank, mix), layer.folded())
            found[name] = Case(torch.Size((batch, *shape[1:])), *forms)

    mixed = {module.bank for module in model.modules() if isinstance(module, MixedConv2d)}
    for module in model.modules():
        if isinstance(module, Layer) and module not in mixed:
            module.register_forward_hook(record)
    model(torch.randn(2, 3, IMAGE, IMAGE))
    for module in model.modules():
        module._forward_hooks.clear()
    return found


def forward(module: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        module(images)


def training(module: nn.Module, images: Tensor) -> None:
    output = module(images)
    output.backward(output.detach())


def ratio(
    run: Callable[[nn.Module, Tensor], None],
    ours: nn.Module,
    reference: nn.Module,
    images: Tensor,
    rounds: int,
) -> float:
    """Median time of our form over that of the reference, in interleaved rounds."""
    clock = time.perf_counter if images.is_cuda else time.process_time
    times: dict[nn.Module, list[float]] = {ours: [], reference: []}
    for round_number in range(rounds + 1):
        for module, taken in times.items():
            synchronize(images)
            started = clock()
            run(module, images)
            synchronize(images)
            if round_number:  # the first is a warm-up
                taken.append(clock() - started)
    return statistics.median(times[ours]) / statistics.median(times[reference])


def build_seconds(backbone: str, mode: Literal["fixed", "original"]) -> float:
    """How long it takes to put the banks into a network."""
    model = create_model(backbone, num_classes=10, image_size=IMAGE)
    started = time.perf_counter()
    StructuredTernaryPatterns(mode=mode).apply(model)
    return time.perf_counter() - started


def gains_of(case: Case, rounds: int, device: str, dtype: torch.dtype) -> list[float]:
    """The ratios of a layer: forward, training and folded, each in both layouts."""
    gains = []
    for run, ours in ((forward, case.ours), (training, case.ours), (forward, case.folded)):
        for layout in LAYOUTS.values():
            images = torch.randn(case.shape).to(device, dtype).contiguous(memory_format=layout)
            for form in (ours, case.two_branches):
                for tensor in (*form.parameters(), *form.buffers()):
                    if tensor.ndim == 4:
                        tensor.data = tensor.data.contiguous(memory_format=layout)
            images.requires_grad_(case.shape[1] != 3)  # nobody asks for the gradient of an image
            gains.append(ratio(run, ours, case.two_branches, images, rounds))
    return gains


def synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for network in options.networks:
        title = f"{network}, {IMAGE} px, batch {options.batch}: time over that of two branches"
        table = Table(title=title)
        table.add_column("layer", no_wrap=True)
        table.add_column("times", justify="right")
        for column in ("forward", "training", "folded"):
            for layout in LAYOUTS:
                table.add_column(f"{column} {layout}", justify="right")
        for name, case in cases(network, options.batch).items():
            for form in (case.ours, case.two_branches, case.folded):
                form.to(options.device, getattr(torch, options.dtype))
            gains = gains_of(case, options.rounds, options.device, getattr(torch, options.dtype))
            table.add_row(name, str(case.count), *(f"{gain:.2f}" for gain in gains))
        seconds = [build_seconds(network, mode) for mode in ("fixed", "original")]
        table.caption = f"banks built in {seconds[0]:.2f} s, as the original in {seconds[1]:.2f} s"
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
