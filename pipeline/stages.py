"""A whole run: prepare, train, evaluate, track, register, in that order."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import data_prep
import models
from pipeline import inputs, launch, report, runfolder
from pipeline.checkpoint import CheckpointError
from pipeline.config import Experiment, PipelineError, flatten
from pipeline.display import Display, TrainingDisplay, duration
from pipeline.evaluate import Evaluation
from pipeline.experiments import check_parts
from pipeline.failures import TrainingError
from pipeline.loop import build_model

if TYPE_CHECKING:
    from data_prep import Dataset, Manifest
    from models.profiler import Profile
    from pipeline.board import Event
    from pipeline.registry import RegisteredModel
    from pipeline.runfolder import RunFolder
    from pipeline.tracking import Tracker, TrackingStore


@dataclass(frozen=True)
class Result:
    """What a finished run gives.

    Attributes:
        manifest: of the prepared data.
        folder: run folder with checkpoints and record.
        history: metrics of each epoch.
        evaluation: of the last epoch's weights on the test split.
        profile: parameters, MACs and stored bytes of the network.
        hardware: workers and devices that trained it.
        seconds: wall time of this process's part of the run, without the preparation.
        tracking_uri: MLflow store; None when tracking is off.
        run_id: MLflow run; None when tracking is off.
        model: registered version; None when nothing was registered.
    """

    experiment: Experiment
    manifest: Manifest
    folder: Path
    history: list[dict[str, float]]
    evaluation: Evaluation
    profile: Profile
    hardware: str
    seconds: float
    tracking_uri: str | None = None
    run_id: str | None = None
    model: RegisteredModel | None = None


def run(
    experiment: Experiment, *, resume: bool | str = False, display: Display | None = None
) -> Result:
    """Run an experiment from raw images to a registered model.

    Args:
        resume: True continues the one unfinished run of this very experiment and data; a text
            names the run folder.
        display: where progress goes; standard output by default.

    Raises:
        PipelineError: one line that says what the user can mend.
    """
    dataset = check(experiment)
    with display or Display() as shown:
        store = _open_tracking(experiment)
        manifest = prepare(experiment, dataset, shown)
        identity = launch.run_identity(experiment, manifest)
        if resume is not False:
            folder = runfolder.find(experiment, identity, resume if resume is not True else None)
        else:
            folder = runfolder.create(experiment, identity)
        try:
            return _Run(experiment, shown, manifest, folder, store).go()
        except KeyboardInterrupt:
            raise Interrupted(folder.name) from None
        except PipelineError as error:
            # What fails once the weights are there, or for want of a worker, can be continued.
            if not isinstance(error, TrainingError) or error.transient:
                error.exit_code, error.run = 1, folder.name
            raise
        finally:
            folder.release()


def check(experiment: Experiment) -> Dataset:
    """Refuse what cannot run, before anything is written; returns the data set.

    Raises:
        PipelineError: one line with the nearest right thing.
    """
    dataset = check_data(experiment)
    check_parts(experiment, dataset)
    launch.check_scaling(experiment)
    return dataset


def check_data(experiment: Experiment) -> Dataset:
    """The part of ``check`` that concerns the data and how a recipe looks at them."""
    dataset = find_data(experiment)
    try:
        inputs.check_images(experiment, dataset)
    except data_prep.DataError as error:
        raise PipelineError(str(error)) from None
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


class Interrupted(KeyboardInterrupt):
    """The user or the system ended the run; ``run`` names the folder that can be resumed."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run


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


