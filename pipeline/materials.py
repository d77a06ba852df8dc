"""What runs of an experiment are made with: checked, opened and prepared before the first one."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import data_prep
from data_prep.datasets import Normalization
from pipeline import inputs, launch
from pipeline.checkpoint import run_identity
from pipeline.config import Experiment, PipelineError, Recipe
from pipeline.display import Display, duration
from pipeline.experiments import check_parts
from pipeline.loop import build_model
from pipeline.optim import peak_rate
from pipeline.weight_sources import resolve
from pipeline.weights import Sources, Weights, build_teacher, load_into

if TYPE_CHECKING:
    from data_prep import Dataset, Manifest
    from pipeline.tracking import TrackingStore


@dataclass(frozen=True)
class Materials:
    """What the runs of an experiment have in common, whatever their seed.

    Attributes:
        display: where progress goes.
        manifest: of the prepared data.
        store: where MLflow keeps runs; None when tracking is off.
        sources: weights to begin with, and a teacher's, where the experiment names any.
    """

    display: Display
    manifest: Manifest
    store: TrackingStore | None
    sources: Sources

    def identity(self, experiment: Experiment) -> str:
        """Of a run of this experiment, see ``Experiment.identity``."""
        return run_identity(experiment, self.manifest, self.sources)


def gather(experiment: Experiment, display: Display) -> Materials:
    """Check the experiment, then open and prepare what it needs.

    Raises:
        PipelineError: one line, when something is wrong or missing.
    """
    dataset = check(experiment)
    sources = _find_weights(experiment, display)
    _try_weights(experiment, dataset, sources, display)
    store = _open_tracking(experiment)
    manifest = prepare(experiment, dataset, display)
    return Materials(display, manifest, store, sources)


def _find_weights(experiment: Experiment, display: Display) -> Sources:
    """Fetch the weights that the experiment names, before anything long begins."""

    def tell(text: str) -> None:
        display.stage("weights", text)

    def find(source: str | None) -> Weights | None:
        return None if source is None else resolve(source, experiment, tell)

    return Sources(find(experiment.init_from), find(experiment.train.teacher))


def _try_weights(
    experiment: Experiment, dataset: Dataset, sources: Sources, display: Display
) -> None:
    """Say what the weights are for, or refuse them: here, before the data, not on every worker."""
    if sources.initial is not None:
        display.stage("weights", load_into(build_model(experiment, dataset), sources.initial))
    if sources.teacher is not None:
        if dataset.normalization is None:  # will be measured; whether weights fit, it does not say
            stand_in = Normalization((0.0,) * dataset.channels, (1.0,) * dataset.channels)
            dataset = replace(dataset, normalization=stand_in)
        build_teacher(sources.teacher, experiment, dataset)
        display.stage("weights", f"distilling from {sources.teacher.origin}")


def rate_note(recipe: Recipe) -> str | None:
    """What the linear scaling rule makes of the learning rate; None without the rule."""
    if recipe.lr_batch_size in (None, recipe.batch_size):
        return None
    return (
        f"lr {recipe.lr:g} for a batch of {recipe.lr_batch_size:,} becomes "
        f"{peak_rate(recipe):g} for {recipe.batch_size:,}"
    )


def check(experiment: Experiment) -> Dataset:
    """Refuse what cannot run, before anything is written; returns the data set.

    Raises:
        PipelineError: one line with the nearest right thing.
    """
    dataset = find_data(experiment)
    try:
        inputs.check_images(experiment, dataset)
    except data_prep.DataError as error:
        raise PipelineError(str(error)) from None
    check_parts(experiment, dataset)
    launch.check_scaling(experiment)
    return dataset


def find_data(experiment: Experiment) -> Dataset:
    """The experiment's data set.

    Raises:
        PipelineError: one line, when it is not known or not there.
    """
    try:
        return inputs.dataset_of(experiment)
    except data_prep.DataError as error:
        raise PipelineError(str(error)) from None


def prepare(experiment: Experiment, dataset: Dataset, display: Display) -> Manifest:
    """Prepare the experiment's data, or check what is there, and say so.

    Raises:
        PipelineError: one line, when that cannot be done.
    """

    def progress(stage: str, done: int, total: int) -> None:
        display.progress("prepare", done, total, stage)

    started = time.monotonic()
    try:
        if experiment.data.location == "node" and launch.on_cluster(experiment):
            manifest = launch.prepare_on_nodes(experiment, dataset, progress)
        else:
            manifest = inputs.prepare(experiment, dataset, progress)
    except data_prep.DataError as error:
        raise PipelineError(str(error)) from None
    how = "already prepared and valid" if manifest.reused else "written and verified"
    counts = " + ".join(f"{count:,} {split}" for split, count in manifest.counts.items())
    seconds = duration(time.monotonic() - started)
    display.stage("prepare", f"{experiment.dataset}: {counts} images, {how} ({seconds})")
    for note in manifest.notes:
        display.note(note)
    if manifest.quarantine:
        display.note(
            f"{len(manifest.quarantine):,} raw files could not be used; "
            f"{manifest.folder / 'manifest.json'} names them, first {manifest.quarantine[0].name}: "
            f"{manifest.quarantine[0].reason}"
        )
    return manifest


def _open_tracking(experiment: Experiment) -> TrackingStore | None:
    if not experiment.tracking.enabled:
        return None
    from pipeline.tracking import open_tracking

    return open_tracking(experiment.tracking.uri, experiment.tracking.runs.absolute())
