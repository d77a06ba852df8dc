"""Registering: a trained network becomes a version, in every form in which it will be used.

A version holds the folded network as a graph of `torch.export` (`data/model.pt2`) with a dynamic
batch size, which loads with torch and MLflow alone, without this project; the network packed
(`packed.safetensors`), which this project reads; the trained network's own tensors and its
experiment (`training/`), for another training to begin with; its answers to the test images
(`evaluation.safetensors`); and the model card.

All forms are proven where they are made: the graph gives the trained net's logits, the packed
network those of the folded one to the bit. Then they are sent, fetched again and compared byte by
byte, so that what lies in the store is what was proven. Nothing that was in a store before is ever
loaded: torch would run code that such a file may hold.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import models
from models import ModelError
from models.exporting.program import no_buffer_warning, strip_archive
from pipeline.config import PipelineError
from pipeline.registry.artifact import (
    CARD,
    PREPROCESSING,
    PROGRAM,
    digests,
    portable_yaml,
    refuse_pickled_code,
    save_training,
)
from pipeline.registry.card import description
from pipeline.registry.registration import Registration
from pipeline.registry.versions import CANDIDATE, EXPERIMENT, PACKED, PREDICTIONS
from pipeline.stores import TrackingStore, is_away, reason, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the logits, against the largest one (at least 1)
#: Notes what was created, and how and with which arguments it is deleted.
Undo = Callable[..., None]


@dataclass(frozen=True)
class RegisteredModel:
    """A model version.

    Attributes:
        name: of the registered model.
        version: number of this version, from 1.
        uri: `models:/<name>@<alias>`, for `mlflow.pytorch.load_model`.
        size_bytes: size of the exported graph with its weights.
        packed_bytes: size of the packed file.
    """

    name: str
    version: int
    uri: str
    size_bytes: int
    packed_bytes: int


def register(
    trained: torch.nn.Module,
    folded: torch.nn.Module,
    registration: Registration,
    *,
    store: TrackingStore,
    alias: str = CANDIDATE,
) -> RegisteredModel:
    """Register a trained network as the next version of a name.

    Args:
        trained: the network as it was trained, on the CPU, in eval mode.
        folded: what it is used as, plain torch layers; gives the same logits (N, classes).
        alias: moved to the version once it has been verified, but never back to an older one.

    Raises:
        PipelineError: store or `torch.export` refuse, the export holds pickled code or gives other
            logits, or the packed network does. After any error the alias is where it was and what
            was created is deleted.
    """
    name, run_id = registration.name, registration.run_id
    with (
        store_errors(f"cannot register {name} in {store.uri}"),
        tempfile.TemporaryDirectory(prefix="ternforge-") as scratch,
        _undone_on_error() as undo,
    ):
        experiment_id = store.client.get_run(run_id).info.experiment_id
        folder = Path(scratch, "model")
        tags = _write(trained, folded, registration, folder)
        version = _take_up(store, registration, experiment_id, folder)
        if version is None:
            logged = store.client.create_logged_model(experiment_id, name, run_id, tags)
            undo(f"model {logged.model_id}", store.client.delete_logged_model, logged.model_id)
            _address(folder, logged)
            store.client.log_model_artifacts(logged.model_id, str(folder))
            store.client.finalize_logged_model(logged.model_id, "READY")
            number = _create_version(store.client, registration, logged, tags, undo)
            if not _is_stored(store, name, number, folder):
                raise PipelineError(f"version {number} of {name} was not stored as it was sent")
            version = _Version(number, logged.model_id)
        _publish(store.client, registration, version, alias)
        sizes = [Path(folder, file).stat().st_size for file in (PROGRAM, PACKED)]
    return RegisteredModel(name, int(version.number), f"models:/{name}@{alias}", *sizes)


@dataclass(frozen=True)
class _Version:
    """A version of which the store has all files, and its logged model."""

    number: str
    model_id: str


def _take_up(
    store: TrackingStore, registration: Registration, experiment_id: str, folder: Path
) -> _Version | None:
    """The version that a process gave this run before it was killed, with the very same files.

    A model that it left without a version is deleted.
    """
    client, name, run_id = store.client, registration.name, registration.run_id
    models_of_run = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    model_ids = {
        model.artifact_location: model.model_id for model in models_of_run if model.name == name
    }
    taken_up = None
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        model_id, number = model_ids.pop(str(version.source), None), str(version.version)
        # Else it is of weights that the run had before, or somebody has changed it since.
        if model_id is not None and _is_stored(store, name, number, folder):
            taken_up = _Version(number, model_id)
    for model_id in model_ids.values():
        client.delete_logged_model(model_id)
    return taken_up


def _is_stored(store: TrackingStore, name: str, number: str, folder: Path) -> bool:
    """Whether a version has the files of this folder, all of them and no others."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    source = store.client.get_model_version_download_uri(name, number)
    with tempfile.TemporaryDirectory(prefix="ternforge-") as scratch:
        try:
            fetched = mlflow.artifacts.download_artifacts(
                source, dst_path=scratch, tracking_uri=store.client.tracking_uri
            )
        except (MlflowException, OSError) as error:
            if is_away(error):
                raise
            return False  # somebody has deleted them
        return digests(Path(fetched)) == digests(folder)


