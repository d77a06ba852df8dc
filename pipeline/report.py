"""What a finished run leaves to look at: figures, the model card, and the summary table."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from torch import nn

import models
from data_prep.datasets import get_dataset, named_normalization
from pipeline.display import duration
from pipeline.evaluate import Evaluation
from pipeline.inputs import image_size

if TYPE_CHECKING:
    from data_prep import Manifest
    from models import Profile
    from pipeline.config import Experiment
    from pipeline.stages import Result

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
    for axes, quantity, label in ((loss, "loss", "cross-entropy"), (accuracy, "top1", "top-1 (%)")):
        for split, color in (("train", _GRAY), ("test", _BLUE)):
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


def preprocessing(experiment: Experiment, manifest: Manifest) -> dict[str, object]:
    """What a user of the model has to do to an image, as plain data."""
    recipe, size = experiment.train, image_size(experiment.train, manifest)
    mean, std = named_normalization(recipe.normalization, manifest.normalization)
    window = "the whole image"
    if recipe.test_crop is not None:
        window = f"the central square of {recipe.test_crop:g} of the shorter side"
    return {
        "input": f"float32 (N, {manifest.channels}, {size}, {size})",
        "resize": f"{window}, to {size}x{size}, area filter",
        "scale": "pixel / 255",
        "mean": list(mean),
        "std": list(std),
        "class_names": list(manifest.class_names),
    }


def model_card(result: Result) -> str:
    """Markdown that says what the model is, how good it is and how to use it."""
    experiment, profile = result.experiment, result.profile
    dataset, prepared = get_dataset(experiment.dataset), preprocessing(experiment, result.manifest)
    return f"""# {experiment.name}

{_network(experiment.backbone)} with method `{experiment.method}`, trained on {dataset.title}.

| | |
|---|---|
| top-1 on the test split | {result.evaluation.top1:.2f} % of {result.evaluation.images:,} images |
| parameters | {_parameters(profile)} |
| stored | {profile.stored_bytes:,} bytes ({profile.float32_bytes:,} with this network in float32) |
| multiply-accumulates per image | {profile.macs:,} |
| epochs | {experiment.train.epochs} |

The registered program is the folded network: plain convolutions with the quantized weights.

    import mlflow
    model = mlflow.pytorch.load_model("models:/{experiment.name}@candidate")
    logits = model(images)

`images` is {prepared["input"]}: {prepared["resize"]}; pixels divided by 255, then normalized with
mean {prepared["mean"]} and standard deviation {prepared["std"]} per channel. License of the data:
{dataset.license}.
"""


def _network(backbone: str) -> str:
    """The backbone, and what is to be known of it, such as that it is a design of our own."""
    note = models.backbone_note(backbone)
    return f"{backbone} ({note})" if note else backbone


def _parameters(profile: Profile) -> str:
    counts = {"frozen": profile.frozen, "pre-defined zeros beside them": profile.masked}
    kinds = [f"{count:,} {kind}" for kind, count in counts.items() if count]
    return f"{profile.parameters:,}" + (f" ({', '.join(kinds)})" if kinds else "")


def record(result: Result) -> dict[str, object]:
    """The figures of a run as plain data, kept in its folder; tables of results are made of it."""
    return {
        "experiment": result.experiment.name,
        "network": _network(result.experiment.backbone),
        "method": result.experiment.method,
        "epochs": result.experiment.train.epochs,
        "top1": round(result.evaluation.top1, 3),
        "test_images": result.evaluation.images,
        "parameters": result.profile.parameters,
        "stored_bytes": result.profile.stored_bytes,
        "float32_bytes": result.profile.float32_bytes,
        "macs": result.profile.macs,
        "seconds": round(result.seconds, 1),
        "images_per_second": round(result.history[-1]["images_per_second"]),
        "hardware": result.hardware,
    }


def summary(result: Result) -> Table:
    """The table at the end of a run."""
    experiment, profile = result.experiment, result.profile
    table = Table(box=SIMPLE, show_header=False, title=experiment.name, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    accuracy = f"{result.evaluation.top1:.2f} % of {result.evaluation.images:,} test images"
    if result.evaluation.top5 is not None:
        accuracy += f", top-5 {result.evaluation.top5:.2f} %"
    reference = experiment.reference
    if reference is not None and reference.top1 is not None:
        accuracy += f" (published {reference.top1:.2f} %: {reference.what}; {reference.source})"
    table.add_row("top-1", accuracy)
    if models.backbone_note(experiment.backbone):
        table.add_row("network", _network(experiment.backbone))
    table.add_row("parameters", _parameters(profile))
    stored = f"{profile.stored_bytes:,} bytes"
    if profile.stored_bytes < profile.float32_bytes:
        stored += (
            f" against {profile.float32_bytes:,} of this network in float32 "
            f"({profile.ratio:.1f}x smaller)"
        )
    table.add_row("stored", stored)
    table.add_row("MACs", f"{profile.macs:,} per image")
    rate = result.history[-1]["images_per_second"]
    table.add_row("time", f"{duration(result.seconds)}, training at {rate:,.0f} img/s")
    table.add_row("run", Text(str(result.folder)))
    if result.tracking_uri is not None:
        table.add_row("MLflow run", Text(f"{result.run_id} in {result.tracking_uri}"))
    if result.model is not None:
        table.add_row("model", result.model.uri)
    return table


def next_commands(result: Result) -> list[tuple[str, str]]:
    """What to type to see the run and to use the model, with the Python that made them."""
    if result.tracking_uri is None:
        return []
    see = result.tracking_uri
    if see.startswith("sqlite"):
        see = f"{sys.executable} -m mlflow ui --workers 1 --backend-store-uri {shlex.quote(see)}"
    commands = [("see it", see)]
    if result.model is not None:
        # JSON's double quotes, which the shell's single ones leave readable.
        program = (
            f"import mlflow; mlflow.set_tracking_uri({json.dumps(result.tracking_uri)}); "
            f"model = mlflow.pytorch.load_model({json.dumps(result.model.uri)}); print(model)"
        )
        commands.append(("use it", f"{sys.executable} -c {shlex.quote(program)}"))
    return commands
