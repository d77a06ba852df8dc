"""The model card: what a registered model is, how good, how large, how to use it, and its limits.

Markdown that fits into the description of a version; the headings follow Mitchell et al. (2019).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from data_prep.datasets import get_dataset
from pipeline import report
from pipeline.preprocessing import Preprocessing
from pipeline.registry.versions import short_commit

if TYPE_CHECKING:
    from models import Profile
    from pipeline.config import Experiment, Recipe
    from pipeline.seeds import Spread
    from pipeline.stages import Result

LONGEST_DESCRIPTION = 5000  # characters, MLflow's limit

#: Stands for the number of the version, which is known only when the card has been stored.
_NUMBER = "VERSION"

#: Class names that the card shows; a version has all of them in ``preprocessing.json``.
_MOST_CLASSES = 12

_SEEDS = "\n## Other seeds\n"


def model_card(result: Result, run_id: str, commit: str | None) -> str:
    """The card of a finished run.

    Args:
        run_id: MLflow run.
        commit: of this project's code, see ``Registration``; None where it is not known.
    """
    experiment, evaluation = result.experiment, result.evaluation
    low, high = evaluation.interval
    top5 = "" if evaluation.top5 is None else f", top-5 {evaluation.top5:.2f} %"
    code = "" if commit is None else f", code {short_commit(commit)}"
    sections = [
        f"# {experiment.name}",
        f"{report.network_text(experiment.backbone)} with method `{experiment.method}`, trained on "
        f"{_title(experiment)}. {report.parameters_text(result.profile)} parameters, "
        f"{result.profile.macs:,} multiply-accumulates per image.",
        "## Accuracy",
        f"Top-1 **{evaluation.top1:.2f} %** of {evaluation.images:,} test images (95 % interval "
        f"{low:.2f} to {high:.2f} %){top5}, cross-entropy {evaluation.loss:.4f}."
        f"{report.published_text(experiment)}",
        "## Use",
        _use(experiment.name, result),
        "## Size",
        _sizes(result.profile),
        "## Data and training",
        _data(result),
        _recipe(experiment.train, result),
        f"MLflow run {run_id}{code}.",
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(experiment, result.profile)),
    ]
    return "\n\n".join(sections) + "\n"


def description(card: str, number: str) -> str:
    """The card of the version with this number, as long as MLflow lets a description be."""
    return card.replace(f"/{_NUMBER}", f"/{number}")[:LONGEST_DESCRIPTION]


def with_seeds(card: str, spread: Spread, count: int) -> str:
    """The description with the mean and deviation over several seeds, once."""
    seeds = (
        f"{_SEEDS}\nTop-1 over {count} seeds: {spread.mean:.2f} ± {spread.deviation:.2f} % "
        "(mean and sample standard deviation).\n"
    )
    return card.partition(_SEEDS)[0][: LONGEST_DESCRIPTION - len(seeds)] + seeds


def _title(experiment: Experiment) -> str:
    title = get_dataset(experiment.dataset).title
    if experiment.data.synthetic is None:
        return title
    return f"**made-up images** in the form of {title}"


def _use(name: str, result: Result) -> str:
    """In three lines, with this project and without it."""
    prepared = Preprocessing.of(result.experiment, result.manifest).to_dict()
    mean, std = json.dumps(prepared["mean"]), json.dumps(prepared["std"])
    return f"""With this project, on image files as they are:

    python run.py --predict models:/{name}/{_NUMBER} IMAGE_OR_FOLDER

With torch and MLflow alone, on prepared images, {prepared["input"]}; from a registry that you
trust, for torch runs code that such a file may hold:

    import mlflow
    model = mlflow.pytorch.load_model("models:/{name}/{_NUMBER}")
    logits = model(images)

