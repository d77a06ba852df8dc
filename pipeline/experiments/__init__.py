"""The catalog: curated experiments by name, and the grammar that makes all the others.

A name is ``<dataset>_<backbone>[_<method>]``, parts without underscores. Every module of this
package lists curated experiments in ``EXPERIMENTS``; any other legal name gets the default
recipe and is marked untuned.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache

from data_prep.datasets import DataError, get_dataset
from models.calls import ModelError
from pipeline.config import Experiment, PipelineError, build_experiment, nearest, override
from pipeline.recipes import DEFAULT


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


def check_parts(experiment: Experiment) -> None:
    """Refuse a data set, backbone or method that does not exist, and wrong arguments of one.

    The network is built without memory for its weights, so this is quick for the largest one.

    Raises:
        PipelineError: one line with the nearest right thing.
    """
    try:
        get_dataset(experiment.dataset)
        import torch

        from pipeline.loop import build_model

        with torch.device("meta"):
            build_model(experiment)
    except (ModelError, DataError) as error:
        raise PipelineError(str(error)) from None


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
                "train": DEFAULT,
            }
        )
        check_parts(experiment)
    except PipelineError as error:
        raise PipelineError(f"cannot make experiment {name!r}: {error}") from None
    return experiment
