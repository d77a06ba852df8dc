"""Measuring how fast a model is here, beside its float twin, by runtime, batch size and threads.

The twin is the same network with float weights. Both are measured in turns, in slices of a few
hundredths of a second, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import models
from models.exporting.int8 import quantize
from models.exporting.onnx_graph import IMAGES, onnx_bytes, onnx_graph, onnx_session, quiet
from pipeline.config import PipelineError
from pipeline.display import Display
from pipeline.use.model import UsableModel
from pipeline.use.speed import COMPILED, EAGER, FLOAT, INT8, RUNTIMES, Benchmark, Cell, Row

if TYPE_CHECKING:
    from onnx import ModelProto

BATCHES = (1, 8, 32)

#: Both sides are measured in turns of so many seconds; a figure takes so many calls at least.
_SLICE, _FEWEST_CALLS = 0.05, 4
_LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

Call = Callable[[], object]


def benchmark(
    model: UsableModel,
    display: Display,
    *,
    batches: Sequence[int] = BATCHES,
    runtimes: Sequence[str] = RUNTIMES,
    seconds: float = 1.0,
) -> Benchmark:
    """Measure a model and its float twin on random images.

    With one thread and with all that torch uses; compiled networks, which take a while to make,
    with all. Where torch finds a GPU, eager and compiled on that too. Eight-bit files are
    calibrated on random images, which is enough for their speed.

    Args:
        seconds: for each figure.

    Raises:
        PipelineError: one line, when no runtime takes the network.
    """
    sides = [_Side(model.network, model.preprocessing.input_shape)]
    method, twin = _float_twin(model)
    if twin is not None:
        sides.append(_Side(twin, model.preprocessing.input_shape))
    taken = [runtime for runtime in runtimes if _translated(sides, runtime, display)]
    cells = list(_cells(batches, taken))
    rows = []
    everything = torch.get_num_threads()
    try:
        for done, (device, threads, batch, runtime) in enumerate(cells):
            text = f"{runtime}, batches of {batch}, {_place(device, threads)}"
            display.progress("measure", done, len(cells), text)
            torch.set_num_threads(threads)
            row = _row(sides, runtime, device, threads, batch, seconds)
            if row is None:
                display.note(f"{text}: torch.compile cannot take the network here")
            else:
                rows.append(row)
    finally:
        torch.set_num_threads(everything)
        display.close_bar()
    if not rows:
        raise PipelineError(f"no runtime here takes {model.origin}")
    twin_macs = None if twin is None else sides[1].macs
    return Benchmark(model.origin, method, sides[0].macs, twin_macs, tuple(rows))


def _float_twin(model: UsableModel) -> tuple[str, nn.Module | None]:
    """The method of a model, and the same network without it; None where it is that itself."""
    blueprint = model.packed.blueprint
    if blueprint is None:
        return "", None
    if blueprint["method"] == "float":
        return "float", None
    twin = models.create_model(**{**blueprint, "method": "float"})
    return blueprint["method"], models.fold(twin).eval()


def _cells(batches: Sequence[int], runtimes: Sequence[str]) -> Iterator[tuple[str, int, int, str]]:
    """What to measure: device, threads, batch, runtime."""
    everything = torch.get_num_threads()
    for threads in sorted({1, everything}):
        of_all = threads == everything
        for batch, runtime in itertools.product(batches, runtimes):
            if of_all or runtime != COMPILED:
                yield "cpu", threads, batch, runtime
    if torch.cuda.is_available():
        for batch, runtime in itertools.product(batches, runtimes):
            if runtime in (EAGER, COMPILED):
                yield "cuda", everything, batch, runtime


def _place(device: str, threads: int) -> str:
    if device != "cpu":
        return "GPU"
    return "1 thread" if threads == 1 else f"{threads} threads"


class _Side:
    """One of the two networks, in the forms that runtimes take."""

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
        self.network = network
        self.image_shape = image_shape
        self.macs = models.profile(network, image_shape[1]).macs
        self._graph: ModelProto | None = None
        self._files: dict[str, bytes] = {}

    def translate(self, runtime: str) -> None:
        """Make the ONNX file of a runtime. Raises ModelError where that cannot be."""
        if self._graph is None:
            self._graph = onnx_graph(self.network, self.image_shape)
        graph = self._graph
        if runtime == INT8:
            graph = quantize(graph, [torch.randn(8, *self.image_shape).numpy()])
        self._files[runtime] = onnx_bytes(graph, {})

    def calls(self, runtime: str, device: str, threads: int, batch: int) -> dict[str, Call]:
        """What computes a batch of random images, by the memory layout that it does it in."""
        images = torch.randn(batch, *self.image_shape, device=device)
        if runtime in self._files:
            session = onnx_session(self._files[runtime], threads)
            feed = {IMAGES: images.numpy()}
            return {"": lambda: session.run(None, feed)}
        if runtime == COMPILED:
            # Its compiler chooses the layout.
            compiled = torch.compile(self.network.to(device), dynamic=False)
            return {"": _torch_call(compiled, images)}
        network = copy.deepcopy(self.network).to(device)
        return {
            layout: _torch_call(_laid_out(network, form), images.contiguous(memory_format=form))
            for layout, form in _LAYOUTS.items()
        }


def _laid_out(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """A copy with its convolutions' weights in a memory layout."""
    copied = copy.deepcopy(network)
    for tensor in copied.parameters():
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    return copied


