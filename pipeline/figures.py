"""Pictures of a finished run: curves, confusion matrix, weights."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import models
from pipeline.evaluate import Evaluation

_BLUE, _ORANGE, _GRAY = "#3b6fb6", "#d9782d", "#8a8a8a"

#: Up to this many classes each cell of the confusion matrix shows its count.
_MOST_COUNTS = 20

#: Of a deeper network this many layers, evenly spaced, stand for all in the weight histogram.
_MOST_LAYERS = 24

#: A weight with more levels than this (a scale per filter) is drawn as one distribution.
_MOST_LEVELS = 9


def curves(history: list[dict[str, float]], title: str) -> Figure:
    """Loss, accuracy and learning rate over the epochs."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = range(1, len(history) + 1)
    for axes, quantity, label in ((loss, "loss", "loss"), (accuracy, "top1", "top-1 (%)")):
        for split, color in (("train", _GRAY), ("validation", _BLUE), ("test", _BLUE)):
            if f"{split}_{quantity}" in history[0]:
                values = [epoch[f"{split}_{quantity}"] for epoch in history]
                axes.plot(epochs, values, color=color, label=split, marker=".")
        axes.set_ylabel(label)
        axes.legend(frameon=False)
    rate.plot(epochs, [epoch["lr"] for epoch in history], color=_ORANGE, marker=".")
    rate.set_ylabel("learning rate at the epoch's end")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return figure


def confusion_matrix(evaluation: Evaluation, class_names: tuple[str, ...], title: str) -> Figure:
    """True class against predicted class; shade: share of the true class, figure: images."""
    counts = evaluation.confusion
    classes = len(counts)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(6.4, 5.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if classes <= _MOST_COUNTS:
        axes.set_xticks(
            range(classes), class_names, rotation=90 if classes > 10 else 0, parse_math=False
        )
        axes.set_yticks(range(classes), class_names, parse_math=False)
        for row, column in counts.nonzero().tolist():
            axes.text(
                column,
                row,
                str(int(counts[row, column])),
                ha="center",
                va="center",
                color="white" if shares[row, column] > 0.5 else "black",
                fontsize=8,
            )
    figure.colorbar(image, ax=axes, label="share of the true class")
    return figure


def weight_histogram(model: nn.Module, title: str) -> Figure:
    """Latent weights of the quantized layers, and the quantized levels they are used as.

    A network without quantized layers shows its weights alone.
    """
    quantized = dict(models.quantized_layers(model))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and (name in quantized or not quantized)
    }
    if len(layers) > _MOST_LAYERS:
        names = list(layers)
        steps = range(_MOST_LAYERS)
        shown = [names[round(step * (len(names) - 1) / (_MOST_LAYERS - 1))] for step in steps]
        title += f" ({_MOST_LAYERS} of {len(layers)} layers)"
        layers = {name: layers[name] for name in shown}
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, layer) in zip(grid, layers.items(), strict=False):
        latent = layer.weight.detach().flatten()
        counts, edges = _histogram(latent)
        axes.stairs(counts, edges, fill=True, color=_BLUE, alpha=0.6, label="latent")
        axes.set_title(name, fontsize=9)
        axes.set_yticks([])
        if quantized:
            _draw_levels(axes, quantized[name].used_weight(), max(counts))
    for axes in list(grid)[len(layers) :]:
        axes.set_axis_off()
    if quantized:
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def _draw_levels(axes: Axes, weight: torch.Tensor, tallest: float) -> None:
    """A line for each level of a quantized weight, as high as its share; or their histogram."""
    levels, shares = _levels(weight)
    if len(levels) > _MOST_LEVELS:
        counts, edges = _histogram(weight.detach().flatten())
        scaled = [count * tallest / max(counts) for count in counts]
        axes.stairs(scaled, edges, color=_ORANGE, label="quantized")
        return
    heights = [share * tallest for share in shares]
    axes.vlines(levels, 0, heights, color=_ORANGE, lw=2, label="quantized")
    for level, height, share in zip(levels, heights, shares, strict=True):
        axes.text(level, height, f"{share:.0%}", ha="center", va="bottom", fontsize=7)


def _histogram(weights: torch.Tensor) -> tuple[list[float], list[float]]:
    reach = float(weights.abs().max()) or 1.0
    counts = torch.histc(weights, bins=60, min=-reach, max=reach)
    edges = torch.linspace(-reach, reach, 61)
    return (counts / counts.sum()).tolist(), edges.tolist()


def _levels(weight: torch.Tensor) -> tuple[list[float], list[float]]:
    """Distinct values of a quantized weight and the share of the weights at each."""
    levels, counts = torch.unique(weight.detach(), return_counts=True)
    return levels.tolist(), (counts / counts.sum()).tolist()
