"""Where weights come from that a training begins with (`init_from`), or those of its teacher.

The driver finds them, once, and keeps their tensors in a file that all workers can read. Nothing
that is read here can run code: of a pickle only tensors are taken.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data_prep.locks import wait_for_disk
from pipeline.checkpoints.storage import storage_of
from pipeline.checkpoints.store import CheckpointStore, kept_epoch
from pipeline.config import Experiment, PipelineError, nearest
from pipeline.experiments import catalog
from pipeline.settings import build_experiment, load_yaml
from pipeline.weights import Weights, classification_weights

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

#: What DistributedDataParallel and torch.compile put before the names of a network's tensors.
_WRAPPERS = ("module.", "_orig_mod.")

#: Under which training scripts keep a state dict beside other things.
_STATE_KEYS = ("state_dict", "model")

_SUFFIXES = (".safetensors", ".pt", ".pth")

#: How the name of a version in the registry begins.
_REGISTRY = "models:"


@dataclass(frozen=True)
class _Found:
    """What a source led to; the attributes are those of Weights."""

    tensors: Mapping[str, Tensor]
    origin: str
    experiment: Experiment | None = None
    torchvision: str | None = None


def _say_nothing(line: str) -> None:
    """Where nobody wants to know."""


def resolve(
    source: str, experiment: Experiment, tell: Callable[[str], None] = _say_nothing
) -> Weights:
    """Find the weights that `init_from` or `train.teacher` names, and keep them for the workers.

    Args:
        source: `ResNet18_Weights.IMAGENET1K_V1`, or another of torchvision's for classification,
            downloaded unless torch's hub folder has it; `models:/NAME@ALIAS` or `models:/NAME/3`
            of the registry; a run folder; or a file, .safetensors, .pt or .pth, that holds a state
            dict, or a dict with one under `state_dict` or `model`.
        experiment: says which registry, and the folder of all runs.
        tell: called with a line before something is downloaded.

    Raises:
        PipelineError: there is no such thing, it cannot be read, or it is no state dict.
    """
    path = Path(source).expanduser()
    try:
        if source.startswith(_REGISTRY):
            found = _from_registry(source, experiment)
        elif path.is_dir():
            found = _from_run(source, path)
        elif path.is_file():
            found = _Found(_read_file(path), source)
        else:
            found = _from_torchvision(source, tell)
    except OSError as error:
        raise PipelineError(f"cannot read {source}: {error.strerror or error}") from None
    tensors = _without_wrappers(found.tensors)
    if not tensors:
        raise PipelineError(f"{source} holds no tensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise PipelineError(f"{source} is of no use: not all values of {name} are finite")
    file, digest = _keep(tensors, _kept_weights(experiment))
    return Weights(source, found.origin, file, digest, found.experiment, found.torchvision)


def record(weights: Weights | None) -> dict[str, Any] | None:
    """What a run's record says of the weights that it began with, for `kept`."""
    if weights is None:
        return None
    trained = weights.experiment
    return {
        "source": weights.source,
        "origin": weights.origin,
        "digest": weights.digest,
        "torchvision": weights.torchvision,
        "experiment": None if trained is None else trained.model_dump(mode="json"),
    }


def kept(recorded: Mapping[str, Any], experiment: Experiment) -> Weights | None:
    """The weights that a run began with, from the file that was kept for it.

    Their source may have been changed or deleted since.

    Args:
        recorded: as from `record`.
        experiment: says which folder of all runs.

    Returns:
        None where the file is not there any more, or is damaged.

    Raises:
        PipelineError: the record is damaged.
    """
    digest, trained = str(recorded["digest"]), recorded["experiment"]
    if re.fullmatch("[0-9a-f]{64}", digest) is None:  # which may come from anywhere
        raise PipelineError(f"the run's record of {recorded['source']} is damaged; start a new run")
    file = _kept_weights(experiment) / f"{digest[:16]}.safetensors"
    try:
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                return None
    except OSError:
        return None
    return Weights(
        recorded["source"],
        recorded["origin"],
        file,
        digest,
        None if trained is None else build_experiment(trained),
        recorded["torchvision"],
    )


def _kept_weights(experiment: Experiment) -> Path:
    """Folder of the tensors of all sources, a file each."""
    return experiment.tracking.runs.absolute() / "weights"


def whereabouts(source: str, experiment: Experiment) -> str:
    """Where `resolve` would find a source, as far as it can be told without asking anybody.

    Raises:
        PipelineError: there is no such thing.
    """
    path = Path(source).expanduser()
    if source.startswith(_REGISTRY):
        tracking = experiment.tracking
        is_default = not (tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))
        if is_default and not (tracking.runs / "mlflow.db").exists():
            return f"which is not there: there is no registry{_how_to_train(source)}"
        return "which is looked up when the run begins"
    if path.exists():
        return "which is there"
    file = _hub_file(_torchvision_entry(source))
    return f"in {file}" if file.exists() else f"which would be downloaded to {file.parent}"


def _how_to_train(source: str) -> str:
    """What to do about a model that is not in the registry, where the catalog makes it."""
    name = re.split("[@/]", source.removeprefix(f"{_REGISTRY}/"))[0]
    return f"; train it first: --experiment {name}" if name in catalog() else ""


def _torchvision_entry(source: str) -> WeightsEnum:
    """Torchvision's weights of that name."""
    known = classification_weights()
    if source not in known:
        if "/" in source or source.endswith(_SUFFIXES):
            raise PipelineError(f"there is no file or run folder {source}")
        networks = dict(known.values())  # each with its last entry, the default
        hint = f"; did you mean {networks[source]}?" if source in networks else ""
        raise PipelineError(
            f"{source!r} is no file, no run folder, no models:/NAME@ALIAS, and none of "
            f"torchvision's weights for classification{hint or nearest(source, known)}"
        )
    return known[source][1]


