"""What a benchmark found: figures of a model and its float twin, and what they say together."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

EAGER, COMPILED, FLOAT, INT8 = "torch eager", "torch compiled", "ONNX fp32", "ONNX int8"
RUNTIMES = (EAGER, COMPILED, FLOAT, INT8)

#: Differences below this share are none, however steady the clock is.
_SMALLEST_MARGIN = 0.05


@dataclass(frozen=True)
class Cell:
    """One figure of one network.

    Attributes:
        runtime, device: what computes; of several memory layouts (`layout`) the faster one.
        batch, threads: images at a time, and threads of the CPU.
        median_ms, p90_ms: of a batch, in milliseconds.
        noise: how far the quarters of the times lie from the median, as a share of it.
        images_per_second, gflops: at the median; two operations for each multiply-accumulate that
            the outputs need (models.profile), also in eight bits.
    """

    runtime: str
    device: str
    layout: str
    batch: int
    threads: int
    median_ms: float
    p90_ms: float
    noise: float
    images_per_second: float
    gflops: float


@dataclass(frozen=True)
class Row:
    """The same runtime, batch and threads for both networks; no twin where there is none."""

    model: Cell
    twin: Cell | None

    @property
    def faster(self) -> float | None:
        """How many times faster the model is than its twin."""
        return None if self.twin is None else self.twin.median_ms / self.model.median_ms


@dataclass(frozen=True)
class Benchmark:
    """All figures of a model.

    Attributes:
        origin: of the model.
        method: that made its weights; empty where the packed file does not say.
        macs, twin_macs: multiply-accumulates for an image.
    """

    origin: str
    method: str
    macs: int
    twin_macs: int | None
    rows: tuple[Row, ...]

    def speedup(self, runtime: str) -> tuple[float, float] | None:
        """How many times faster than the twin, over all batches and threads, and the noise of it.

        The geometric mean; None where the runtime was not measured, or there is no twin.
        """
        rows = [row for row in self.rows if row.model.runtime == runtime and row.twin is not None]
        return _mean_ratio([(row.twin, row.model) for row in rows if row.twin is not None])

    def speedup_of_int8(self, *, twin: bool) -> tuple[float, float] | None:
        """The same for eight bits, the model's or the twin's, against the twin in float."""
        floats = {
            (row.model.batch, row.model.threads): row.twin or row.model
            for row in self.rows
            if row.model.runtime == FLOAT
        }
        pairs = []
        for row in self.rows:
            cell = row.twin if twin else row.model
            if row.model.runtime == INT8 and cell is not None:
                reference = floats.get((cell.batch, cell.threads))
                if reference is not None:
                    pairs.append((reference, cell))
        return _mean_ratio(pairs)

    def conclusion(self) -> str:
        """What the figures say of the use of few bits, in a sentence or two."""
        return " ".join(filter(None, [self._of_float_runtimes(), self._of_int8()]))

    def _of_float_runtimes(self) -> str:
        found = {runtime: self.speedup(runtime) for runtime in (EAGER, COMPILED, FLOAT)}
        ratios = {runtime: ratio for runtime, ratio in found.items() if ratio is not None}
        if not ratios or self.twin_macs is None:
            return ""
        named: dict[bool, list[str]] = {True: [], False: []}
        alike: list[str] = []
        for runtime, (ratio, margin) in ratios.items():
            if abs(ratio - 1) <= margin:
                alike.append(runtime)
            else:
                named[ratio > 1].append(f"{ratio:.1f}x in {runtime}")
        texts = []
        if alike:
            no_kernel = "no kernel here skips multiplications"
            texts.append(f"as fast as the float twin in {_listed(alike)} ({no_kernel})")
        if named[True]:
            share = self.macs / self.twin_macs
            why = f", with {share:.0%} of its multiplications" if share < 0.95 else ""
            texts.append(f"faster than the float twin{why}: {_listed(named[True])}")
        if named[False]:
            texts.append(f"slower than the float twin: {_listed(named[False])}")
        return f"Weights by {self.method} run {'; '.join(texts)}."

    def _of_int8(self) -> str:
        ours, twins = self.speedup_of_int8(twin=False), self.speedup_of_int8(twin=True)
        if ours is None:
            return ""
        ratio, margin = ours
        if ratio <= 1 + margin:
            return f"Eight bits bring no speed here: ONNX int8 is {ratio:.1f}x the float twin."
        beside = f"; the twin's own int8 {twins[0]:.1f}x" if twins is not None else ""
        against = "the float twin" if twins is not None else "itself"
        return f"Eight bits are faster: ONNX int8 is {ratio:.1f}x {against} in ONNX fp32{beside}."

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "model": self.origin,
            "method": self.method,
            "macs": self.macs,
            "twin_macs": self.twin_macs,
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "rows": [asdict(row) | {"faster": row.faster} for row in self.rows],
            "conclusion": self.conclusion(),
        }


def _mean_ratio(pairs: list[tuple[Cell, Cell]]) -> tuple[float, float] | None:
    """How many times faster the second ones are, and the noise of that."""
    if not pairs:
        return None
    ratio = statistics.geometric_mean(slow.median_ms / fast.median_ms for slow, fast in pairs)
    noise = statistics.median(max(slow.noise, fast.noise) for slow, fast in pairs)
    return ratio, max(_SMALLEST_MARGIN, noise)


def _listed(texts: list[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if texts[:-1] else texts)


def benchmark_table(found: Benchmark) -> Table:
    """The figures of a benchmark, within 80 columns; the slowest tenths are in the JSON."""
    title = f"{found.origin}: {2e-9 * found.macs:,.3g} GFLOP an image"
    if found.twin_macs is not None:
        title += f", its float twin {2e-9 * found.twin_macs:,.3g}"
    table = Table(
        box=SIMPLE,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=0,
    )
    table.add_column("runtime", style="bold", no_wrap=True)
    for name in ("batch", "on", "ms", "img/s", "GFLOP\n/s", "", "twin\nms", "GFLOP\n/s", ""):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("faster", justify="right", no_wrap=True)
    for row in found.rows:
        cell, twin, faster = row.model, row.twin, row.faster
        of_twin = (
            ("", "", "")
            if twin is None
            else (_three(twin.median_ms), _three(twin.gflops), twin.layout)
        )
        table.add_row(
            cell.runtime,
            f"{cell.batch}",
            "GPU" if cell.device != "cpu" else f"{cell.threads} thr",
            _three(cell.median_ms),
            f"{cell.images_per_second:,.0f}",
            _three(cell.gflops),
            cell.layout,
            *of_twin,
            "" if faster is None else f"{faster:.2f}x",
        )
    return table


def _three(value: float) -> str:
    """A figure with three digits that count."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 3)}f}"
