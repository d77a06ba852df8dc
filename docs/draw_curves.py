"""Draw learning curves beside each other, and beside what is published of them.

    python -m docs.draw_curves docs/lenet5.png mnist_lenet5_float_stadtmann2020-lenet5 \\
        mnist_lenet5_binary

The curves are those of docs/curves.json, which `python -m docs.write_results RUNS` collects.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.draw_pipeline import BORDER, FAINT, INK, PAPER
from docs.write_results import CURVES
from pipeline.experiments import catalog

#: One for each curve of a picture.
COLORS = ("#1d4ed8", "#b45309", "#15803d", "#7e22ce", "#0f766e")

#: Accuracy on held-out images by epoch, from the logs that Stadtmann et al. (ICMLA 2020) published
#: with their code.
PUBLISHED_POINTS = {
    "mnist_lenet5_float_stadtmann2020-lenet5": {10: 99.30, 100: 99.46, 200: 99.52},
    "mnist_lenet5_binary": {10: 98.52, 100: 98.98, 200: 98.95},
    "cifar10_vggnet7": {10: 76.60, 100: 93.34, 200: 93.82},
    "cifar10_vggnet7_binary": {10: 79.24, 100: 88.46, 200: 89.12},
}

#: This share of the epochs at the beginning may leave the picture at its lower edge.
STEEP_SHARE = 0.1

Record = dict[str, Any]


def draw(runs: dict[str, Record]) -> Figure:
    """A figure with the accuracy by epoch of each run, see `write_results.collect_curves`."""
    figure = Figure(figsize=(9, 4.2), dpi=150, facecolor=PAPER, layout="constrained")
    axes = figure.subplots()
    lowest = 100.0
    for number, (name, run) in enumerate(runs.items()):
        lowest = min(lowest, _draw_run(axes, name, run, number))
    longest = max(run["epochs"] for run in runs.values())
    axes.set_xlim(0, 1.01 * longest)
    highest = axes.dataLim.y1
    margin = 0.06 * (highest - lowest) or 1.0
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel("top-1 (%)", color=INK)
    axes.tick_params(colors=FAINT)
    axes.grid(color=BORDER, alpha=0.5)
    for side, spine in axes.spines.items():
        spine.set_color(BORDER)
        spine.set_visible(side in ("left", "bottom"))
    axes.legend(loc="lower right", fontsize=9, labelcolor=INK, edgecolor=PAPER, framealpha=1)
    return figure


def _draw_run(axes: Axes, name: str, run: Record, number: int) -> float:
    """Add a run and what is published of it; returns the lowest accuracy that has to be seen."""
    curve, color = run["top1_by_epoch"], COLORS[number]
    images = "held-out" if run["watched"] == "validation" else "test"
    axes.plot(
        range(1, len(curve) + 1),
        curve,
        color=color,
        linewidth=1.5,
        marker="." if len(curve) <= 30 else None,
        label=f"{name}, {images} images",
    )
    seen = curve[math.ceil(STEEP_SHARE * len(curve)) - 1 :]
    reference = catalog()[name].reference
    if reference is not None and reference.top1 is not None:
        axes.axhline(
            reference.top1,
            color=color,
            linewidth=1,
            linestyle=(5 * number, (5, 5)),  # two on one another are both seen
            label=f"published: {reference.top1:.2f} ({reference.source})",
        )
        seen = [*seen, reference.top1]
    points = PUBLISHED_POINTS.get(name, {})
    points = {epoch: top1 for epoch, top1 in points.items() if epoch <= run["epochs"]}
    if points:
        axes.plot(
            list(points),
            list(points.values()),
            color=color,
            linestyle="none",
            marker="D",
            markersize=6,
            markerfacecolor=PAPER,
            label="published at these epochs",
        )
        seen = [*seen, *points.values()]
    return min(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", type=Path, help="to write: a name that ends in .png or .svg")
    parser.add_argument("experiments", nargs="+", help=f"of docs/{CURVES.name}")
    arguments = parser.parse_args()
    curves = json.loads(CURVES.read_text())
    missing = [name for name in arguments.experiments if name not in curves]
    if missing:
        known = ", ".join(curves) or "no runs yet"
        parser.error(f"no curve of {', '.join(missing)} in docs/{CURVES.name}, which has {known}")
    if len(arguments.experiments) > len(COLORS):
        parser.error(f"{len(COLORS)} curves in a picture at most")
    draw({name: curves[name] for name in arguments.experiments}).savefig(arguments.picture)


if __name__ == "__main__":
    main()