class _Run:
    """The stages after preparation, which share the run's folder and its MLflow run."""

    def __init__(
        self,
        experiment: Experiment,
        display: Display,
        manifest: Manifest,
        folder: RunFolder,
        store: TrackingStore | None,
    ) -> None:
        self.experiment = experiment
        self.display = display
        self.manifest = manifest
        self.folder = folder
        self.started = time.monotonic()
        self._note_workers()
        self.history: list[dict[str, float]] = []
        self.evaluation: Evaluation | None = None
        self.tracker = self._start_tracking(store) if store is not None else None

    def go(self) -> Result:
        """Train, then log and register; the MLflow run ends in the state that the run ends in."""
        try:
            result = self._finish(self._train())
        except BaseException as error:
            if self.tracker is not None:
                self.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        if self.tracker is not None:
            self.tracker.finish("FINISHED")
        self.folder.update(status="finished", result=report.record(result))
        return result

    def _note_workers(self) -> None:
        """Say it when a run is continued by another number of workers than began it."""
        workers = launch.worker_count(self.experiment)
        before = self.folder.record.get("workers", workers)
        if workers != before:
            self.display.note(
                f"{workers} workers continue what {before} began: the same batches, but batch norm "
                "sees other shares of them, so the weights will differ a little"
            )
        sessions = self.folder.record.get("sessions", 0) + 1
        self.folder.update(workers=workers, sessions=sessions)

    def _start_tracking(self, store: TrackingStore) -> Tracker:
        from pipeline.tracking import Tracker

        if self.folder.record["mlflow_run"] is not None:
            return Tracker.resume(store, self.folder.record["mlflow_run"])
        tags = {
            "identity": self.folder.record["identity"],
            "data.fingerprint": self.manifest.fingerprint,
            "run_folder": str(self.folder.path),
            "tuned": str(self.experiment.tuned).lower(),
        }
        params = flatten(self.experiment.model_dump(mode="json"))
        tracker = Tracker.start(store, self.experiment.name, self.folder.name, params, tags)
        self.folder.update(mlflow_run=tracker.run_id)
        tracker.log_text("experiment.yaml", self.experiment.to_yaml())
        return tracker

    def _train(self) -> Evaluation:
        """Train to the last epoch; events feed the display and the tracker as they come."""
        experiment = self.experiment
        shown = TrainingDisplay(self.display, experiment.train.epochs)

        def tell(event: Event) -> None:
            shown(event)
            self._take(event)

        epochs = f"{experiment.train.epochs} epoch{'s' if experiment.train.epochs > 1 else ''}"
        where = launch.device_description(launch.worker_count(experiment))
        how = "Ray Train" if experiment.scaling.launcher == "ray" else "in this process"
        self.display.stage("train", f"{epochs} on {where}, {how}; run {self.folder.path}")
        started = time.monotonic()
        if experiment.scaling.launcher == "ray":
            launch.train_on_ray(experiment, self.manifest, self.folder.path, tell)
        else:
            launch.train_locally(experiment, self.manifest, self.folder.path, tell)
        if self.evaluation is None:
            raise RuntimeError("the training ended without an evaluation")
        seconds = duration(time.monotonic() - started)
        accuracy = f"test top-1 {self.evaluation.top1:.2f} % of {self.evaluation.images:,} images"
        self.display.stage("train", f"done in {seconds}: {accuracy}")
        return self.evaluation

    def _take(self, event: Event) -> None:
        """Keep what an event says; what is already tracked is not tracked twice."""
        if event["kind"] == "resumed":
            self.history = event["history"]
        elif event["kind"] == "epoch":
            self.history = [*self.history[: event["epoch"] - 1], event["metrics"]]
        elif event["kind"] == "evaluation":
            confusion = torch.tensor(event["confusion"])
            self.evaluation = Evaluation(confusion, event["top5_hits"], event["loss"])
        if self.tracker is not None:
            for epoch, metrics in enumerate(self.history, start=1):
                self.tracker.log_epoch(epoch, metrics)

    def _finish(self, evaluation: Evaluation) -> Result:
        """Profile the trained network, log what there is to see of it, and register it."""
        experiment = self.experiment
        model = build_model(experiment, self.manifest)
        store = launch.checkpoint_store(experiment, self.manifest, self.folder.path)
        try:
            store.load_model(experiment.train.epochs, model)
        except CheckpointError as error:
            raise PipelineError(str(error)) from None
        model.eval()
        image_size = inputs.image_size(experiment.train, self.manifest)
        result = Result(
            experiment=experiment,
            manifest=self.manifest,
            folder=self.folder.path,
            history=self.history,
            evaluation=evaluation,
            profile=models.profile(model, image_size),
            hardware=launch.device_description(launch.worker_count(experiment)),
            seconds=time.monotonic() - self.started,
        )
        if self.tracker is None:
            return result
        self._log_figures(self.tracker, result, model)
        registered = None
        if experiment.tracking.register_model:
            self.display.stage("register", f"exporting and verifying {experiment.name}")
            registered = self._register(self.tracker, result, model)
        return replace(
            result,
            seconds=time.monotonic() - self.started,
            tracking_uri=self.tracker.store.uri,
            run_id=self.tracker.run_id,
            model=registered,
        )

    def _log_figures(self, tracker: Tracker, result: Result, model: nn.Module) -> None:
        name, evaluation = self.experiment.name, result.evaluation
        classes = self.manifest.class_names
        accuracy = f"{name}: top-1 {evaluation.top1:.2f} %"
        tracker.log_figure("curves", report.curves(self.history, name))
        tracker.log_figure(
            "confusion_matrix", report.confusion_matrix(evaluation, classes, accuracy)
        )
        tracker.log_figure("weights", report.weight_histogram(model, name))
        tracker.log_dict("profile.json", result.profile.to_dict())
        figures = {
            **evaluation.metrics(),
            "per_class": dict(zip(classes, evaluation.per_class, strict=True)),
            "confusion": evaluation.confusion.tolist(),
        }
        tracker.log_dict("evaluation.json", figures)

    def _register(self, tracker: Tracker, result: Result, model: nn.Module) -> RegisteredModel:
        from pipeline.registry import register

        size = inputs.image_size(self.experiment.train, self.manifest)
        return register(
            models.fold(model),
            self.experiment.name,
            store=tracker.store,
            run_id=tracker.run_id,
            example_shape=(self.manifest.channels, size, size),
            reference=model,
            model_card=report.model_card(result),
            preprocessing=report.preprocessing(self.experiment, self.manifest),
            alias="synthetic" if self.experiment.data.synthetic else "candidate",
            tags={
                "top1": f"{result.evaluation.top1:.3f}",
                "stored_bytes": str(result.profile.stored_bytes),
                "method": self.experiment.method,
                "data.fingerprint": self.manifest.fingerprint,
            },
        )
