"""The smoke form of every experiment in the catalog: two steps, saved, resumed, the same again.

The gate takes as many entries as show every chapter, data set, kind of network, method and setting
of a recipe at least once; `make test-all` takes all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data_prep import Manifest, get_dataset
from models.calls import parse_call
from pipeline.checkpoints.store import run_checkpoints
from pipeline.cli import smoke
from pipeline.config import Experiment, Recipe
from pipeline.context import TrainContext
from pipeline.experiments import catalog, chapters
from pipeline.inputs import prepare
from pipeline.loop import train
from pipeline.settings import override
from pipeline.weights import NO_SOURCES

#: Pixels in the place of those that would take long here; networks of ImageNet's form need more.
SMALLER = {"imagenet": 96, "imagenet16": 32, "tinyimagenet": 32}

#: Settings that are numbers of which any is as good as another.
MERE_NUMBERS = {"epochs", "batch_size", "lr", "weight_decay", "milestones", "growth_epochs"}


def features(title: str, experiment: Experiment) -> set[object]:
    """What a smoke run of the experiment shows to work."""
    recipe = experiment.train.model_dump()
    unusual = {
        (key, str(value)) if isinstance(value, str | bool) else key
        for key, value in recipe.items()
        if key not in MERE_NUMBERS and value != Recipe.model_fields[key].default
    }
    return {title, experiment.dataset, *parts(experiment), *unusual}


def parts(experiment: Experiment) -> tuple[str, str]:
    """The kind of network, without the number of its layers, and the method."""
    network, method = parse_call(experiment.backbone).name, parse_call(experiment.method).name
    return network.rstrip("0123456789"), method.partition("-")[0]


def chosen() -> set[str]:
    """Names that together have all features: always the one that adds most, then by name."""
    by_name = {
        experiment.name: features(title, experiment)
        for title, experiments in chapters().items()
        for experiment in experiments
    }
    missing = set().union(*by_name.values())
    names: set[str] = set()
    while missing:
        best = max(sorted(by_name), key=lambda name: len(by_name[name] & missing))
        names.add(best)
        missing -= by_name[best]
    return names


IN_GATE = chosen()


def small(experiment: Experiment) -> Experiment:
    """Two epochs of one step each."""
    form = smoke(experiment)
    words = ["train.epochs=2", f"data.synthetic=[{8 + form.train.validation},8]"]
    if experiment.dataset in SMALLER:
        size = SMALLER[experiment.dataset]
        words.append(f"train.image_size={size}")
        if form.train.first_image_size is not None:
            words += [f"train.first_image_size={size - 32}", f"train.test_size={size + 32}"]
    return override(form, words)


def trained(experiment: Experiment, manifest: Manifest, folder: Path) -> list[dict]:
    """The events of a training in this process."""
    events: list[dict] = []
    context = TrainContext(events.append, torch.device("cpu"))
    train(experiment, manifest, run_checkpoints(experiment, manifest, NO_SOURCES, folder), context)
    return events


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in IN_GATE else pytest.mark.slow) for name in catalog()],
)
def test_an_experiment_trains_saves_and_resumes_as_if_never_stopped(name, tmp_path):
    experiment = override(
        small(catalog()[name]), ["data.backend=torch", f"data.prepared={tmp_path / 'prepared'}"]
    )
    dataset = get_dataset(experiment.dataset)
    manifest = prepare(experiment, dataset, lambda *progress: None)
    whole = trained(experiment, manifest, tmp_path)
    assert [event["epoch"] for event in whole if event["kind"] == "epoch"] == [1, 2]

    # As if it had been stopped behind the first of its two steps.
    shutil.rmtree(tmp_path / "checkpoints" / "epoch-0002")
    resumed = trained(experiment, manifest, tmp_path)
    assert [event["epoch"] for event in resumed if event["kind"] == "epoch"] == [2]
    for events in (whole, resumed):
        assert events[-1]["kind"] == "evaluation"
        del events[-1]["time"]
    assert resumed[-1] == whole[-1]


def test_the_gate_sees_every_kind_of_network_and_every_method():
    shown = {part for name in IN_GATE for part in parts(catalog()[name])}
    assert shown == {part for experiment in catalog().values() for part in parts(experiment)}
    assert len(IN_GATE) < len(catalog()) / 6
