"""The model registry: a trained network, folded, exported and proven to load elsewhere.

A version is a graph written by `torch.export` (`model.pt2`) with a dynamic batch size: it loads
with torch and MLflow alone, without this project, and unpickles no code. The alias is moved to a
new version only after that version has been read back and has given the trained net's logits.

Beside the graph lies what another training can begin with: the trained network's own tensors
(`training/weights.safetensors`, of a quantized one the latent weights) and its experiment.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import pickletools
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.config import Data, Experiment, PipelineError, Scaling, Tracking, nearest
from pipeline.stores import NotRegisteredError, TrackingStore, reason, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the logits, against the largest one (at least 1)
LONGEST_DESCRIPTION = 5000  # characters, MLflow's limit
PICKLE_START = b"\x80"  # of every pickle since protocol 2; torch writes no older ones
# What a pickle needs to get hold of an object or to call one; without these it is plain data.
CODE_OPCODES = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}
CODE_OPCODES |= {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4"}
TRAINING, WEIGHTS, EXPERIMENT = "training", "weights.safetensors", "experiment.yaml"


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
    from mlflow.entities import LoggedModelOutput

    client = store.client
    images = torch.randn(7, *example_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = reference(images)
    with (
        store_errors(f"cannot register {name} in {store.uri}"),
        tempfile.TemporaryDirectory(prefix="ternforge-") as scratch,
        contextlib.ExitStack() as undo,
    ):
        experiment_id = client.get_run(run_id).info.experiment_id
        logged = client.create_logged_model(experiment_id, name, run_id, dict(tags))
        undo.callback(_delete, client.delete_logged_model, logged.model_id)
        folder = Path(scratch, "model")
        with _torch_errors(f"cannot export {name}"):
            _save(model, folder, logged, images, logits, preprocessing)
        _save_companions(folder, model_card, reference, experiment)
        refuse_pickled_code(folder)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        version = _create_version(client, name, logged, model_card, tags, undo)
        with _torch_errors(f"version {version} of {name} does not run"):
            _verify(store, name, version, images, logits)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        client.set_registered_model_alias(name, alias, version)
        undo.pop_all()
        size = (folder / "data" / "model.pt2").stat().st_size
    return RegisteredModel(name, int(version), f"models:/{name}@{alias}", size)


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


def _delete(delete: Callable[..., None], *what: str) -> None:
    """Delete what a failed registration created; the failure itself is what gets reported."""
    from mlflow.exceptions import MlflowException

    try:
        delete(*what)
    except (MlflowException, OSError) as error:
        logger.warning("left behind: %s (%s)", " ".join(what), reason(error))


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
    _strip(folder / "data" / "model.pt2")
    (folder / "preprocessing.json").write_text(json.dumps(dict(preprocessing), indent=2))


def _save_companions(
    folder: Path, model_card: str, trained: torch.nn.Module, experiment: Experiment
) -> None:
    """Write the card and what `fetch_training` gives back, without where the training ran."""
    (folder / "model_card.md").write_text(model_card)
    (folder / TRAINING).mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    save_file(tensors, folder / TRAINING / WEIGHTS)
    elsewhere = {"root": None, "raw": None, "prepared": Data().prepared}
    portable = {
        "data": experiment.data.model_copy(update=elsewhere),
        "scaling": Scaling(),
        "tracking": Tracking(),
    }
    (folder / TRAINING / EXPERIMENT).write_text(experiment.model_copy(update=portable).to_yaml())


def _strip(archive: Path) -> None:
    """Take out of a .pt2 archive its pickle of tensors and the paths of this machine.

    The example batch is the one member that torch always writes as a pickle. Both torch and
    MLflow insist on reading it and on one entry per argument, so `((0,), {})` stays: a stream
    that names no type. Each node of the graph keeps the stack trace of its making, with the
    source paths of this checkout; nothing reads that.
    """
    with _no_buffer_warning():
        program = torch.export.load(archive)
    program.example_inputs = ((0,), {})
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    torch.export.save(program, archive)


def _create_version(
    client: MlflowClient,
    name: str,
    logged: LoggedModel,
    model_card: str,
    tags: Mapping[str, str],
    undo: contextlib.ExitStack,
) -> str:
    """The number of a new version of `name`, which is created if missing."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
        undo.callback(_delete, partial(_delete_empty, client), name)
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
    undo.callback(_delete, client.delete_model_version, name, number)
    return number


def _no_buffer_warning() -> warnings.catch_warnings[None]:
    """Torch warns that weights it has just read share memory with a read-only buffer."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def refuse_pickled_code(folder: Path) -> None:
    """Raise PipelineError if a file below `folder` is a pickle that could run code."""
    for name, content in _members(folder):
        if not content.startswith(PICKLE_START):
            continue
        if _opcodes(content) & CODE_OPCODES:
            raise PipelineError(f"the exported model holds pickled code in {name}")


def _opcodes(content: bytes) -> set[str]:
    """What an unpickler would carry out: up to the end, or to the first byte it cannot read.

    Numbers may begin like a pickle; of most the protocol, the second byte, is one that no
    unpickler takes.
    """
    found: set[str] = set()
    if content[1:2] > bytes([pickle.HIGHEST_PROTOCOL]):
        return found
    with contextlib.suppress(ValueError):
        for opcode, _, _ in pickletools.genops(content):
            found.add(opcode.name)
    return found


def _members(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below `folder`, and every member of the archives among them, to any depth."""
    waiting = [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    while waiting:
        name, content = waiting.pop()
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                waiting += [
                    (f"{name}/{inner}", archive.read(inner)) for inner in archive.namelist()
                ]
        else:
            yield name, content


def _verify(
    store: TrackingStore, name: str, version: str, images: torch.Tensor, logits: torch.Tensor
) -> None:
    """Read the version back and compare its logits, for a batch, two images and one."""
    import mlflow.artifacts
    import mlflow.pytorch

    source = store.client.get_model_version_download_uri(name, version)
    with tempfile.TemporaryDirectory(prefix="ternforge-") as scratch, _no_buffer_warning():
        folder = mlflow.artifacts.download_artifacts(
            source, dst_path=scratch, tracking_uri=store.client.tracking_uri
        )
        loaded = mlflow.pytorch.load_model(folder)
    allowed = TOLERANCE * max(1.0, logits.abs().max().item())
    with torch.inference_mode():
        for count in (len(images), 2, 1):
            difference = (loaded(images[:count]) - logits[:count]).abs().max().item()
            if not difference <= allowed:
                raise PipelineError(
                    f"version {version} of {name} gives other logits than the trained network: "
                    f"they differ by {difference:.2g} for {count} images, {allowed:.2g} is allowed"
                )
