"""The catalog: curated experiments by name, and the grammar that makes all the others.

A name is ``<dataset>_<backbone>[_<method>]``, parts without underscores. Every module of this
package lists curated experiments in ``EXPERIMENTS``; any other legal name gets the default
recipe and is marked untuned.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from data_prep.datasets import DATASETS, DataError, Dataset, get_dataset
from models.calls import ModelError
from pipeline.config import Experiment, PipelineError, nearest
from pipeline.recipes import default_recipe
from pipeline.settings import build_experiment, override


@cache
def catalog() -> dict[str, Experiment]:
    """All curated experiments by name. Imports no torch."""
    entries: dict[str, Experiment] = {}
    for module in pkgutil.iter_modules(__path__):
        for experiment in importlib.import_module(f"{__name__}.{module.name}").EXPERIMENTS:
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
    return override(curated if curated else _from_grammar(name), overrides)


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
    size = experiment.train.first_image_size
    if size is not None:
        images = torch.empty(2, row.channels, size, size, device="meta")
        try:
            network.eval()(images)
        except RuntimeError:
            raise PipelineError(
                f"{experiment.backbone} takes images of one size only, not of "
                f"train.first_image_size={size} as well"
            ) from None


def _from_grammar(name: str) -> Experiment:
    if "(" in name:
        raise PipelineError(
            f"{name!r} is not a name: names take short forms alone, such as ternary-x4; arguments "
            "are settings behind the name: mnist_lenet5 method='ternary(expansion=4)'"
        )
    parts = name.split("_")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise PipelineError(
            f"unknown experiment {name!r}{nearest(name, catalog())} "
            "A name is DATASET_BACKBONE or DATASET_BACKBONE_METHOD; --list shows the catalog"
        )
    try:
        experiment = build_experiment(
            {
                "name": name,
                "dataset": parts[0],
                "backbone": parts[1],
                "method": parts[2] if len(parts) == 3 else "float",
                "train": default_recipe(parts[0]),
            }
        )
        row = get_dataset(parts[0])
        # Settings behind the name say where a folder of the user's own is; it is checked then.
        check_parts(experiment, replace(row, classes=2) if row.classes is None else row)
    except (PipelineError, DataError) as error:
        raise PipelineError(f"cannot make experiment {name!r}: {error}") from None
    return experiment
