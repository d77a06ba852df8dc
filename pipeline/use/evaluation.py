"""How good a network is: every test image of a data set once, and what its registration said."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_prep.datasets import DataError, one_line_for_os_errors
from pipeline import inputs
from pipeline.config import Experiment, PipelineError
from pipeline.context import TrainContext
from pipeline.display import Display
from pipeline.evaluate import Evaluation, evaluate
from pipeline.materials import find_data, prepare
from pipeline.preprocessing import Preprocessing
from pipeline.settings import override
from pipeline.use.model import BATCH_SIZE, UsableModel

if TYPE_CHECKING:
    from data_prep import Dataset, Manifest

#: Images by the number of their channels.
_KINDS = {1: "gray", 3: "color"}


@dataclass(frozen=True)
class ModelEvaluation:
    """An evaluation of a network, and what to compare it with.

    Attributes:
        model: what was evaluated.
        dataset: whose test split.
        class_names: in the order of the evaluation's classes.
        evaluation: the answers.
        same_images: whether these are the images that it was registered with.
        equals_recorded: whether it gives the recorded accuracy, of a registered version each single
            answer; None where nothing comparable was recorded.
        picture: of the confusion matrix; None where it could not be written.
    """

    model: UsableModel
    dataset: str
    class_names: tuple[str, ...]
    evaluation: Evaluation
    same_images: bool
    equals_recorded: bool | None
    picture: Path | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        evaluation, names = self.evaluation, self.class_names
        return {
            "model": self.model.origin,
            "experiment": self.model.name,
            "dataset": self.dataset,
            "split": "test",
            "images": evaluation.images,
            "top1": evaluation.top1,
            "interval": list(evaluation.interval),
            "top5": evaluation.top5,
            "loss": evaluation.loss if math.isfinite(evaluation.loss) else None,
            "per_class": dict(zip(names, evaluation.per_class, strict=True)),
            "confusion": evaluation.confusion.tolist(),
            "recorded": self.model.recorded if self.same_images else None,
            "equals_recorded": self.equals_recorded,
            "picture": None if self.picture is None else str(self.picture),
        }


def evaluate_model(
    model: UsableModel,
    display: Display,
    dataset: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> ModelEvaluation:
    """Evaluate a network on the test split of its data set, or of another with the same classes.

    The data are prepared where they are not yet. Images are seen as the network's preprocessing
    says, on whatever data.

    Args:
        dataset: name of the other data set; the user's settings hold for it too.
        batch_size: images that the network sees together.

    Raises:
        PipelineError: one line, when there are no such images, or they do not fit.
    """
    experiment = model.experiment
    if dataset is not None and dataset != experiment.dataset:
        experiment = override(experiment, [f"dataset={dataset}"])
    experiment = _as_seen(experiment, model.preprocessing, batch_size)
    row = find_data(experiment)
    _check_inputs(model, row)
    registered = _registered_answers(model, display)
    manifest = prepare(experiment, row, display)
    order = _class_order(model, manifest)
    evaluation = _evaluate(model, experiment, manifest, order, display)
    same_images = manifest.fingerprint == model.fingerprint
    equal = None
    if same_images and model.recorded:
        equal = _is_recorded(evaluation, model.recorded, registered)
    return ModelEvaluation(
        model=model,
        dataset=manifest.dataset,
        class_names=manifest.class_names,
        evaluation=evaluation,
        same_images=same_images,
        equals_recorded=equal,
        picture=_draw(model, manifest, evaluation, display),
    )


def _registered_answers(model: UsableModel, display: Display) -> Tensor | None:
    """The class that a registered version gave each test image, int64 (images,); None of a file."""
    if model.version is None or model.store is None:
        return None
    from pipeline.registry.predictions import NotComparableError
    from pipeline.registry.versions import read_predictions

    try:
        predicted = read_predictions(model.version, model.store).predicted
    except NotComparableError as error:
        display.note(f"{error}; the figures alone are compared")
        return None
    return torch.from_numpy(predicted.astype("int64"))


def _is_recorded(
    evaluation: Evaluation, recorded: Mapping[str, Any], registered: Tensor | None
) -> bool:
    """Whether an evaluation gives the recorded figures, and the registered answers."""
    hits = round(recorded["top1"] * recorded["images"] / 100)
    is_equal = (hits, recorded["images"]) == (evaluation.hits, evaluation.images)
    return is_equal and (registered is None or torch.equal(registered, evaluation.predicted))


def _as_seen(experiment: Experiment, seen: Preprocessing, batch_size: int) -> Experiment:
    """The experiment with images cut and resized as the network's preprocessing says."""
    recipe = {
        "normalization": "dataset",
        "test_size": seen.size,
        "test_crop": seen.crop,
        "batch_size": batch_size,
    }
    return experiment.model_copy(update={"train": experiment.train.model_copy(update=recipe)})


