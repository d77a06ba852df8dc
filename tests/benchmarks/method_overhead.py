"""What a method costs in training: a step of ResNet-18 under it over a step of the float network.

All networks take turns in every round, so that a noisy machine disturbs them alike. Each is
measured in both memory layouts and judged by its better one. A step is forward, backward, SGD with
Nesterov momentum, and what the method does after it. The last table counts the tensor operations
that one weight adds to a step; on a GPU each is a kernel launch. On a GPU the steps also run in a
mode in which any synchronization with the host is an error, and ResNet-50 is measured at 224
pixels.

    PYTHONPATH=. python tests/benchmarks/method_overhead.py
    PYTHONPATH=. python tests/benchmarks/method_overhead.py --batch 256 --bfloat16 --compile
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import apply_method
from models.layers import CompressedLayer
from models.surgery import Part, after_step

# A method, and the one that its step is compared with.
COMPARISONS = {
    "ternary": "float",
    "ternary-x4": "ternary",
    "ternary(rule=twn)": "float",
    "ternary(rule=ttq)": "float",
    "sparse-psd2p8": "float",
    "sparse-ps1p9": "float",
    "sparse-psd2p8+ternary": "float",
    "binary(activations=float)": "float",
    "binary-bwn": "float",
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
ROLES: dict[str, Part] = {"conv1": "stem", "fc": "head", "layer*.downsample.0": "shortcut"}
CLASSES = 200


@dataclass(frozen=True)
class Setting:
    """What is measured and how; the methods come on top."""

    network: str
    batch: int
    image_size: int
    rounds: int
    device: str
    bfloat16: bool
    compiled: bool

    @property
    def steps(self) -> int:
        """Steps in a round: a GPU's are short, and one synchronization ends them all."""
        return 10 if self.device == "cuda" else 1


def build(setting: Setting, method: str) -> nn.Module:
    model = torchvision.models.get_model(setting.network, num_classes=CLASSES)
    return apply_method(model, method, roles=ROLES).to(setting.device)


def training_step(setting: Setting, method: str, layout: torch.memory_format) -> Callable[[], None]:
    model = build(setting, method)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    finish = after_step(model)
    forward = torch.compile(model) if setting.compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    shape = (setting.batch, 3, setting.image_size, setting.image_size)
    images = torch.randn(shape, device=setting.device).contiguous(memory_format=layout)
    labels = torch.arange(setting.batch, device=setting.device) % CLASSES

    def step() -> None:
        with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=setting.bfloat16):
            loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish()

    return step


def seconds_per_step(setting: Setting, methods: list[str]) -> dict[str, list[float]]:
    """Return for each method the time of a step in each round, in its better layout."""
    steps = {
        (method, layout): training_step(setting, method, memory_format)
        for method in methods
        for layout, memory_format in LAYOUTS.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step()  # warms up, and compiles
        with no_host_synchronization(setting.device):
            step()
    for _ in range(setting.rounds):
        for key, step in steps.items():
            synchronize(setting.device)
            started = time.perf_counter()
            for _ in range(setting.steps):
                step()
            synchronize(setting.device)
            seconds[key].append((time.perf_counter() - started) / setting.steps)
    return {
        method: min((seconds[method, layout] for layout in LAYOUTS), key=statistics.median)
        for method in methods
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def no_host_synchronization(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class OperationCounter(TorchDispatchMode):
    """Counts the operations that do work: not views, and not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def operations_per_weight(setting: Setting, method: str) -> tuple[int, int]:
    """Return the operations of the used weight of one 3x3 layer, forward and backward."""
    layer = build(setting, method).get_submodule("layer2.0.conv2")
    assert isinstance(layer, CompressedLayer)
    with OperationCounter() as forward:
        weight = layer.used_weight()
    gradient = torch.ones_like(weight)
    with OperationCounter() as backward:
        torch.autograd.grad(weight, list(layer.parameters()), gradient)
    return forward.count, backward.count


def print_steps(setting: Setting, methods: list[str]) -> None:
    seconds = seconds_per_step(setting, methods)
    print(
        f"\n{setting.network}, {setting.image_size} pixels, batch {setting.batch}, "
        f"{setting.device}, {'bfloat16' if setting.bfloat16 else 'float32'}, "
        f"{'compiled' if setting.compiled else 'eager'}, {setting.rounds} rounds"
    )
    print(f"  {'method':<28}{'ms':>8}{'img/s':>10}{'ratio':>8}{'of best':>9}  over")
    for method in methods:
        base = COMPARISONS.get(method, method)
        median, base_median = (statistics.median(seconds[name]) for name in (method, base))
        print(
            f"  {method:<28}{1e3 * median:8.1f}{setting.batch / median:10.1f}"
            f"{median / base_median:8.3f}{min(seconds[method]) / min(seconds[base]):9.3f}  {base}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps under each method over float.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; those of torch unless given")
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--methods", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(
        network="resnet18",
        batch=arguments.batch,
        image_size=arguments.size,
        rounds=arguments.rounds,
        device=device,
        bfloat16=arguments.bfloat16,
        compiled=arguments.compile,
    )
    bases = [COMPARISONS[method] for method in arguments.methods]
    methods = list(dict.fromkeys(["float", *bases, *arguments.methods]))
    print_steps(setting, methods)
    if device == "cuda":
        large = replace(setting, network="resnet50", batch=256, image_size=224, bfloat16=True)
        for compiled in (False, True):
            print_steps(replace(large, compiled=compiled), ["float", "ternary"])
    print(f"\n  {'tensor operations per weight':<36}{'forward':>8}{'backward':>9}")
    for method in arguments.methods:
        forward, backward = operations_per_weight(setting, method)
        print(f"  {method:<36}{forward:8}{backward:9}")


if __name__ == "__main__":
    main()
