"""The model registry: a trained network, folded, exported and proven to load elsewhere.

A version is a graph written by `torch.export` (`model.pt2`) with a dynamic batch size: it loads
with torch and MLflow alone, without this project, and unpickles no code. The alias is moved to a
new version only after that version has been read back and has given the trained net's logits.

Beside the graph lies what another training can begin with: the trained network's own tensors
(`training/weights.safetensors`, of a quantized one the latent weights) and its experiment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.artifact import (
    EXPERIMENT,
    TRAINING,
    WEIGHTS,
    no_buffer_warning,
    refuse_pickled_code,
    save_companions,
    strip_archive,
)
from pipeline.config import Experiment, PipelineError, nearest
from pipeline.stores import NotRegisteredError, TrackingStore, is_away, reason, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the logits, against the largest one (at least 1)
LONGEST_DESCRIPTION = 5000  # characters, MLflow's limit
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
    """

    name: str
    version: int
    uri: str
    size_bytes: int


def register(
    model: torch.nn.Module,
    name: str,
    *,
    store: TrackingStore,
    run_id: str,
    example_shape: tuple[int, int, int],
    reference: torch.nn.Module,
    experiment: Experiment,
    model_card: str,
    preprocessing: Mapping[str, object],
    tags: Mapping[str, str],
    alias: str = "candidate",
) -> RegisteredModel:
    """Register `model` as the next version of `name`.

    Args:
        model: the folded network, plain torch layers; on the CPU, in eval mode.
        run_id, experiment: of its training.
        example_shape: (C, H, W) of a float32 input image.
        reference: the network as it was trained, on the CPU, in eval mode; `model` must give its
            logits (N, classes). Its state dict is kept too, for another training to begin with.
        model_card: markdown; the version's description and the file `model_card.md`.
        preprocessing: JSON values: how to turn an image into an input and an output into a class
            name; in `MLmodel` and in `preprocessing.json`.
        tags, alias: of the version; the alias is moved to it once it has been verified.

    Raises:
        PipelineError: store or `torch.export` refuse, the export holds pickled code or gives other
            logits. After any error the alias is where it was and what was created is deleted.
    """
    images = torch.randn(7, *example_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = reference(images)
    with (
        store_errors(f"cannot register {name} in {store.uri}"),
        tempfile.TemporaryDirectory(prefix="ternforge-") as scratch,
        _undone_on_error() as undo,
    ):
        version = _take_up(store, name, run_id, images, logits)
        if version is None:
            experiment_id = store.client.get_run(run_id).info.experiment_id
            logged = store.client.create_logged_model(experiment_id, name, run_id, dict(tags))
            undo(f"model {logged.model_id}", store.client.delete_logged_model, logged.model_id)
            folder = Path(scratch, "model")
            with _torch_errors(f"cannot export {name}"):
                _save(model, folder, logged, images, logits, preprocessing)
            save_companions(folder, model_card, reference, experiment)
            refuse_pickled_code(folder)
            store.client.log_model_artifacts(logged.model_id, str(folder))
            store.client.finalize_logged_model(logged.model_id, "READY")
            number = _create_version(store.client, name, logged, model_card, tags, undo)
            size = _verify(store, name, number, images, logits)
            version = _Version(number, logged.model_id, size)
        _publish(store.client, name, version, run_id, alias)
    uri = f"models:/{name}@{alias}"
    return RegisteredModel(name, int(version.number), uri, version.size_bytes)


@dataclass(frozen=True)
class _Version:
    """A verified version: its number, its logged model, and the bytes of its graph."""

    number: str
    model_id: str
    size_bytes: int


def _take_up(
    store: TrackingStore, name: str, run_id: str, images: torch.Tensor, logits: torch.Tensor
) -> _Version | None:
    """The version that a process gave this run before it was killed.

    A model that it left without a version is deleted.
    """
    client = store.client
    experiment_id = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    model_ids = {model.artifact_location: model.model_id for model in models if model.name == name}
    taken_up = None
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        model_id, number = model_ids.pop(str(version.source), None), str(version.version)
        if model_id is None:
            continue
        try:
            size = _verify(store, name, number, images, logits)
        except PipelineError:  # of weights that the run had before, or not ours any more
            continue
        taken_up = _Version(number, model_id, size)
    for model_id in model_ids.values():
        client.delete_logged_model(model_id)
    return taken_up


def _publish(client: MlflowClient, name: str, version: _Version, run_id: str, alias: str) -> None:
    """Name the version as what its run gave, and let the alias point to it, but never back."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    named = [] if outputs is None else [output.model_id for output in outputs.model_outputs]
    if version.model_id not in named:
        client.log_outputs(run_id, [LoggedModelOutput(version.model_id, step=0)])
    if int(client.get_registered_model(name).aliases.get(alias, 0)) < int(version.number):
        client.set_registered_model_alias(name, alias, version.number)


@dataclass(frozen=True)
class FetchedTraining:
    """What another training can begin with.

    Attributes:
        version: of the registered model.
        weights: safetensors, the trained network's state dict.
        experiment: YAML of the experiment that trained it.
    """

    version: str
    weights: Path
    experiment: Path


def fetch_training(uri: str, store: TrackingStore, folder: Path) -> FetchedTraining:
    """Fetch the trained network's own tensors and the experiment of a registered version.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        folder: where the files go.

    Raises:
        PipelineError: no such name, alias or version, the store is away, or the version has been
            registered without these files.
    """
    import mlflow.artifacts

    parts = re.fullmatch(r"models:/([^@/']+)(?:@([^@/]+)|/(\d+))", uri)
    if parts is None:
        raise PipelineError(f"{uri!r} names no version; write models:/NAME@ALIAS or models:/NAME/3")
    name = parts[1]
    with store_errors(f"cannot fetch {uri} from {store.uri}"):
        number = _find_version(store, name, parts[2] or parts[3], is_alias=parts[2] is not None)
        source = store.client.get_model_version_download_uri(name, number)
        listed = mlflow.artifacts.list_artifacts(
            artifact_uri=f"{source}/{TRAINING}", tracking_uri=store.client.tracking_uri
        )
        if not {WEIGHTS, EXPERIMENT} <= {Path(file.path).name for file in listed}:
            raise PipelineError(
                f"version {number} of {name} was registered without the weights that another "
                f"training could begin with ({TRAINING}/{WEIGHTS}); register it anew"
            )
        fetched = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{source}/{TRAINING}",
            dst_path=str(folder),
            tracking_uri=store.client.tracking_uri,
        )
    return FetchedTraining(number, Path(fetched, WEIGHTS), Path(fetched, EXPERIMENT))


def _find_version(store: TrackingStore, name: str, wanted: str, *, is_alias: bool) -> str:
    """The number of the version of `name` that an alias or a number means."""
    from mlflow.exceptions import MlflowException

    try:
        registered = store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in store.client.search_registered_models()]
        hint = nearest(name, names) if names else "; it has none"
        raise NotRegisteredError(f"{store.uri} has no registered model {name}{hint}") from None
    if is_alias:
        if wanted not in registered.aliases:
            hint = nearest(wanted, registered.aliases) if registered.aliases else "; it has none"
            raise NotRegisteredError(f"registered model {name} has no alias {wanted}{hint}")
        return str(registered.aliases[wanted])
    numbers = [int(found.version) for found in store.client.search_model_versions(f"name='{name}'")]
    if int(wanted) not in numbers:
        listed = ", ".join(map(str, sorted(numbers)))
        raise PipelineError(f"registered model {name} has no version {wanted}; it has {listed}")
    return str(int(wanted))


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


@contextlib.contextmanager
def _torch_errors(doing: str) -> Iterator[None]:
    """Turn what torch raises on a graph into a PipelineError that begins with `doing`."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # the latter from guards in the graph
        raise PipelineError(f"{doing}: {reason(error)}") from error


def _save(
    model: torch.nn.Module,
    folder: Path,
    logged: LoggedModel,
    images: torch.Tensor,
    logits: torch.Tensor,
    preprocessing: Mapping[str, object],
) -> None:
    """Write the artifact of an MLflow model into `folder`."""
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    # Unnamed, for MLflow's scoring server hands named inputs over as a dict, which it then refuses.
    def batches_like(tensor: torch.Tensor) -> Schema:
        return Schema([TensorSpec(np.dtype("float32"), (-1, *tensor.shape[1:]))])

    # Requirements are given, for inferring them starts a process that loads the model.
    mlflow.pytorch.save_model(
        model,
        str(folder),
        mlflow_model=Model(
            artifact_path=f"models:/{logged.model_id}",  # not the folder, which may move
            model_uuid=logged.model_id,
            model_id=logged.model_id,
            run_id=logged.source_run_id,
        ),
        signature=ModelSignature(batches_like(images), batches_like(logits)),
        # From an example of one image the exported graph would take no other batch size.
        input_example=np.zeros((2, *images.shape[1:]), np.float32),
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"],
        metadata=dict(preprocessing),
    )
    strip_archive(folder / "data" / "model.pt2")
    (folder / "preprocessing.json").write_text(json.dumps(dict(preprocessing), indent=2))


def _create_version(
    client: MlflowClient,
    name: str,
    logged: LoggedModel,
    model_card: str,
    tags: Mapping[str, str],
    undo: Undo,
) -> str:
    """The number of a new version of `name`, which is created if missing."""
    from mlflow.exceptions import MlflowException

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
        description=model_card[:LONGEST_DESCRIPTION],
        model_id=logged.model_id,
    )
    number = str(version.version)
    undo(f"version {number} of {name}", client.delete_model_version, name, number)
    return number