def _check_inputs(model: UsableModel, dataset: Dataset) -> None:
    """Refuse a data set whose images or classes do not fit, before it is prepared."""
    wanted = model.preprocessing
    if dataset.channels != wanted.channels:
        raise PipelineError(
            f"{model.origin} takes {_KINDS[wanted.channels]} images, and those of {dataset.name} "
            f"are {_KINDS[dataset.channels]}"
        )
    if dataset.channels == 1 and dataset.image_size != wanted.size:
        raise PipelineError(
            f"{model.origin} takes gray images of {wanted.size} pixels, which are not resized, and "
            f"those of {dataset.name} have {dataset.image_size}"
        )
    if dataset.classes not in (None, len(wanted.class_names)):
        raise PipelineError(
            f"{model.origin} knows {len(wanted.class_names)} classes, and {dataset.name} has "
            f"{dataset.classes}"
        )


def _class_order(model: UsableModel, manifest: Manifest) -> Tensor:
    """Which output stands for each class of the data, int64 (classes,).

    Raises:
        PipelineError: when the classes are not the same, by name.
    """
    known, asked = model.preprocessing.class_names, manifest.class_names
    if len(set(known)) < len(known) and known == asked:
        return torch.arange(len(known))
    missing = [name for name in asked if name not in known]
    if missing or len(asked) != len(known) or len(set(known)) < len(known):
        problem = f"it does not know {missing[0]!r}" if missing else f"it knows {len(known)}"
        raise PipelineError(
            f"{manifest.dataset} has other classes than {model.origin}: {len(asked)}, and {problem}"
        )
    return torch.tensor([known.index(name) for name in asked])


class _Reordered(nn.Module):
    """A network whose outputs come in the order of a data set's classes."""

    def __init__(self, network: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("order", order)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[:, self.order]


class _ShownContext(TrainContext):
    """A context that shows how far an evaluation is."""

    def __init__(self, display: Display, steps: int, images: int) -> None:
        super().__init__(lambda event: None)
        self._display, self._steps, self._images = display, steps, images
        self._done = 0

    def beat(
        self,
        doing: str,
        step: int | None = None,
        usual: float | None = None,
        stall: float = 0.0,
    ) -> None:
        """A batch is about to be looked at."""
        self._display.progress("evaluate", self._done, self._steps, f"{self._images:,} images")
        self._done += 1


def _evaluate(
    model: UsableModel, experiment: Experiment, manifest: Manifest, order: Tensor, display: Display
) -> Evaluation:
    """Every test image once, normalized as the network is used to."""
    manifest = replace(manifest, mean=model.preprocessing.mean, std=model.preprocessing.std)
    images = manifest.counts["test"]
    steps = -(-images // experiment.train.batch_size)
    network = model.network
    if not torch.equal(order, torch.arange(len(order))):
        network = _Reordered(network, order).eval()
    try:
        with _ShownContext(display, steps, images) as context:
            loader = inputs.make_loader(
                experiment, manifest, "test", training=False, device=context.device
            )
            return evaluate(
                network.to(context.device), loader, context, classes=len(order), images=images
            )
    except DataError as error:
        raise PipelineError(str(error)) from None
    finally:
        display.close_bar()


def _draw(
    model: UsableModel, manifest: Manifest, evaluation: Evaluation, display: Display
) -> Path | None:
    """The confusion matrix as a picture, in the folder of runs, if that takes it."""
    from pipeline import figures

    folder = model.experiment.tracking.runs.absolute() / "evaluate"
    version = f"-version-{model.version.number}" if model.version is not None else ""
    name = re.sub(r"[^\w(),=+-]", "_", f"{model.name}{version}-{manifest.dataset}")
    path = folder / f"{name}.png"
    title = f"{model.name} on {manifest.dataset}: top-1 {evaluation.top1:.2f} %"
    figure = figures.confusion_matrix(evaluation, manifest.class_names, title)
    try:
        with (
            one_line_for_os_errors("cannot write the picture", path),
            warnings.catch_warnings(),
        ):
            # A class name in letters that the font lacks shows as boxes, which is seen anyway.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.png")
            figure.savefig(partial, dpi=120)
            partial.replace(path)
    except DataError as error:
        display.note(f"{error}; tracking.runs= names another folder")
        return None
    return path
