"""The catalog: curated experiments by name, and the grammar that makes all the others.

A name is ``<dataset>_<backbone>[_<method>[_<recipe>]]``, parts without underscores. Every module of
this package lists curated experiments in ``EXPERIMENTS`` below a ``TITLE``; any other legal name
gets the recipe that it says, or else the default one, and is marked untuned. Method ``float``
alone adds nothing: ``cifar10_resnet50_float`` is the curated ``cifar10_resnet50``. A curated name
is free in what follows the backbone, where a paper's row has more to it than the grammar can say.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from data_prep.datasets import DATASETS, DataError, Dataset, get_dataset
from models.calls import ModelError
from pipeline.config import Experiment, PipelineError, Recipe, nearest
from pipeline.recipes import FINETUNE, RECIPES, default_recipe, float_weights, named_recipe
from pipeline.settings import build_experiment, override

if TYPE_CHECKING:
    from torch import nn


@cache
def chapters() -> dict[str, list[Experiment]]:
    """All curated experiments by the title of their module, in its order. Imports no torch."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    return {module.TITLE: module.EXPERIMENTS for module in modules}


@cache
def catalog() -> dict[str, Experiment]:
    """All curated experiments by name. Imports no torch."""
    entries: dict[str, Experiment] = {}
    for experiments in chapters().values():
        for experiment in experiments:
            if experiment.name in entries:
                raise ValueError(f"experiment {experiment.name} is in the catalog twice")
            entries[experiment.name] = experiment
    return dict(sorted(entries.items()))


def load_experiment(name: str, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment of that name with ``a.b=value`` overrides applied.

    Raises:
        PipelineError: for an unknown name (with the nearest one), key or value.
    """
    curated = catalog().get(name)
    if curated is None and name.count("_") == 2:
        curated = catalog().get(name.removesuffix("_float"))
    return override(curated if curated else _from_grammar(name), overrides)


def untuned_note(experiment: Experiment) -> str | None:
    """What is to be said of an experiment that the grammar has made; None of a curated one."""
    if experiment.tuned:
        return None
    named = experiment.name.split("_")[3:]
    recipe = f"recipe {named[0]} as named" if named else "the default recipe"
    return f"{experiment.name} is untuned: no curated experiment; {recipe}"


def data_only(name: str) -> Experiment:
    """The experiment of that name, or a carrier of the settings of a data set of that name.

    Raises:
        PipelineError: for an unknown name, with the nearest one.
    """
    if name not in DATASETS and "_" in name:
        return load_experiment(name)
    try:
        row = get_dataset(name)
    except DataError as error:
        raise PipelineError(str(error)) from None
    return Experiment(name=name, dataset=name, backbone="none", train=default_recipe(row.name))


def check_parts(experiment: Experiment, dataset: Dataset | None = None) -> None:
    """Refuse a data set, backbone or method that does not exist, and wrong arguments of one.

    The network is built without memory for its weights, so this is quick for the largest one.

    Args:
        dataset: stands for the experiment's, where that cannot be looked at yet.

    Raises:
        PipelineError: one line with the nearest right thing.
    """
    try:
        get_dataset(experiment.dataset)
        import torch

        from pipeline.inputs import dataset_of
        from pipeline.loop import build_model

        row = dataset or dataset_of(experiment)
        with torch.device("meta"):
            network = build_model(experiment, row)
    except (ModelError, DataError) as error:
        raise PipelineError(str(error)) from None
    _check_latent_weights(experiment, network)
    for key in ("first_image_size", "test_size"):
        size = getattr(experiment.train, key)
        if size is None:
            continue
        images = torch.empty(2, row.channels, size, size, device="meta")
        try:
            network.eval()(images)
        except RuntimeError:
            raise PipelineError(
                f"{experiment.backbone} takes images of one size only, not of "
                f"train.{key}={size} as well"
            ) from None


def _check_latent_weights(experiment: Experiment, network: nn.Module) -> None:
    """Refuse settings for latent weights that the network does not have."""
    import models

    recipe = experiment.train
    layers = [layer for _, layer in models.quantized_layers(network)]
    if recipe.compile == "quantizers" and not layers:
        raise PipelineError(
            f"train.compile=quantizers: method={experiment.method} quantizes no weights; "
            "take model or none"
        )
    if recipe.latent_regularization and all(layer.clip is None for layer in layers):
        raise PipelineError(
            f"train.latent_regularization={recipe.latent_regularization:g} is for latent weights "
            f"in [-1, 1], as those of method=binary; method={experiment.method} has none"
        )


def _from_grammar(name: str) -> Experiment:
    if "(" in name:
        raise PipelineError(
            f"{name!r} is not a name: names take short forms alone, such as ternary-x4; arguments "
            "are settings behind the name: mnist_lenet5 method='ternary(expansion=4)'"
        )
    parts = name.split("_")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise PipelineError(
            f"unknown experiment {name!r}{nearest(name, catalog()) or '.'} A name is "
            "DATASET_BACKBONE, with _METHOD or _METHOD_RECIPE behind; --list shows the catalog"
        )
    dataset, backbone, *rest = parts
    method = rest[0] if rest else "float"
    recipe = rest[1] if len(rest) == 2 else None
    try:
        experiment = build_experiment(
            {
                "name": name,
                "dataset": dataset,
                "backbone": backbone,
                "method": method,
                "init_from": _start(dataset, backbone, recipe),
                "train": _recipe(dataset, backbone, method, recipe),
            }
        )
        row = get_dataset(dataset)
        # Settings behind the name say where a folder of the user's own is; it is checked then.
        check_parts(experiment, replace(row, classes=2) if row.classes is None else row)
    except (PipelineError, DataError, ModelError) as error:
        raise PipelineError(f"cannot make experiment {name!r}: {error}") from None
    return experiment


def _recipe(dataset: str, backbone: str, method: str, name: str | None) -> Recipe:
    if method in RECIPES:
        raise PipelineError(
            f"a recipe stands behind a method; did you mean {dataset}_{backbone}_float_{method}?"
        )
    if name is None:
        return default_recipe(dataset)
    if name not in RECIPES:
        raise PipelineError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")
    return named_recipe(name, backbone, method)


def _start(dataset: str, backbone: str, recipe: str | None) -> str | None:
    finetuned = recipe is not None and recipe.endswith(FINETUNE)
    return float_weights(dataset, backbone) if finetuned else None
