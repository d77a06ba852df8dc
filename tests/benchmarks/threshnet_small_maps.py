"""What the centre tap saves: ThreshNet79 at 32 pixels, trimmed 3x3 convolutions against plain ones.

Its last harmonic block works on maps of one pixel, where a 3x3 kernel is its centre tap: 9 % of the
network's operations by the usual count, of which a ninth has an effect. Measured are the network
and that block alone, in training (forward, backward, Adam) and inference. Both sides hold the same
weights and take turns, so that a noisy machine disturbs them alike; each is judged by the better of
two memory layouts. On a CPU it is the processor time of one thread.

    python tests/benchmarks/threshnet_small_maps.py
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

import models
from models.backbones.harmonic import HarmonicBlock
from pipeline.loop import channels_last

BATCH = 64
IMAGE_SIZE = 32
ROUNDS = 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def training_step(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step


def inference(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    model.eval()

    @torch.inference_mode()
    def classify() -> None:
        model(inputs)

    return classify


def now() -> float:
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work: dict[tuple[str, str], Callable[[], None]]) -> dict[tuple[str, str], float]:
    """Run all kinds of work in turn, `ROUNDS` times after a warm-up, and return their medians."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    for _ in range(1 + ROUNDS):
        for name, run in work.items():
            started = now()
            run()
            seconds[name].append(now() - started)
    return {name: statistics.median(rounds[1:]) for name, rounds in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    network = models.create_model("threshnet79", num_classes=10, image_size=IMAGE_SIZE).to(DEVICE)
    images = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE)
    block = [module for module in network.modules() if isinstance(module, HarmonicBlock)][-1]
    channels = next(block.parameters()).shape[1]
    maps = torch.randn(BATCH, channels, 1, 1, device=DEVICE)
    console = Console()
    console.print(f"threshnet79, {IMAGE_SIZE} pixels, batch {BATCH}, {DEVICE}, {ROUNDS} rounds")
    for subject, model, inputs in (("network", network, images), ("last block", block, maps)):
        sides = {"trimmed": model, "plain": models.fold(model)}
        for prepare in (training_step, inference):
            work = {}
            for side, form in sides.items():
                work[side, "contiguous"] = prepare(copy.deepcopy(form), inputs)
                work[side, "channels last"] = prepare(
                    channels_last(copy.deepcopy(form)),
                    inputs.contiguous(memory_format=torch.channels_last),
                )
            medians = median_seconds(work)
            best = {
                side: min(
                    (seconds, layout) for (of, layout), seconds in medians.items() if of == side
                )
                for side in sides
            }
            console.print(f"  {subject}, {prepare.__name__.replace('_', ' ')}")
            for side, (seconds, layout) in best.items():
                console.print(f"    {side:<8} {1e3 * seconds:8.1f} ms, {layout}")
            console.print(f"    trimmed over plain {best['trimmed'][0] / best['plain'][0]:.3f}")


if __name__ == "__main__":
    main()
