"""What runs of an experiment are made with: checked, opened and prepared before the first one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import data_prep
from data_prep.datasets import Normalization
from pipeline import inputs, launch, runfolder, weight_sources
from pipeline.checkpoints.storage import check_storage
from pipeline.checkpoints.store import run_identity
from pipeline.config import Experiment, PipelineError, Recipe
from pipeline.display import Display, duration
from pipeline.experiments import check_parts
from pipeline.loop import build_model
from pipeline.optim import peak_rate
from pipeline.weights import Sources, Weights, build_teacher, load_into

if TYPE_CHECKING:
    from data_prep import Dataset, Manifest
    from pipeline.runfolder import RunFolder
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

    def record(self) -> dict[str, Any]:
        """What a run's record says of them, so that a later process can tell what has changed."""
        manifest = self.manifest
        return {
            "data": {
                "fingerprint": manifest.fingerprint,
                "mean": list(manifest.mean),
                "std": list(manifest.std),
            },
            "sources": {
                "init_from": weight_sources.record(self.sources.initial),
                "train.teacher": weight_sources.record(self.sources.teacher),
            },
        }

    @contextmanager
    def run_folder(
        self, experiment: Experiment, resume: bool | str, suffix: str = ""
    ) -> Iterator[RunFolder]:
        """The folder of a run of this experiment, see ``runfolder.opened``.

        Args:
            suffix: of the identity, for a folder that is not of one run.
        """
        identity = self.identity(experiment) + suffix
        record, warn = self.record(), self.display.note
        with runfolder.opened(experiment, identity, resume, record, warn) as folder:
            yield folder


def gather(experiment: Experiment, display: Display, resume: bool | str = False) -> Materials:
    """Check the experiment, then open and prepare what it needs.

    Args:
        resume: the run to continue, as of ``stages.run``; it goes on with the weights from
            elsewhere that it began with.

    Raises:
        PipelineError: one line, when something is wrong or missing.
    """
    dataset = check(experiment)
    check_storage(experiment)
    sources = _find_weights(experiment, display, runfolder.begun_with(experiment, resume))
    _try_weights(experiment, dataset, sources, display)
    store = _open_tracking(experiment)
    manifest = prepare(experiment, dataset, display)
    return Materials(display, manifest, store, sources)


def _find_weights(experiment: Experiment, display: Display, begun: dict[str, Any]) -> Sources:
    """Fetch the weights that the experiment names, before anything long begins.

    Args:
        begun: those that a run to be continued began with, as in its record.
    """

    def tell(text: str) -> None:
        display.stage("weights", text)

    def find(key: str, source: str | None) -> Weights | None:
        if source is None:
            return None
        recorded = begun.get(key)
        if recorded is None or recorded["source"] != source:
            return weight_sources.resolve(source, experiment, tell)
        weights = weight_sources.kept(recorded, experiment)
        if weights is None:
            tell(f"{source} again, for the copy that the run began with is gone or damaged")
            weights = weight_sources.resolve(source, experiment, tell)
        if weights.digest != recorded["digest"]:
            raise PipelineError(
                f"{source} is not any more what the run began with: {recorded['origin']}, SHA-256 "
                f"{recorded['digest'][:8]} (now {weights.digest[:8]}); start a new run"
            )
        return weights

    return Sources(
        find("init_from", experiment.init_from),
        find("train.teacher", experiment.train.teacher),
    )


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
