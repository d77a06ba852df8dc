"""A whole run: prepare, train, evaluate, track, register, in that order."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

import models
from pipeline import figures, inputs, launch, report
from pipeline.checkpoints.store import run_checkpoints
from pipeline.config import Experiment, PipelineError, flatten
from pipeline.display import Display, TrainingDisplay, duration
from pipeline.evaluate import Evaluation
from pipeline.failures import TrainingError
from pipeline.loop import build_model
from pipeline.materials import Materials, gather, rate_note
from pipeline.registry.versions import CANDIDATE
from pipeline.weights import NO_SOURCES, Sources

if TYPE_CHECKING:
    from data_prep import Manifest
    from models.profiler import Profile
    from pipeline.registry.registering import RegisteredModel
    from pipeline.runfolder import RunFolder
    from pipeline.tracking import Tracker
    from pipeline.workers.board import Event


@dataclass(frozen=True)
class Result:
    """What a finished run gives.

    Attributes:
        manifest: of the prepared data.
        folder: run folder with checkpoints and record.
        history: metrics of each epoch.
        kept_epoch: whose weights these are, from 1: the best on held-out images, or the last.
        evaluation: of these weights on the test split.
        profile: parameters, MACs and stored bytes of the network.
        sources: weights from elsewhere that it began with.
        hardware: workers and devices that trained it.
        seconds: wall time of this process's part of the run, without the preparation.
        tracking_uri: MLflow store; None when tracking is off.
        run_id: MLflow run; None when tracking is off.
        model: registered version; None when nothing was registered.
        champion: a line on which version is the champion, and why; empty where none may be.
    """

    experiment: Experiment
    manifest: Manifest
    folder: Path
    history: list[dict[str, float]]
    kept_epoch: int
    evaluation: Evaluation
    profile: Profile
    hardware: str
    seconds: float
    sources: Sources = NO_SOURCES
    tracking_uri: str | None = None
    run_id: str | None = None
    model: RegisteredModel | None = None
    champion: str = ""


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
    if experiment.seeds > 1:
        raise PipelineError(
            f"seeds={experiment.seeds} are several runs: call pipeline.run_seeds, or set seeds=1"
        )
    with display or Display() as shown:
        materials = gather(experiment, shown, resume)
        with materials.run_folder(experiment, resume) as folder:
            return train_and_register(experiment, materials, folder)


def train_and_register(
    experiment: Experiment,
    materials: Materials,
    folder: RunFolder,
    *,
    parent: str | None = None,
    alias: str | None = None,
) -> Result:
    """The stages after preparation; the folder's record gets the result.

    Args:
        parent: MLflow run that this one is a part of.
        alias: of the registered version; None: ``usual_alias``.
    """
    return _Run(experiment, materials, folder, parent, alias or usual_alias(experiment)).go()


def usual_alias(experiment: Experiment) -> str:
    """What the registry calls the newest version: a model of made-up images is no candidate."""
    return "synthetic" if experiment.data.synthetic else CANDIDATE


def start_tracking(
    experiment: Experiment, materials: Materials, folder: RunFolder, parent: str | None = None
) -> Tracker | None:
    """The MLflow run of this run folder, begun or continued; None when tracking is off."""
    if materials.store is None:
        return None
    from pipeline.tracking import Tracker

    tell = materials.display.note
    if folder.record["mlflow_run"] is not None:
        tracker = Tracker.resume(materials.store, folder.record["mlflow_run"], tell)
    else:
        tags = {
            "identity": folder.record["identity"],
            "data.fingerprint": materials.manifest.fingerprint,
            "run_folder": str(folder.path),
            "tuned": str(experiment.tuned).lower(),
        }
        params = flatten(experiment.model_dump(mode="json"))
        tracker = Tracker.start(
            materials.store, experiment.name, folder.name, params, tags, parent=parent, tell=tell
        )
        folder.update(mlflow_run=tracker.run_id)
    # Also of a run that goes on: the process before may have ended before it was sent.
    tracker.log_text("experiment.yaml", experiment.to_yaml())
    return tracker


class _Run:
    """The stages after preparation, which share the run's folder and its MLflow run."""

    def __init__(
        self,
        experiment: Experiment,
        materials: Materials,
        folder: RunFolder,
        parent: str | None,
        alias: str,
    ) -> None:
        self.experiment = experiment
        self.display = materials.display
        self.manifest = materials.manifest
        self.sources = materials.sources
        self.folder = folder
        self.alias = alias
        self.started = time.monotonic()
        self.hardware = launch.planned_workers(experiment).description
        folder.update(sessions=folder.record.get("sessions", 0) + 1)
        self.history: list[dict[str, float]] = []
        self.evaluation: Evaluation | None = None
        self.kept_epoch = experiment.train.epochs
        self.tracker = start_tracking(experiment, materials, folder, parent)

    def go(self) -> Result:
        """Train, then log and register; the MLflow run ends in the state that the run ends in."""
        with self.tracker or contextlib.nullcontext():
            result = self._finish(self._train())
        self.folder.update(status="finished", result=report.record(result))
        return result

    def _note_workers(self, event: Event) -> None:
        """Say it when another number of workers goes on than the one before."""
        before = self.folder.record.get("workers", event["workers"])
        if event["workers"] != before:
            self.display.note(
                f"the number of workers changed from {before} to {event['workers']}: the same "
                "batches, but batch norm sees other shares of them, so the weights will differ a "
                "little"
            )
        self.folder.update(workers=event["workers"])
        self.hardware = event["hardware"]

    def _train(self) -> Evaluation:
        """Train to the last epoch; events feed the display and the tracker as they come."""
        experiment = self.experiment
        shown = TrainingDisplay(self.display, experiment.train.epochs, self.hardware)

        def tell(event: Event) -> None:
            shown(event)
            self._take(event)

        epochs = f"{experiment.train.epochs} epoch{'s' if experiment.train.epochs > 1 else ''}"
        how = "Ray Train" if experiment.scaling.launcher == "ray" else "in this process"
        self.display.stage("train", f"{epochs} on {self.hardware}, {how}; run {self.folder.path}")
        rate = rate_note(experiment.train)
        if rate is not None:
            self.display.stage("train", rate)
        started = time.monotonic()
        train = launch.train_on_ray
        if experiment.scaling.launcher == "local":
            train = launch.train_locally
        try:
            train(experiment, self.manifest, self.folder.path, tell, self.sources)
        except TrainingError as error:
            if self.history and not error.transient:
                error.args = (
                    f"{error}; init_from={self.folder.path} begins anew with what is kept",
                )
            raise
        if self.evaluation is None:
            raise RuntimeError("the training ended without an evaluation")
        seconds = duration(time.monotonic() - started)
        accuracy = f"test top-1 {self.evaluation.top1:.2f} % of {self.evaluation.images:,} images"
        self.display.stage("train", f"done in {seconds}: {accuracy}")
        return self.evaluation

    def _take(self, event: Event) -> None:
        """Keep what an event says; what is already tracked is not tracked twice."""
        if event["kind"] == "workers":
            self._note_workers(event)
        elif event["kind"] == "resumed":
            self.history = event["history"]
        elif event["kind"] == "epoch":
            self.history = [*self.history[: event["epoch"] - 1], event["metrics"]]
        elif event["kind"] == "evaluation":
            self.evaluation = Evaluation.from_event(event)
            self.kept_epoch = event.get("epoch", self.kept_epoch)
        if self.tracker is not None:
            for epoch, metrics in enumerate(self.history, start=1):
                self.tracker.log_epoch(epoch, metrics)

    def _finish(self, evaluation: Evaluation) -> Result:
        """Profile the trained network, log what there is to see of it, and register it."""
        experiment = self.experiment
        model = build_model(experiment, self.manifest)
        store = run_checkpoints(experiment, self.manifest, self.sources, self.folder.path)
        store.load_model(self.kept_epoch, model)
        model.eval()
        result = Result(
            experiment=experiment,
            manifest=self.manifest,
            folder=self.folder.path,
            history=self.history,
            kept_epoch=self.kept_epoch,
            evaluation=evaluation,
            profile=models.profile(model, inputs.evaluation_size(experiment.train, self.manifest)),
            hardware=self.hardware,
            seconds=time.monotonic() - self.started,
            sources=self.sources,
        )
        if self.tracker is None:
            return result
        self._log_figures(self.tracker, result, model)
        registered, champion = None, ""
        if experiment.tracking.register_model:
            self.tracker.catch_up()
            self.display.stage("register", f"exporting and verifying {experiment.name}")
            registered = self._register(self.tracker, result, model)
            champion = self._consider(self.tracker, registered)
        return replace(
            result,
            seconds=time.monotonic() - self.started,
            tracking_uri=self.tracker.store.uri,
            run_id=self.tracker.run_id,
            model=registered,
            champion=champion,
        )

    def _log_figures(self, tracker: Tracker, result: Result, model: nn.Module) -> None:
        name, evaluation = self.experiment.name, result.evaluation
        classes = self.manifest.class_names
        accuracy = f"{name}: top-1 {evaluation.top1:.2f} %"
        tracker.log_figure("curves", figures.curves(self.history, name))
        tracker.log_figure(
            "confusion_matrix", figures.confusion_matrix(evaluation, classes, accuracy)
        )
        tracker.log_figure("weights", figures.weight_histogram(model, name))
        tracker.log_dict("profile.json", result.profile.to_dict())
        numbers = {
            **evaluation.metrics(),
            "per_class": dict(zip(classes, evaluation.per_class, strict=True)),
            "confusion": evaluation.confusion.tolist(),
        }
        tracker.log_dict("evaluation.json", numbers)

    def _register(self, tracker: Tracker, result: Result, model: nn.Module) -> RegisteredModel:
        from pipeline.registry.registering import register
        from pipeline.registry.registration import Registration

        registration = Registration.of(result, tracker.store, tracker.run_id)
        return register(
            model, models.fold(model), registration, store=tracker.store, alias=self.alias
        )

    def _consider(self, tracker: Tracker, registered: RegisteredModel) -> str:
        """Let the version become champion if it is better, where it may."""
        if self.alias != CANDIDATE:
            return ""
        from pipeline.registry.promotion import consider

        return consider(tracker.store, registered.name, registered.version)
