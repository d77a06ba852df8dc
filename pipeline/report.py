"""What is said of a finished run: its record, and the summary table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

import models
from pipeline.config import Tracking
from pipeline.display import duration

if TYPE_CHECKING:
    from models import Profile
    from pipeline.config import Experiment
    from pipeline.seeds import SeedsResult
    from pipeline.stages import Result

#: Names of figures, for people.
_LABELS = {
    "top1": "top-1",
    "best_top1": "best epoch",
    "validation_top1": "held out",
    "top5": "top-5",
    "loss": "loss",
}


def network_text(backbone: str) -> str:
    """The backbone, and what is to be known of it, such as that it is a design of our own."""
    note = models.backbone_note(backbone)
    return f"{backbone} ({note})" if note else backbone


def parameters_text(profile: Profile) -> str:
    """How many, and of what kind."""
    counts = {"frozen": profile.frozen, "pre-defined zeros beside them": profile.masked}
    kinds = [f"{count:,} {kind}" for kind, count in counts.items() if count]
    return f"{profile.parameters:,}" + (f" ({', '.join(kinds)})" if kinds else "")


def epochs_text(result: Result) -> str:
    """How long the training was, and which of its epochs is kept, where that is a choice."""
    held_out = result.experiment.train.validation
    if not held_out:
        return f"{result.experiment.train.epochs}"
    accuracy = result.history[result.kept_epoch - 1]["validation_top1"]
    return (
        f"{result.experiment.train.epochs}, of which epoch {result.kept_epoch} is kept: the best, "
        f"with {accuracy:.2f} %, on {held_out:,} held-out training images"
    )


def _best_test_epoch(history: list[dict[str, float]]) -> int | None:
    """The epoch, from 1, that did best on the test split; None where it was not watched."""
    if "test_top1" not in history[0]:
        return None
    accuracies = [epoch["test_top1"] for epoch in history]
    return 1 + accuracies.index(max(accuracies))


def record(result: Result) -> dict[str, Any]:
    """The figures of a run as plain data, kept in its folder; tables of results are made of it.

    Accuracies are in percent. ``top1`` is that of the weights that are kept, ``best_top1`` the
    best of all epochs on the test split, which many papers report.
    """
    experiment, evaluation, history = result.experiment, result.evaluation, result.history
    best = _best_test_epoch(history)
    return {
        "experiment": experiment.name,
        "network": network_text(experiment.backbone),
        "method": experiment.method,
        "seed": experiment.seed,
        "precision": experiment.train.precision,
        "epochs": experiment.train.epochs,
        "kept_epoch": result.kept_epoch,
        "top1": round(evaluation.top1, 3),
        "top5": None if evaluation.top5 is None else round(evaluation.top5, 3),
        "loss": round(evaluation.loss, 6),
        "validation_top1": history[result.kept_epoch - 1].get("validation_top1"),
        "best_epoch": best,
        "best_top1": None if best is None else round(history[best - 1]["test_top1"], 3),
        "interval": [round(end, 3) for end in evaluation.interval],
        "test_images": evaluation.images,
        "parameters": result.profile.parameters,
        "stored_bytes": result.profile.stored_bytes,
        "float32_bytes": result.profile.float32_bytes,
        "macs": result.profile.macs,
        "seconds": round(result.seconds, 1),
        "images_per_second": round(history[-1]["images_per_second"]),
        "peak_memory_bytes": history[-1].get("peak_memory_bytes"),
        "hardware": result.hardware,
        "mlflow_run": result.run_id,
        "model_version": None if result.model is None else result.model.version,
    }


def summary(result: Result) -> Table:
    """The table at the end of a run."""
    experiment, profile, history = result.experiment, result.profile, result.history
    table = _table(experiment.name)
    figures = record(result)
    table.add_row("top-1", _accuracy(figures) + published_text(experiment))
    best = _best_test_epoch(history)
    if experiment.reference is not None and best not in (None, result.kept_epoch):
        is_habit = experiment.reference.best_on == "test"
        habit = ", as the paper reports it" if is_habit else ""
        top1 = f"{figures['best_top1']:.2f} % at epoch {best} on the test images{habit}"
        table.add_row(f"best of {len(history)}", top1)
    if experiment.train.validation:
        table.add_row("epochs", epochs_text(result))
    if models.backbone_note(experiment.backbone):
        table.add_row("network", network_text(experiment.backbone))
    table.add_row("parameters", parameters_text(profile))
    table.add_row("stored", _stored(figures))
    table.add_row("MACs", f"{profile.macs:,} per image")
    speed = f"{history[-1]['images_per_second']:,.0f} img/s in {experiment.train.precision}"
    memory = f", {history[-1]['peak_memory_bytes'] / 1e9:.1f} GB of memory at most"
    table.add_row("time", f"{duration(result.seconds)}, training at {speed}{memory}")
    _add_places(table, result.folder, result.run_id, result.tracking_uri)
    if result.model is not None:
        table.add_row("model", f"{result.model.uri}, version {result.model.version}")
    if result.champion:
        table.add_row(
            "champion", result.champion.removeprefix("champion is ").removeprefix("champion ")
        )
    return table


def seeds_summary(result: SeedsResult) -> Table:
    """The table at the end of several runs that differ in their seed."""
    experiment, runs = result.experiment, result.runs
    table = _table(f"{experiment.name}, {len(runs)} seeds")
    for run in runs:
        table.add_row(f"seed {run['seed']}", f"{_accuracy(run)}, run {run['folder']}")
    for name, spread in result.spreads.items():
        if name == "best_top1" and (not experiment.tuned or spread == result.spreads["top1"]):
            continue
        figure = f"{spread.mean:.2f} ± {spread.deviation:.2f} %"
        if name == "loss":
            figure = f"{spread.mean:.4f} ± {spread.deviation:.4f}"
        published = published_text(experiment) if name == "top1" else ""
        table.add_row(_LABELS[name], f"{figure} over {len(runs)} seeds{published}")
    table.add_row("parameters", f"{runs[0]['parameters']:,}")
    table.add_row("stored", _stored(runs[0]))
    table.add_row("time", duration(sum(run["seconds"] for run in runs)))
    _add_places(table, result.folder, result.run_id, result.tracking_uri)
    if result.model is not None:
        table.add_row("model", f"{result.model}, {result.choice}")
    if result.champion:
        table.add_row(
            "champion", result.champion.removeprefix("champion is ").removeprefix("champion ")
        )
    return table


def _table(title: str) -> Table:
    """A table of two columns: what it is, and the figure."""
    table = Table(box=SIMPLE, show_header=False, title=title, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _accuracy(figures: Mapping[str, Any]) -> str:
    """Accuracy in a record, in words."""
    text = f"{figures['top1']:.2f} % of {figures['test_images']:,} test images"
    if "interval" in figures:  # not in the record of an older run
        low, high = figures["interval"]
        text += f" (95 % interval {low:.2f} to {high:.2f} %)"
    return text if figures["top5"] is None else f"{text}, top-5 {figures['top5']:.2f} %"


def published_text(experiment: Experiment) -> str:
    """The figure to compare with, in parentheses; empty where there is none.

    Nothing compares with what made-up images give.
    """
    reference = experiment.reference
    if reference is None or experiment.data.synthetic is not None:
        return ""
    figures = {"": reference.top1, "top-5 ": reference.top5}
    named = [f"{name}{figure:.2f} %" for name, figure in figures.items() if figure is not None]
    if not named:
        return ""
    return f" (published {', '.join(named)}: {reference.text}; {reference.source})"


def _stored(figures: Mapping[str, Any]) -> str:
    """Stored bytes in a record, in words."""
    stored, in_float32 = figures["stored_bytes"], figures["float32_bytes"]
    if stored >= in_float32:
        return f"{stored:,} bytes"
    return (
        f"{stored:,} bytes against {in_float32:,} of this network in float32 "
        f"({in_float32 / stored:.1f}x smaller)"
    )


def _add_places(table: Table, folder: Path, run_id: str | None, tracking_uri: str | None) -> None:
    """Where to look for more."""
    table.add_row("run", Text(str(folder)))
    if tracking_uri is not None:
        table.add_row("MLflow run", Text(f"{run_id} in {tracking_uri}"))


def next_commands(
    tracking: Tracking, tracking_uri: str | None, model: str | None
) -> list[tuple[str, str]]:
    """What to type to see a run and to use its model, with the Python that made them.

    Args:
        tracking: settings of the run.
        tracking_uri: MLflow store that they led to; None when tracking is off.
        model: URI in the registry; None when nothing was registered.
    """
    if tracking_uri is None:
        return []
    see = tracking_uri
    if see.startswith("sqlite"):
        see = f"{sys.executable} -m mlflow ui --workers 1 --backend-store-uri {shlex.quote(see)}"
    commands = [("see it", see)]
    if model is not None:
        name = model.removeprefix("models:/")
        use = [sys.executable, sys.argv[0], "--predict", name, "IMAGE"]
        default = Tracking()
        if (tracking.uri, tracking.runs) != (default.uri, default.runs):
            use.append(f"tracking.uri={tracking_uri}")
        commands.append(("use it", shlex.join(use)))
    return commands