def _from_torchvision(source: str, tell: Callable[[str], None]) -> _Found:
    entry = _torchvision_entry(source)
    name = str(entry)
    tensors = _read_pickle(_downloaded(entry, tell))
    origin = source if source == name else f"{source} ({name})"
    return _Found(tensors, origin, torchvision=name)


def _hub_file(entry: WeightsEnum) -> Path:
    """Where torch's hub folder has the file of torchvision's weights, or would have it."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(entry.url).path).name)


def _downloaded(entry: WeightsEnum, tell: Callable[[str], None]) -> Path:
    """The file of torchvision's weights in torch's hub folder, fetched if it is not there."""
    file = _hub_file(entry)
    if file.exists():
        return file
    tell(f"downloading {entry.url} to {file.parent}")
    digest = torch.hub.HASH_REGEX.search(file.name)  # the name has the first digits of its SHA-256
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            entry.url, str(file), digest.group(1) if digest else None, progress=False
        )
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise PipelineError(
            f"cannot download {entry.url}: {reason}; where there is no network, put that file at "
            f"{file}"
        ) from None
    return file


def _from_registry(source: str, experiment: Experiment) -> _Found:
    from pipeline.registry.versions import fetch_training
    from pipeline.stores import NotRegisteredError, open_tracking

    store = open_tracking(experiment.tracking.uri, experiment.tracking.runs.absolute())
    with tempfile.TemporaryDirectory(prefix="ternforge-") as scratch:
        try:
            fetched = fetch_training(source, store, Path(scratch))
        except NotRegisteredError as error:
            raise PipelineError(f"{error}{_how_to_train(source)}") from None
        try:
            tensors = _read_file(fetched.weights)
            trained = load_yaml(fetched.experiment)
        except PipelineError as error:
            raise PipelineError(f"{source}: {error}") from None
    origin = f"{source} (version {fetched.version})" if "@" in source else source
    return _Found(tensors, origin, trained)


def _from_run(source: str, folder: Path) -> _Found:
    """The weights that a run has as its result so far."""
    file = folder / "run.json"
    try:
        record = json.loads(file.read_text())
        identity, values = record["identity"], record["experiment"]
    except FileNotFoundError:
        raise PipelineError(
            f"{source} is no run folder: it has no run.json, as runs/EXPERIMENT/TIME-IDENTITY has"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise PipelineError(f"{file} is damaged or of another version") from None
    try:
        trained = build_experiment(values)
    except PipelineError as error:
        raise PipelineError(f"{file}: {error}") from None
    skipped: list[str] = []
    store = CheckpointStore(storage_of(trained, folder.absolute()), identity)
    newest = store.newest(skipped.append)
    if newest is None or not newest.epoch:
        raise PipelineError("; ".join([f"{source} has no checkpoint that can be used", *skipped]))
    epoch = kept_epoch(store.history(newest))
    tensors = load_file(store.network_file(epoch))
    note = "; ".join([f"epoch {epoch} of {trained.train.epochs}", *skipped])
    return _Found(tensors, f"{source} ({note})", trained)


def _read_file(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise PipelineError(f"{path} is damaged, or no safetensors file: {error}") from None
    if path.suffix in _SUFFIXES:
        return _read_pickle(path)
    raise PipelineError(f"{path} is none of {', '.join(_SUFFIXES)}, which hold weights")


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file of torch.save, without running what else may be in it."""
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise PipelineError(
            f"{path} is damaged, or holds more than tensors, which is refused because reading it "
            "could run code: save the network's state_dict() alone, best as .safetensors"
        ) from None
    except Exception as error:  # damaged bytes make torch.load raise almost any
        raise PipelineError(
            f"{path} is damaged, or no file of torch.save ({type(error).__name__})"
        ) from None
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return _checked_state(content, path)


def _checked_state(content: Any, path: Path) -> Mapping[str, Tensor]:
    """What was unpickled, if it is names and plain tensors."""
    if not isinstance(content, Mapping):
        raise PipelineError(f"{path} holds no state dict but a {type(content).__name__}")
    for name, value in content.items():
        is_tensor = isinstance(name, str) and isinstance(value, Tensor)
        if not is_tensor or value.is_quantized or value.layout != torch.strided:
            raise PipelineError(
                f"{path} holds no state dict: {name!r} is no plain tensor but "
                f"{type(value).__name__}"
            )
    return content


def _without_wrappers(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under the names that they have in the network itself."""
    for wrapper in _WRAPPERS * 2:  # in either order
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def _keep(tensors: Mapping[str, Tensor], folder: Path) -> tuple[Path, str]:
    """Write the tensors to a file that is named by its content; returns it and its SHA-256."""
    # Each contiguous and on its own, for in a state dict they may share memory.
    plain = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            partial = Path(scratch, "weights.safetensors")
            partial.write_bytes(save(plain))  # save_file would let only this user read them
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            wait_for_disk(partial)
            # Also over a file that is there: should that be damaged, this mends it.
            final = partial.replace(folder / f"{digest[:16]}.safetensors")
            wait_for_disk(folder)
    except (OSError, SafetensorError) as error:
        raise PipelineError(
            f"cannot keep weights in {folder}: {getattr(error, 'strerror', None) or error}; set "
            "tracking.runs to a folder that you may write"
        ) from None
    return final, digest