def _publish(
    client: MlflowClient, registration: Registration, version: _Version, alias: str
) -> None:
    """Describe the version, name it as what its run gave, and move the alias, but never back."""
    from mlflow.entities import LoggedModelOutput

    name, run_id = registration.name, registration.run_id
    text = description(registration.model_card, version.number)
    client.update_model_version(name, version.number, text)
    outputs = client.get_run(run_id).outputs
    named = [] if outputs is None else [output.model_id for output in outputs.model_outputs]
    if version.model_id not in named:
        client.log_outputs(run_id, [LoggedModelOutput(version.model_id, step=0)])
    if int(client.get_registered_model(name).aliases.get(alias, 0)) < int(version.number):
        client.set_registered_model_alias(name, alias, version.number)


@contextlib.contextmanager
def _undone_on_error() -> Iterator[Undo]:
    """Gives what notes how to delete something; after an error all that is deleted, last first.

    The error itself is what gets reported. With the store away, nothing can be deleted.
    """
    from mlflow.exceptions import MlflowException

    created: list[tuple[str, Callable[[], None]]] = []

    def note(what: str, delete: Callable[..., None], *arguments: str) -> None:
        created.append((what, partial(delete, *arguments)))

    try:
        yield note
    except BaseException:
        while created:
            try:
                created[-1][1]()
            except (MlflowException, OSError) as error:
                names = ", ".join(what for what, _ in reversed(created))
                logger.warning("left behind: %s (%s)", names, reason(error))
                if is_away(error):
                    break
            created.pop()
        raise


def _delete_empty(client: MlflowClient, name: str) -> None:
    """Delete a registered model, unless another run has given it a version meanwhile."""
    if not client.search_model_versions(f"name = '{name}'"):
        client.delete_registered_model(name)


