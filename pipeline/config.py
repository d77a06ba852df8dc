"""What a run is made of: the Experiment, its parts, and the one override syntax ``a.b=value``.

Everything here is frozen and plain data, so that an Experiment can be hashed, written as YAML,
shipped through Ray and logged by MLflow. No torch, Ray, FFCV or MLflow is imported.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from data_prep.datasets import get_dataset


class PipelineError(Exception):
    """A failure that the user can mend: one line that says what, where, and what would be right.

    Attributes:
        exit_code: of the process: 2 for bad input, 1 for a run that failed.
        run: name of the run that can be continued; None where there is none.
    """

    exit_code = 2
    run: str | None = None


#: A folder of the user's; ``~`` is the home folder, as in a shell.
Folder = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, true is not taken for 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        is_switch = cls.model_fields[str(info.field_name)].annotation is bool
        if isinstance(value, bool) and not is_switch:
            raise PydanticCustomError("boolean", "must be a value, not true or false")
        return value


class Recipe(Section):
    """How to train. Durations are in epochs and are converted to steps once, in ``optim.py``."""

    epochs: PositiveInt = Field(10, description="passes over the training split")
    batch_size: PositiveInt = Field(128, description="images per step over all workers")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="update rule")
    lr: PositiveFloat = Field(0.1, description="peak learning rate")
    momentum: NonNegativeFloat = Field(0.9, lt=1, description="of sgd")
    nesterov: bool = Field(True, description="of sgd")
    weight_decay: NonNegativeFloat = Field(5e-4, description="of weights, not of norms and biases")
    latent_weight_decay: NonNegativeFloat | None = Field(
        None, description="of latent quantized weights; none: as weight_decay"
    )
    schedule: Literal["constant", "cosine", "multistep"] = Field(
        "cosine", description="learning rate over the steps"
    )
    warmup_epochs: NonNegativeFloat = Field(0.0, description="linear rise from zero")
    milestones: tuple[PositiveFloat, ...] = Field((), description="of multistep, in epochs")
    gamma: PositiveFloat = Field(0.1, description="of multistep: factor at each milestone")
    label_smoothing: NonNegativeFloat = Field(0.0, lt=1, description="of the cross-entropy")
    shift: NonNegativeInt = Field(0, description="augmentation: random shift, in pixels")
    flip: bool = Field(False, description="augmentation: random horizontal flip")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of activations")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"train.warmup_epochs={self.warmup_epochs:g} is longer than the whole training, "
                f"train.epochs={self.epochs}"
            )
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError(
                "train.schedule=multistep needs train.milestones, for example [80,120]"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"train.milestones={list(self.milestones)} must rise")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError(
                "train.nesterov=true needs train.momentum above 0; set train.nesterov=false"
            )
        return self


class Data(Section):
    """Where images come from and where their prepared form is kept."""

    root: Folder | None = Field(
        None, description="raw data sets; none: TERNFORGE_DATA, else ./data"
    )
    prepared: Folder = Field(Path("prepared"), description="folder of verified, prepared data")
    backend: Literal["auto", "ffcv", "torch"] = Field(
        "auto", description="reader; auto: ffcv where it is installed"
    )
    synthetic: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="made-up images (train, test) in place of the data set"
    )


class Scaling(Section):
    """On what the training runs."""

    launcher: Literal["ray", "local"] = Field("ray", description="local: in this process, no Ray")
    workers: PositiveInt | None = Field(
        None, description="DDP processes; none: one per GPU, without a GPU 2"
    )
    max_failures: NonNegativeInt = Field(3, description="restarts after a lost worker")
    timeout: float = Field(
        300.0, ge=1, le=86_400, description="seconds until a silent worker is an error"
    )


class Tracking(Section):
    """What is kept of a run, and where."""

    enabled: bool = Field(True, description="log to MLflow")
    register_model: bool = Field(True, description="put the folded model in the MLflow registry")
    uri: str | None = Field(
        None, description="MLflow server; none: MLFLOW_TRACKING_URI, else sqlite under runs"
    )
    runs: Folder = Field(
        Path("runs"), description="folder of run folders and of the MLflow database"
    )
    keep_checkpoints: PositiveInt = Field(2, description="newest ones kept in the run folder")


class Reference(Section):
    """The published figure that an experiment stands beside."""

    what: str
    top1: float | None = Field(None, description="published top-1 accuracy in percent")
    source: str = ""


class Experiment(Section):
    """One training run, in full: data set, backbone, method and recipe, and where it runs."""

    # It names folders and the registered model, which MLflow wants without / : . % and quotes.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_()=,+-]*$")
    dataset: str
    backbone: str = Field(description="call string, for example resnet50(form=cifar)")
    method: str = Field("float", description="call string, for example ternary(expansion=4)")
    seed: NonNegativeInt = Field(0, lt=2**32, description="of weights, order and augmentation")
    train: Recipe = Recipe()
    data: Data = Data()
    scaling: Scaling = Scaling()
    tracking: Tracking = Tracking()
    reference: Reference | None = None

    @property
    def tuned(self) -> bool:
        """Whether the catalog curates this experiment (otherwise its recipe is a default)."""
        return self.reference is not None

    def identity(self, data: str) -> str:
        """Hash of what is trained, on what and how, as 12 hex digits.

        ``data`` stands for the images as the network sees them, see ``launch.run_identity``.
        Where a run is computed and logged (scaling, tracking, folders) is left out: the same
        identity means that a checkpoint of one run can be continued by the other.
        """
        parts = self.model_dump(
            mode="json", include={"dataset", "backbone", "method", "seed", "train"}
        )
        text = json.dumps({**parts, "data": data}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """The resolved experiment as YAML that ``--config`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys: ``{"a": {"b": 1}}`` gives ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def setting_fields() -> dict[str, Any]:
    """Every key that an override can set, with its pydantic field, in the order of the classes."""
    fields: dict[str, Any] = {}
    for key, field in Experiment.model_fields.items():
        if key in ("name", "reference"):
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                fields[f"{key}.{inner}"] = inner_field
        else:
            fields[key] = field
    return fields


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint, ``; did you mean X?``, or all the choices where none is near."""
    options = list(choices)
    found = difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return f"; valid are {', '.join(options)}" if len(options) <= 30 else ""


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Parse ``a.b=value`` words into dotted keys and YAML values.

    Raises:
        PipelineError: for a word without ``=``, an unknown key, or a value that is not YAML.
    """
    fields = setting_fields()
    values: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise PipelineError(f"{word!r} is not an override; write key=value, as train.epochs=3")
        if key not in fields:
            group = [name for name in fields if name.startswith(f"{key}.")]
            if group:
                raise PipelineError(f"{key!r} is a group; set one of {', '.join(group)}")
            hint = nearest(key, fields)
            if "." not in key:
                same = [name for name in fields if name.split(".")[-1] == key]
                hint = f"; did you mean {' or '.join(same)}?" if same else hint
            raise PipelineError(f"unknown setting {key!r}{hint}")
        values[key] = _parse_value(key, text, fields[key].annotation)
    return values


def _parse_value(key: str, text: str, annotation: Any) -> Any:
    if text in ("none", "null"):
        return None
    if annotation in (str, str | None, Folder, Path, Folder | None):
        return text
    # YAML 1.1 reads 010 as eight, 1:30 as ninety, and 1e-4 as text.
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = str(error).splitlines()[0]
        raise PipelineError(f"{key}={text!r} is not a value: {problem}") from None
    return text if isinstance(value, int | float) and not isinstance(value, bool) else value


def build_experiment(values: Mapping[str, Any]) -> Experiment:
    """Validate a nested mapping into an Experiment.

    Raises:
        PipelineError: one line with the first thing that is wrong and what would be right.
    """
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise PipelineError(_first_problem(error)) from None


def override(experiment: Experiment, overrides: Iterable[str]) -> Experiment:
    """The experiment with ``a.b=value`` settings applied, validated as a whole."""
    tree = experiment.model_dump()
    for key, value in parse_overrides(overrides).items():
        *groups, leaf = key.split(".")
        branch = tree
        for group in groups:
            branch = branch[group]
        if not groups and key != "seed" and branch[leaf] != value:
            tree["reference"] = None  # another network: neither its recipe nor its figure holds
        branch[leaf] = value
    return build_experiment(tree)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    # A union names its branches in the location; only the setting's own path helps the user.
    path = [str(part) for part in problem["loc"]]
    fields = setting_fields()
    key = next((".".join(path[:n]) for n in (2, 1) if ".".join(path[:n]) in fields), ".".join(path))
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {key!r}{nearest(key, fields)}"
    if problem["type"] == "missing":
        return f"setting {key!r} is missing"
    message = problem["msg"].replace("Input should be", "must be")
    message = message.replace("String should match pattern", "must match")
    return f"{key}={problem['input']!r} {message}"


def load_yaml(path: Path) -> Experiment:
    """Read an experiment that ``--describe NAME --yaml`` wrote.

    Raises:
        PipelineError: when the file is missing, is not YAML or does not describe an experiment.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise PipelineError(f"cannot read {path}: {reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise PipelineError(f"{path} holds no experiment; write one with --describe NAME --yaml")
    try:
        return build_experiment(values)
    except PipelineError as error:
        raise PipelineError(f"{path}: {error}") from None


#: Recipe settings that act only with certain values of another one.
_GOVERNED = {
    "train.momentum": ("optimizer", "sgd"),
    "train.nesterov": ("optimizer", "sgd"),
    "train.milestones": ("schedule", "multistep"),
    "train.gamma": ("schedule", "multistep"),
}


def _quantizes(method: str) -> bool:
    """Whether a network under the method has latent weights. Imports torch."""
    from models.methods import Kind, resolve_methods

    return any(step.kind is Kind.QUANTIZER for step in resolve_methods(method))


def without_effect(experiment: Experiment, overrides: Iterable[str]) -> list[str]:
    """One line for each override that changes nothing, so that nobody tunes a dead setting."""
    lines = []
    for key in parse_overrides(overrides):
        reason = None
        if key in _GOVERNED:
            governor, value = _GOVERNED[key]
            current = getattr(experiment.train, governor)
            if current != value:
                reason = f"train.{governor}={current}"
        elif key == "train.latent_weight_decay":
            if not _quantizes(experiment.method):
                reason = f"method={experiment.method}, which has no latent weights"
        elif key in ("scaling.workers", "scaling.max_failures", "scaling.timeout"):
            if experiment.scaling.launcher == "local":
                reason = "scaling.launcher=local"
        elif key in ("tracking.uri", "tracking.register_model"):
            if not experiment.tracking.enabled:
                reason = "tracking.enabled=false"
        elif key == "data.root":
            if experiment.data.synthetic:
                reason = "data.synthetic"
            elif not get_dataset(experiment.dataset).raw_files:
                reason = f"dataset={experiment.dataset}, whose images are built in"
        if reason is not None:
            lines.append(f"{key} has no effect with {reason}")
    return lines