def _verify(
    store: TrackingStore, name: str, version: str, images: torch.Tensor, logits: torch.Tensor
) -> int:
    """Read the version back and compare its logits, for a batch, two images and one.

    Returns:
        Bytes of its graph.
    """
    import mlflow.artifacts
    import mlflow.pytorch
    from mlflow.models import Model

    source = store.client.get_model_version_download_uri(name, version)
    allowed = TOLERANCE * max(1.0, logits.abs().max().item())
    with (
        tempfile.TemporaryDirectory(prefix="ternforge-") as scratch,
        _torch_errors(f"version {version} of {name} does not run"),
        no_buffer_warning(),
        torch.inference_mode(),
    ):
        folder = mlflow.artifacts.download_artifacts(
            source, dst_path=scratch, tracking_uri=store.client.tracking_uri
        )
        # It may have been changed since. Pickles are refused by MLflow, see `pipeline.stores`.
        if Model.load(folder).flavors["pytorch"].get("code"):
            raise PipelineError(f"version {version} of {name} brings code, which is not run")
        loaded = mlflow.pytorch.load_model(folder)
        for count in (len(images), 2, 1):
            difference = (loaded(images[:count]) - logits[:count]).abs().max().item()
            if not difference <= allowed:
                raise PipelineError(
                    f"version {version} of {name} gives other logits than the trained network: "
                    f"they differ by {difference:.2g} for {count} images, {allowed:.2g} is allowed"
                )
        return Path(folder, "data", "model.pt2").stat().st_size
