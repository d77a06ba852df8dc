"""Settings by name: the one override syntax ``a.b=value``, YAML, and what has no effect."""

from __future__ import annotations

import contextlib
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from data_prep.datasets import get_dataset
from pipeline.config import Address, Experiment, Folder, PipelineError, Section, nearest


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
    if text in get_args(annotation):  # one of the words that the setting knows, such as none
        return text
    if text in ("none", "null"):
        return None
    if annotation in (str, str | None, Folder, Path, Folder | None, Address | None):
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
        if key in ("dataset", "backbone", "method") and branch[leaf] != value:
            tree["reference"] = None  # another network: neither its recipe nor its figure holds
        branch[leaf] = value
    return build_experiment(tree)


#: Shows a value that is wrong; in YAML a few lines can stand for one of any size.
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxtuple, _SHOWN.maxdict = 1, 12, 12, 12
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 200


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
    return f"{key}={_SHOWN.repr(problem['input'])} {message}"


def load_yaml(path: Path) -> Experiment:
    """Read an experiment that ``--describe NAME --yaml`` wrote.

    Raises:
        PipelineError: when the file is missing, is not YAML or does not describe an experiment.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise PipelineError(f"cannot read {path}: {reason}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, place: str) -> Experiment:
    """The experiment that ``Experiment.to_yaml`` wrote.

    Args:
        place: where the text stands; errors begin with it.

    Raises:
        PipelineError: when it is not YAML or does not describe an experiment.
    """
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PipelineError(f"{place} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise PipelineError(f"{place} holds no experiment; write one with --describe NAME --yaml")
    try:
        return build_experiment(values)
    except PipelineError as error:
        raise PipelineError(f"{place}: {error}") from None


#: Settings that act only with certain values of another one.
_GOVERNED: dict[str, tuple[str, tuple[object, ...]]] = {
    "train.momentum": ("train.optimizer", ("sgd", "rmsprop")),
    "train.nesterov": ("train.optimizer", ("sgd",)),
    "train.schedule_unit": ("train.schedule", ("cosine", "multistep")),
    "train.milestones": ("train.schedule", ("multistep",)),
    "train.gamma": ("train.schedule", ("multistep", "plateau")),
    "train.patience": ("train.schedule", ("plateau",)),
    "train.sync_batchnorm": ("scaling.launcher", ("ray",)),
    "scaling.workers": ("scaling.launcher", ("ray",)),
    "scaling.nodes": ("scaling.launcher", ("ray",)),
    "scaling.gpu": ("scaling.launcher", ("ray",)),
    "scaling.max_failures": ("scaling.launcher", ("ray",)),
    "scaling.timeout": ("scaling.launcher", ("ray",)),
    "data.location": ("scaling.launcher", ("ray",)),
    "checkpoint.minutes": ("checkpoint.steps", (None,)),
    "tracking.uri": ("tracking.enabled", (True,)),
    "tracking.register_model": ("tracking.enabled", (True,)),
}

#: Settings that do nothing while another one is none, false or zero.
_NEEDS = {
    "train.teacher_weight": "train.teacher",
    "train.temperature": "train.teacher",
    "train.growth_epochs": "train.first_image_size",
    "train.padding": "train.shift",
    "train.crop_ratio": "train.crop_area",
}

#: Settings that repeat what holds without them: when they equal this other one.
_REPEATING = {
    "train.lr_batch_size": "train.batch_size",
    "train.first_image_size": "train.image_size",
    "train.test_size": "train.image_size",
}

#: Settings of the preparation; made-up images need none of them.
_PREPARING = {
    f"data.{key}" for key in ("root", "raw", "check_raw", "max_per_class", "bad_share", "processes")
} | {f"data.{key}" for key in ("side", "format", "quality", "passthrough")}


def _quantizes(method: str) -> bool:
    """Whether a network under the method has latent weights. Imports torch."""
    from models.methods import Kind, resolve_methods

    return any(step.kind is Kind.QUANTIZER for step in resolve_methods(method))


def _uses_cores(experiment: Experiment) -> bool:
    """Whether anything is shared out by the cores of a worker. Imports torch."""
    import torch

    return experiment.scaling.launcher == "ray" or torch.cuda.is_available()


def without_effect(experiment: Experiment, overrides: Iterable[str]) -> list[str]:
    """One line for each override that changes nothing, so that nobody tunes a dead setting."""
    lines = []
    for key in parse_overrides(overrides):
        reason = _why_idle(experiment, key)
        if reason is not None:
            lines.append(f"{key} has no effect with {reason}")
    return lines


def _why_idle(experiment: Experiment, key: str) -> str | None:
    """What makes a setting ineffective, or None where it acts."""
    if key in _GOVERNED:
        governor, acting = _GOVERNED[key]
        if _value(experiment, governor) not in acting:
            return _written(experiment, governor)
    if key in _NEEDS and not _value(experiment, _NEEDS[key]):
        return _written(experiment, _NEEDS[key])
    if key in _REPEATING and _value(experiment, key) == _value(experiment, _REPEATING[key]):
        return _written(experiment, _REPEATING[key])
    if key == "train.latent_weight_decay" and not _quantizes(experiment.method):
        return f"method={experiment.method}, which has no latent weights"
    if key == "train.sync_batchnorm" and experiment.scaling.workers == 1:
        return "scaling.workers=1"
    if key == "scaling.cores" and not _uses_cores(experiment):
        return "scaling.launcher=local without a GPU"
    if key == "data.location" and not os.environ.get("RAY_ADDRESS"):
        return "one machine; RAY_ADDRESS names a cluster"
    if key in _PREPARING:
        return _why_unprepared(experiment, key.removeprefix("data."))
    return None


def _value(experiment: Experiment, key: str) -> Any:
    """What a setting is in effect: an image size that is not set is the data set's."""
    group, _, name = key.partition(".")
    value = getattr(getattr(experiment, group), name)
    if key == "train.image_size" and value is None:
        return get_dataset(experiment.dataset).image_size
    return value


def _written(experiment: Experiment, key: str) -> str:
    """A setting as the user would write it."""
    value = _value(experiment, key)
    words = {None: "none", True: "true", False: "false"}
    return f"{key}={words[value] if value is None or isinstance(value, bool) else value}"


def _why_unprepared(experiment: Experiment, name: str) -> str | None:
    if experiment.data.synthetic:
        return "data.synthetic"
    dataset = get_dataset(experiment.dataset)
    if dataset.reader == "digits" and name != "max_per_class":
        return f"dataset={experiment.dataset}, whose images are built in"
    if name == "root" and experiment.data.raw is not None:
        return f"data.raw={experiment.data.raw}"
    is_array = dataset.storage is None
    if is_array and name in ("side", "format", "quality", "passthrough", "bad_share", "processes"):
        return f"dataset={experiment.dataset}, whose images are kept pixel by pixel"
    return None
