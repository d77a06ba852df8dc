"""Versions in the registry: found by name, listed, and their files fetched.

Of a version only files are read that cannot run code: safetensors, YAML and plain text. Its
program (``data/model.pt2``) is for others: torch runs code that such a file may hold.
"""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import PipelineError, nearest
from pipeline.registry.predictions import NotComparableError, Predictions
from pipeline.stores import NotRegisteredError, TrackingStore, store_errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION, CANDIDATE = "champion", "candidate"

#: Tag of a version that was trained on made-up images, where it is ``true``.
SYNTHETIC_TAG = "synthetic"

#: Files of a version that are read again, and the folder of what another training begins with.
PACKED, PREDICTIONS = "packed.safetensors", "evaluation.safetensors"
TRAINING, WEIGHTS, EXPERIMENT = "training", "weights.safetensors", "experiment.yaml"

_PREFIX = "models:/"
_HOW_TO_NAME = "write models:/NAME@ALIAS or models:/NAME/3"


@dataclass(frozen=True)
class Reference:
    """What names a version.

    Attributes:
        name: of the registered model.
        wanted: an alias, the number of a version, or None: the champion if there is one, else
            the candidate.
    """

    name: str
    wanted: str | int | None = None

    def __str__(self) -> str:
        if self.wanted is None:
            return self.name
        return f"{_PREFIX}{self.name}{'/' if isinstance(self.wanted, int) else '@'}{self.wanted}"


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        aliases: that point to it, in alphabetical order.
        tags: of the version, all text.
        created: when, in the time zone of this machine.
        run_id: MLflow run that trained it; empty where nobody said.
        source: URI of its files.
    """

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    created: datetime.datetime
    run_id: str
    source: str

    def __str__(self) -> str:
        return f"version {self.number} of {self.name}"


def parse_reference(text: str) -> Reference:
    """Read ``models:/NAME@ALIAS`` or ``models:/NAME/3``, or the short forms.

    These are ``NAME@ALIAS``, ``NAME@3`` and ``NAME``.

    Raises:
        PipelineError: for anything else.
    """
    full = re.fullmatch(r"models:/([^@/:]+)(?:@([\w-]+)|/(\d{1,9}))", text)
    if full is not None:
        return Reference(full[1], full[2] or int(full[3]))
    short = re.fullmatch(r"([^@/:]+)(?:@([\w-]+))?", text)
    if short is None or text.startswith("models:"):
        raise PipelineError(f"{text!r} names no version; {_HOW_TO_NAME}")
    wanted = short[2]
    is_number = wanted is not None and re.fullmatch(r"\d{1,9}", wanted)
    return Reference(short[1], int(wanted) if is_number else wanted)


def short_commit(commit: str) -> str:
    """A commit of git as far as people need it; whether something was changed since stays."""
    digits, dash, changed = commit.partition("-")
    return f"{digits[:12]}{dash}{changed}"


def find_version(reference: Reference, store: TrackingStore) -> Version:
    """The version that a reference means.

    Raises:
        NotRegisteredError: no such model, or no such alias.
        PipelineError: no such version, or the store is away.
    """
    with store_errors(f"cannot look up {reference} in {store.uri}"):
        registered = _registered(reference.name, store)
        number = _wanted_number(reference, registered)
        versions = _versions(registered, store)
    if number not in versions:
        listed = ", ".join(map(str, sorted(versions)))
        raise PipelineError(
            f"registered model {reference.name} has no version {number}; it has {listed or 'none'}"
        )
    return versions[number]


def versions_of(name: str, store: TrackingStore) -> list[Version]:
    """All versions of a registered model, by number.

    Raises:
        NotRegisteredError: there is no such model.
        PipelineError: the store is away.
    """
    with store_errors(f"cannot look up {name} in {store.uri}"):
        versions = _versions(_registered(name, store), store)
    return [versions[number] for number in sorted(versions)]


def list_versions(store: TrackingStore, pattern: str = "*") -> list[Version]:
    """All versions of the models whose names match a pattern, by name, the newest first.

    Args:
        pattern: as of file names, such as ``mnist*``.

    Raises:
        PipelineError: the store is away.
    """
    with store_errors(f"cannot list the models in {store.uri}"):
        found = [
            version
            for registered in _pages(store.client.search_registered_models)
            if fnmatchcase(registered.name, pattern)
            for version in _versions(registered, store).values()
        ]
    return sorted(found, key=lambda version: (version.name, -version.number))


def _registered(name: str, store: TrackingStore) -> RegisteredModel:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in _pages(store.client.search_registered_models)]
        hint = nearest(name, names) if names else "; it has none"
        raise NotRegisteredError(f"{store.uri} has no registered model {name}{hint}") from None


def _wanted_number(reference: Reference, registered: RegisteredModel) -> int:
    """The number of the version that a reference means; a number need not be there."""
    if isinstance(reference.wanted, int):
        return reference.wanted
    aliases, name = registered.aliases, reference.name
    if reference.wanted is not None:
        if reference.wanted not in aliases:
            hint = nearest(reference.wanted, aliases) if aliases else "; it has none"
            raise NotRegisteredError(
                f"registered model {name} has no alias {reference.wanted}{hint}"
            )
        return int(aliases[reference.wanted])
    for alias in (CHAMPION, CANDIDATE):
        if alias in aliases:
            return int(aliases[alias])
    others = " or ".join(f"{name}@{alias}" for alias in sorted(aliases)) or f"{name}@1"
    raise NotRegisteredError(
        f"registered model {name} has neither a champion nor a candidate; write {others}"
    )


def _versions(registered: RegisteredModel, store: TrackingStore) -> dict[int, Version]:
    """The versions of a registered model by number."""
    aliases: dict[int, list[str]] = {}
    for alias, number in registered.aliases.items():
        aliases.setdefault(int(number), []).append(alias)
    found = _pages(store.client.search_model_versions, f"name='{registered.name}'")
    return {
        int(version.version): _version(version, aliases.get(int(version.version), []))
        for version in found
    }


def _version(version: ModelVersion, aliases: list[str]) -> Version:
    created = datetime.datetime.fromtimestamp(version.creation_timestamp / 1000).astimezone()
    return Version(
        version.name,
        int(version.version),
        tuple(sorted(aliases)),
        dict(version.tags),
        created,
        version.run_id or "",
        str(version.source),
    )


def _pages(search: Callable[..., Any], filter_string: str | None = None) -> Iterator[Any]:
    """What a search of MLflow's client finds, page by page."""
    token = None
    while True:
        page = search(filter_string=filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


@dataclass(frozen=True)
class FetchedTraining:
    """What another training can begin with.

    Attributes:
        version: its number.
        weights: safetensors, the trained network's state dict.
        experiment: YAML of the experiment that trained it.
    """

    version: int
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
    if not uri.startswith(_PREFIX):
        raise PipelineError(f"{uri!r} names no version; {_HOW_TO_NAME}")
    version = find_version(parse_reference(uri), store)
    weights, experiment = (
        _fetch(version, f"{TRAINING}/{name}", store, folder) for name in (WEIGHTS, EXPERIMENT)
    )
    if weights is None or experiment is None:
        raise PipelineError(
            f"{version} was registered without the weights that another training could begin with "
            f"({TRAINING}/{WEIGHTS}); register it anew"
        )
    return FetchedTraining(version.number, weights, experiment)


def fetch_packed(version: Version, store: TrackingStore, folder: Path) -> Path:
    """Fetch the packed network of a version; nothing of it is read yet.

    Args:
        folder: where the file goes.

    Raises:
        PipelineError: the store is away, or the version is older than packed files.
    """
    path = _fetch(version, PACKED, store, folder)
    if path is None:
        raise PipelineError(
            f"{version} was registered without a packed network ({PACKED}), by an older Ternforge "
            "or another program; train and register it anew"
        )
    return path


def fetch_experiment(version: Version, store: TrackingStore, folder: Path) -> Path | None:
    """Fetch the YAML of the experiment that trained a version; None where it has none."""
    return _fetch(version, EXPERIMENT, store, folder)


def read_predictions(version: Version, store: TrackingStore) -> Predictions:
    """What the version answered to each test image.

    Raises:
        NotComparableError: the file is missing or damaged.
        PipelineError: the store is away.
    """
    with tempfile.TemporaryDirectory(prefix="ternforge-") as scratch:
        path = _fetch(version, PREDICTIONS, store, Path(scratch))
        if path is None:
            raise NotComparableError(f"{version} was registered without its {PREDICTIONS}")
        try:
            return Predictions.load(path)
        except NotComparableError as error:
            raise NotComparableError(f"{version}: {error}") from None


def _fetch(version: Version, name: str, store: TrackingStore, folder: Path) -> Path | None:
    """One file of a version, into a folder; None where the version has no such file."""
    import mlflow.artifacts

    uri, parent = store.client.tracking_uri, str(Path(name).parent)
    with store_errors(f"cannot fetch {name} of {version} from {store.uri}"):
        source = store.client.get_model_version_download_uri(version.name, str(version.number))
        place = source if parent == "." else f"{source}/{parent}"
        listed = mlflow.artifacts.list_artifacts(artifact_uri=place, tracking_uri=uri)
        files = {Path(file.path).name for file in listed if not file.is_dir}
        if Path(name).name not in files:
            return None
        fetched = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{source}/{name}", dst_path=str(folder), tracking_uri=uri
        )
    return Path(fetched)
