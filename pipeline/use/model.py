"""A trained network to be used: opened by its name in the registry, or from its packed file.

Only the packed file is read, tensors and plain text, in which nothing can run. The registered
program beside it (``data/model.pt2``) is for those who have no Ternforge: torch executes code that
such a file may hold.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import models
from pipeline.config import Data, Experiment, PipelineError, Scaling, Tracking
from pipeline.experiments import catalog
from pipeline.preprocessing import Preprocessing
from pipeline.settings import override, parse_yaml
from pipeline.stores import NotRegisteredError, TrackingStore, open_tracking

if TYPE_CHECKING:
    from models import PackedFile
    from pipeline.registry.versions import Version

SUFFIX = ".safetensors"

#: Images that a network sees together, where nobody says otherwise: a laptop's memory holds them.
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class UsableModel:
    """A network and all that is needed to use it.

    Attributes:
        origin: where it comes from: a file, or ``models:/NAME/VERSION``.
        name: of its experiment.
        network: folded, in eval mode, on the CPU: images (N, C, H, W) to logits (N, classes).
        packed: the file that it was read from, which is there as long as this object.
        preprocessing: how an image becomes an input.
        experiment: that trained it, with the user's settings of data and tracking.
        version: in the registry; None of a file.
        store: of the version.
    """

    origin: str
    name: str
    network: nn.Module = field(repr=False)
    packed: PackedFile = field(repr=False)
    preprocessing: Preprocessing
    experiment: Experiment
    version: Version | None = None
    store: TrackingStore | None = None

    @property
    def recorded(self) -> dict[str, Any]:
        """The evaluation when it was registered: top1, images, ...; empty where none is named."""
        found = self.packed.metadata.get("evaluation")
        if not isinstance(found, dict):
            return {}
        figures = (found.get("top1"), found.get("images"))
        return found if all(isinstance(figure, int | float) for figure in figures) else {}

    @property
    def fingerprint(self) -> str:
        """Of the data that it was trained and tested with; empty where nobody said."""
        data = self.packed.metadata.get("data")
        return str(data.get("fingerprint", "")) if isinstance(data, dict) else ""


def open_model(reference: str, settings: Iterable[str] = ()) -> UsableModel:
    """Open a network for use.

    Args:
        reference: ``models:/NAME@ALIAS``, ``models:/NAME/3``, in short ``NAME@ALIAS``, ``NAME@3``,
            or ``NAME`` (the champion if there is one, else the candidate); or the path of a packed
            file.
        settings: ``a.b=value`` of the user's own: where data and registry are.

    Raises:
        PipelineError: one line, when there is no such thing, or it cannot be used.
        OSError: when its folder is closed.
    """
    settings = list(settings)
    path = Path(reference)
    if path.is_file():
        return _read(path, reference, settings)
    if path.suffix == SUFFIX or (os.sep in reference and not reference.startswith("models:")):
        raise PipelineError(f"there is no packed file {reference}")
    return _open_registered(reference, settings)


def open_registry(settings: Iterable[str]) -> TrackingStore:
    """The registry that settings name, which has to be there.

    Raises:
        NotRegisteredError: when it is not.
        PipelineError: when it cannot be used.
    """
    tracking = _tracking(settings)
    database = tracking.runs.absolute() / "mlflow.db"
    is_default = not (tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))
    if is_default and not database.exists():
        raise NotRegisteredError(
            f"there is no registry at {database}: no training has registered a model there; "
            "tracking.runs= or tracking.uri= names another"
        )
    return open_tracking(tracking.uri, tracking.runs.absolute())


def _tracking(settings: Iterable[str]) -> Tracking:
    """The section ``tracking`` as settings change it."""
    wanted = [word for word in settings if word.startswith("tracking.")]
    carrier = Experiment(name="registry", dataset="digits", backbone="none")
    return override(carrier, wanted).tracking


def _open_registered(reference: str, settings: list[str]) -> UsableModel:
    from pipeline.registry.versions import fetch_packed, find_version, parse_reference, versions_of

    parsed = parse_reference(reference)
    try:
        store = open_registry(settings)
        versions_of(parsed.name, store)
    except NotRegisteredError as error:
        known = parsed.name in catalog()
        hint = f" (--experiment {parsed.name} trains it)" if known else ""
        raise PipelineError(f"{error}{hint}") from None
    version = find_version(parsed, store)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ternforge-"))
        path = fetch_packed(version, store, Path(folder))
        origin = f"models:/{version.name}/{version.number}"
        model = _read(path, origin, settings, version, store)
        weakref.finalize(model, stack.pop_all().close)
    return model


def _read(
    path: Path,
    origin: str,
    settings: list[str],
    version: Version | None = None,
    store: TrackingStore | None = None,
) -> UsableModel:
    """Read a packed file whole, and try the network on an image."""
    try:
        packed = models.read_packed(path)
        network = models.unpack(path)
    except models.ModelError as error:
        raise PipelineError(str(error).replace(str(path), origin)) from None
    metadata = packed.metadata
    text, values = metadata.get("experiment_yaml"), metadata.get("preprocessing")
    if not isinstance(text, str) or not isinstance(values, dict):
        raise PipelineError(
            f"{origin} does not say how images become its inputs: it was packed by models.pack "
            "alone, not registered; models.unpack reads it"
        )
    try:
        preprocessing = Preprocessing.from_dict(values)
        experiment = _portable(parse_yaml(text, "its experiment"))
    except PipelineError as error:
        raise PipelineError(f"{origin} cannot be used: {error}") from None
    _try_network(network, preprocessing, origin)
    return UsableModel(
        origin=origin,
        name=experiment.name,
        network=network,
        packed=packed,
        preprocessing=preprocessing,
        experiment=override(experiment, settings),
        version=version,
        store=store,
    )


def _portable(experiment: Experiment) -> Experiment:
    """The experiment without places of another machine, which a file must not choose for us."""
    kept = ("max_per_class", "side", "format", "quality", "passthrough", "synthetic")
    data = Data(**{name: getattr(experiment.data, name) for name in kept})
    ours = {"data": data, "scaling": Scaling(), "tracking": Tracking()}
    return experiment.model_copy(update=ours)


def _try_network(network: nn.Module, preprocessing: Preprocessing, origin: str) -> None:
    """Refuse a network that does not fit what the file says of its inputs and outputs."""
    classes = len(preprocessing.class_names)
    shape: tuple[int, ...] | None = None
    try:
        with torch.inference_mode():
            shape = tuple(network(torch.zeros(1, *preprocessing.input_shape)).shape)
    except RuntimeError as error:
        problem = f"refuses images of shape {preprocessing.input_shape}: {error}".split("\n")[0]
        raise PipelineError(f"{origin} cannot be used: its network {problem}") from None
    if shape != (1, classes):
        raise PipelineError(
            f"{origin} cannot be used: its network gives {shape} for an image, and {classes} "
            "classes are named"
        )