def _torch_call(network: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    def call() -> None:
        network(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return call


def _translated(sides: list[_Side], runtime: str, display: Display) -> bool:
    """Whether a runtime takes the networks; the reason is shown where it does not."""
    if runtime not in (FLOAT, INT8):
        return True
    display.progress("measure", 0, 1, f"translating for {runtime}")
    try:
        for side in sides:
            side.translate(runtime)
    except models.ModelError as error:
        display.note(f"without {runtime}: {error}")
        return False
    return True


@torch.inference_mode()
def _row(
    sides: list[_Side], runtime: str, device: str, threads: int, batch: int, seconds: float
) -> Row | None:
    """Measure both sides in turns; None where torch cannot compile one of them."""
    chosen: list[tuple[str, Call]] = []
    try:
        with quiet():
            torch.compiler.reset()  # of what was compiled for other batches
            for side in sides:
                calls = side.calls(runtime, device, threads, batch)
                times = _timed(list(calls.values()), seconds / 10 if len(calls) > 1 else 0)
                medians = [statistics.median(own) for own in times]
                chosen.append(list(calls.items())[medians.index(min(medians))])
    except RuntimeError:
        if runtime != COMPILED:
            raise
        return None
    times = _timed([call for _, call in chosen], seconds)
    cells = []
    for side, (layout, _), own in zip(sides, chosen, times, strict=True):
        lower, median, upper = statistics.quantiles(own, n=4)
        cells.append(
            Cell(
                runtime=runtime,
                device=device,
                layout=layout,
                batch=batch,
                threads=threads,
                median_ms=1e3 * median,
                p90_ms=1e3 * statistics.quantiles(own, n=10, method="inclusive")[-1],
                noise=(upper - lower) / 2 / median,
                images_per_second=batch / median,
                gflops=2e-9 * side.macs * batch / median,
            )
        )
    return Row(cells[0], cells[1] if len(cells) > 1 else None)


def _timed(calls: list[Call], seconds: float) -> list[list[float]]:
    """Seconds of each call, in turns of slices, for about so many seconds each."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    while any(len(own) < _FEWEST_CALLS or sum(own) < seconds for own in times):
        for call, own in zip(calls, times, strict=True):
            slice_ends = time.perf_counter() + min(_SLICE, seconds)
            while True:
                started = time.perf_counter()
                call()
                ended = time.perf_counter()
                own.append(ended - started)
                if ended >= slice_ends:
                    break
    return times
