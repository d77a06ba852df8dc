"""What is said of a network when it is registered, put together from the result of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.datasets import get_dataset
from pipeline.config import Experiment
from pipeline.preprocessing import Preprocessing
from pipeline.registry.card import model_card
from pipeline.registry.predictions import Predictions
from pipeline.registry.versions import SYNTHETIC_TAG
from pipeline.stores import TrackingStore, store_errors

if TYPE_CHECKING:
    from pipeline.stages import Result

_COMMIT_TAG, _DIRTY_TAG = "mlflow.source.git.commit", "git.dirty"


@dataclass(frozen=True)
class Registration:
    """What is registered, but for the network.

    Attributes:
        name: of the registered model.
        run_id: MLflow run of the training.
        experiment: that was trained.
        image_shape: (C, H, W) of a float32 input image.
        model_card: markdown; the version's description and the file `model_card.md`.
        preprocessing: JSON values: how to turn an image into an input and an output into a class
            name; in `MLmodel`, in `preprocessing.json` and in the packed file.
        predictions: the answers to the test images.
        metadata: JSON values; what the packed file says of the network beside that.
        tags: of the version.
    """

    name: str
    run_id: str
    experiment: Experiment
    image_shape: tuple[int, int, int]
    model_card: str
    preprocessing: Mapping[str, object]
    predictions: Predictions
    metadata: Mapping[str, Any]
    tags: Mapping[str, str]

    @classmethod
    def of(cls, result: Result, store: TrackingStore, run_id: str) -> Registration:
        """What there is to say of a finished run.

        Raises:
            PipelineError: the store is away.
        """
        experiment, evaluation, manifest = result.experiment, result.evaluation, result.manifest
        with store_errors(f"cannot read run {run_id} in {store.uri}"):
            # Of the code that the training began with, whatever continued it.
            tags = store.client.get_run(run_id).data.tags
        commit = tags.get(_COMMIT_TAG)
        if commit is not None and tags.get(_DIRTY_TAG) == "true":
            commit += "-dirty"  # as git describe writes what was changed since
        prepared = Preprocessing.of(experiment, manifest)
        return cls(
            name=experiment.name,
            run_id=run_id,
            experiment=experiment,
            image_shape=prepared.input_shape,
            model_card=model_card(result, run_id, commit),
            preprocessing=prepared.to_dict(),
            predictions=Predictions.of(evaluation, manifest.files["test"].sha256),
            metadata=_metadata(result, commit),
            tags=_tags(result, commit),
        )


def _metadata(result: Result, commit: str | None) -> dict[str, Any]:
    """For whoever has only the packed file."""
    evaluation, dataset = result.evaluation, get_dataset(result.experiment.dataset)
    return {
        "data": {
            "dataset": dataset.name,
            "title": dataset.title,
            "fingerprint": result.manifest.fingerprint,
            "license": dataset.license,
        },
        "evaluation": {
            "split": "test",
            "images": evaluation.images,
            "top1": round(evaluation.top1, 3),
            "interval": [round(end, 3) for end in evaluation.interval],
            "top5": None if evaluation.top5 is None else round(evaluation.top5, 3),
            "loss": round(evaluation.loss, 6),
        },
        "git_commit": commit,
    }


def _tags(result: Result, commit: str | None) -> dict[str, str]:
    """By which versions are listed and compared without their files."""
    experiment, evaluation = result.experiment, result.evaluation
    low, high = evaluation.interval
    tags = {
        "seed": str(experiment.seed),
        "top1": f"{evaluation.top1:.3f}",
        "top1_interval": f"{low:.3f} {high:.3f}",
        "images": str(evaluation.images),
        "dataset": experiment.dataset,
        "backbone": experiment.backbone,
        "method": experiment.method,
        "parameters": str(result.profile.parameters),
        "macs": str(result.profile.macs),
        "data.fingerprint": result.manifest.fingerprint,
        "evaluation.data": result.manifest.files["test"].sha256,
        SYNTHETIC_TAG: str(experiment.data.synthetic is not None).lower(),
    }
    return tags if commit is None else tags | {"git_commit": commit}