def _write(
    trained: torch.nn.Module,
    folded: torch.nn.Module,
    registration: Registration,
    folder: Path,
) -> dict[str, str]:
    """Write all files of the version, each proven; returns its tags, with the files' sizes."""
    name, shape = registration.name, registration.image_shape
    images = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, expected = trained(images), folded(images)
    with _torch_errors(f"cannot export {name}"):
        _save_program(folded, folder, images, logits, registration.preprocessing)
    refuse_pickled_code(folder)
    with _torch_errors(f"the exported {name} does not run"):
        _check_program(folder, name, images, logits)
    experiment_yaml = portable_yaml(registration.experiment)
    try:
        packed = models.pack(
            trained,
            folder / PACKED,
            metadata={
                "experiment": registration.experiment.name,
                "experiment_yaml": experiment_yaml,
                "preprocessing": dict(registration.preprocessing),
                "source_run": registration.run_id,
                **registration.metadata,
            },
        )
        with torch.inference_mode():
            same = torch.equal(models.unpack(folder / PACKED)(images), expected)
    except ModelError as error:
        raise PipelineError(f"cannot pack {name}: {error}") from error
    if not same:
        raise PipelineError(f"the packed {name} gives other logits than the folded network")
    save_training(folder, trained, experiment_yaml)
    (folder / EXPERIMENT).write_text(experiment_yaml)
    (folder / CARD).write_text(registration.model_card)
    (folder / PREPROCESSING).write_text(json.dumps(dict(registration.preprocessing), indent=2))
    registration.predictions.save(folder / PREDICTIONS)
    return {
        **registration.tags,
        "stored_bytes": str(packed.tensor_bytes),
        "packed_bytes": str(packed.file_bytes),
    }


@contextlib.contextmanager
def _torch_errors(doing: str) -> Iterator[None]:
    """Turn what torch raises on a graph into a PipelineError that begins with `doing`."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # the latter from guards in the graph
        raise PipelineError(f"{doing}: {reason(error)}") from error


def _save_program(
    folded: torch.nn.Module,
    folder: Path,
    images: torch.Tensor,
    logits: torch.Tensor,
    preprocessing: Mapping[str, object],
) -> None:
    """Write an MLflow model of the network into `folder`."""
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    # Unnamed, for MLflow's scoring server hands named inputs over as a dict, which it then refuses.
    def batches_like(tensor: torch.Tensor) -> Schema:
        return Schema([TensorSpec(np.dtype("float32"), (-1, *tensor.shape[1:]))])

    # Requirements are given, for inferring them starts a process that loads the model.
    mlflow.pytorch.save_model(
        folded,
        str(folder),
        signature=ModelSignature(batches_like(images), batches_like(logits)),
        # From an example of one image the exported graph would take no other batch size.
        input_example=np.zeros((2, *images.shape[1:]), np.float32),
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"],
        metadata=dict(preprocessing),
    )
    strip_archive(folder / PROGRAM)


def _check_program(folder: Path, name: str, images: torch.Tensor, logits: torch.Tensor) -> None:
    """Load what was written and compare its logits, for a batch, two images and one."""
    import mlflow.pytorch

    allowed = TOLERANCE * max(1.0, logits.abs().max().item())
    with no_buffer_warning(), torch.inference_mode():
        loaded = mlflow.pytorch.load_model(str(folder))
        for count in (len(images), 2, 1):
            difference = (loaded(images[:count]) - logits[:count]).abs().max().item()
            if not difference <= allowed:
                raise PipelineError(
                    f"the exported {name} gives other logits than the trained network: "
                    f"they differ by {difference:.2g} for {count} images, {allowed:.2g} is allowed"
                )


def _address(folder: Path, logged: LoggedModel) -> None:
    """Write into MLmodel whose model it is, and not the folder that it was made in."""
    from mlflow.models import Model

    description = Model.load(str(folder))
    description.artifact_path = f"models:/{logged.model_id}"
    description.model_uuid = description.model_id = logged.model_id
    description.run_id = logged.source_run_id
    description.save(str(folder / "MLmodel"))


def _create_version(
    client: MlflowClient,
    registration: Registration,
    logged: LoggedModel,
    tags: Mapping[str, str],
    undo: Undo,
) -> str:
    """The number of a new version of the name, which is created if missing."""
    from mlflow.exceptions import MlflowException

    name = registration.name
    try:
        client.create_registered_model(name)
        undo(f"registered model {name}", partial(_delete_empty, client), name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        # Not `models:/<id>`, which MLflow looks up in its global store, whatever the client's.
        logged.artifact_location,
        logged.source_run_id,
        tags=dict(tags),
        model_id=logged.model_id,
    )
    number = str(version.version)
    undo(f"version {number} of {name}", client.delete_model_version, name, number)
    return number