Preparation: {prepared["resize"]}; {prepared["scale"]}; minus mean {mean}, divided by standard
deviation {std}, per channel. The outputs are logits; `preprocessing.json` has the class names in
their order: {_class_names(result.manifest.class_names)}."""


def _class_names(names: tuple[str, ...]) -> str:
    shown = ", ".join(name[:30] for name in names[:_MOST_CLASSES])
    more = len(names) - _MOST_CLASSES
    return f"{shown} and {more:,} more" if more > 0 else shown


def _sizes(profile: Profile) -> str:
    """A table of the weights by scheme, and what all of it takes."""
    groups: dict[tuple[str, str], list[int]] = {}
    for layer in profile.layers:
        if layer.storage is not None:
            group = groups.setdefault((layer.scheme, f"{layer.bits:.3g}"), [0, 0, 0])
            for place, number in enumerate((1, layer.weights, layer.storage.stored_bytes())):
                group[place] += number
    rest = profile.stored_bytes - sum(group[2] for group in groups.values())
    rows = [
        f"| {scheme} weights | {layers:,} | {weights:,} | {bits} | {size:,} |"
        for (scheme, bits), (layers, weights, size) in groups.items()
    ]
    head = "| | layers | weights | bits each | bytes |\n|---|---:|---:|---:|---:|"
    total = (
        f"| **all** | | | | **{profile.stored_bytes:,}** |\n| this network in float32 | | | | "
        f"{profile.float32_bytes:,} ({profile.float32_bytes / profile.stored_bytes:.1f}x) |"
    )
    return "\n".join([head, *rows, f"| biases, norms | | | 32 | {rest:,} |", total])


def _data(result: Result) -> str:
    dataset, counts = get_dataset(result.experiment.dataset), result.manifest.counts
    images = " + ".join(f"{count:,} {split}" for split, count in counts.items())
    text = (
        f"Trained and tested on {_title(result.experiment)}: {images} images, fingerprint "
        f"{result.manifest.fingerprint[:16]}."
    )
    if result.experiment.data.synthetic is not None:
        return text
    return f"{text} License: {dataset.license}. Source: {dataset.source}."


def _recipe(recipe: Recipe, result: Result) -> str:
    """How it was trained, in a few sentences."""
    schedule = f"{recipe.schedule} schedule"
    if recipe.warmup_epochs:
        schedule += f" (warm-up: {recipe.warmup_epochs:g} of the epochs)"
    changes = ", ".join(_augmentations(recipe)) or "none"
    begun, teacher = result.sources.initial, result.sources.teacher
    parts = [
        f"{recipe.optimizer}, learning rate {recipe.lr:g}, {schedule}, weight decay "
        f"{recipe.weight_decay:g}, batches of {recipe.batch_size:,}, {recipe.loss}, "
        f"{recipe.precision}, seed {result.experiment.seed}.",
        f"Epochs: {report.epochs_text(result)}.",
        f"Augmentation: {changes}.",
        f"Begun with {begun.origin}." if begun else "",
        f"Teacher: {teacher.origin}." if teacher else "",
        f"Kept are averaged weights (decay {recipe.ema_decay:g})." if recipe.ema_decay else "",
        "All settings: `experiment.yaml`.",
    ]
    return " ".join(part for part in parts if part)


def _augmentations(recipe: Recipe) -> Iterator[str]:
    if recipe.crop_area is not None:
        yield f"random windows of {recipe.crop_area[0]:g} to {recipe.crop_area[1]:g} of the area"
    if recipe.shift:
        yield f"shifts of up to {recipe.shift} pixels"
    if recipe.flip:
        yield "horizontal flips"
    for name in ("mixup", "cutmix", "label_smoothing"):
        if getattr(recipe, name):
            yield f"{name.replace('_', ' ')} {getattr(recipe, name):g}"


def _limits(experiment: Experiment, profile: Profile) -> Iterator[str]:
    """What nobody should expect of the model."""
    if experiment.data.synthetic is not None:
        yield "**Trained on made-up images: of no use on real ones.**"
    if experiment.data.max_per_class is not None:
        yield f"Trained and tested on at most {experiment.data.max_per_class:,} images per class."
    if not experiment.tuned:
        yield "The recipe is a default that nobody has tuned for this combination."
    choice = "The test images chose nothing: the last epoch is kept."
    if experiment.train.validation:
        choice = "The epoch was chosen on held-out training images, not on the test images."
    yield f"{choice} Whoever compares many models on the same test images does choose by them."
    yield (
        "The interval is of the test images alone: it says nothing of images of another origin, "
        "and nothing of how another seed would have done."
    )
    yield "Not for decisions that people's safety or rights depend on without a test of your own."
    if profile.stored_bytes < profile.float32_bytes:
        yield "Few bits make the file smaller; by themselves they make nothing faster."
