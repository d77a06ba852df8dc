"""A whole run: prepare, train, evaluate, track, register, in that order."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import data_prep
import models
from pipeline import launch, report, runfolder
from pipeline.checkpoint import CheckpointStore
from pipeline.config import Experiment, PipelineError, flatten
from pipeline.display import Display, TrainingDisplay, duration
from pipeline.evaluate import Evaluation
from pipeline.experiments import check_parts
from pipeline.loop import build_model

if TYPE_CHECKING:
    from data_prep import Manifest
    from models.profiler import Profile
    from pipeline.board import Event
    from pipeline.registry import RegisteredModel
    from pipeline.runfolder import RunFolder
    from pipeline.tracking import Tracker


@dataclass(frozen=True)
class Result:
    """What a finished run gives.

    Attributes:
        folder: run folder with checkpoints and record.
        history: metrics of each epoch.
        evaluation: of the last epoch's weights on the test split.
        profile: parameters, MACs and stored bytes of the network.
        seconds: wall time of this process's part of the run.
        hardware: workers and devices that trained it.
        tracking_uri: MLflow store; None when tracking is off.
        run_id: MLflow run; None when tracking is off.
        model: registered version; None when nothing was registered.
    """

    experiment: Experiment
    folder: Path
    history: list[dict[str, float]]
    evaluation: Evaluation
    profile: Profile
    seconds: float
    hardware: str
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
    started = time.monotonic()
    check_parts(experiment)
    launch.check_scaling(experiment)
    with display or Display() as shown:
        store = _open_tracking(experiment)
        manifest = _prepare(experiment, shown)
        identity = experiment.identity(manifest.fingerprint)
        if resume:
            folder = runfolder.find(experiment, identity, resume if resume is not True else None)
        else:
            folder = runfolder.create(experiment, identity)
        try:
            result = _run_in(folder, experiment, manifest, store, shown, started)
        except KeyboardInterrupt:
            raise Interrupted(folder.name) from None
        finally:
            folder.release()
    return result


class Interrupted(KeyboardInterrupt):
    """The user or the system ended the run; ``run`` names the folder that can be resumed."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run


def prepared_backend(experiment: Experiment) -> str:
    """The data backend that ``data.backend=auto`` means here."""
    if experiment.data.backend != "auto":
        return experiment.data.backend
    return "ffcv" if data_prep.ffcv_available() else "torch"


def data_options(experiment: Experiment) -> dict[str, Any]:
    """Arguments of ``data_prep.prepare`` and ``data_prep.plan`` for this experiment."""
    return {
        "root": experiment.data.root,
        "prepared": experiment.data.prepared.absolute(),
        "backend": prepared_backend(experiment),
        "synthetic": experiment.data.synthetic,
    }


def _prepare(experiment: Experiment, display: Display) -> Manifest:
    def progress(stage: str, done: int, total: int) -> None:
        display.progress("prepare", done, total, stage)

    started = time.monotonic()
    try:
        manifest = data_prep.prepare(
            experiment.dataset, **data_options(experiment), progress=progress
        )
    except data_prep.DataError as error:
        raise PipelineError(str(error)) from None
    how = "already prepared and valid" if manifest.reused else "written and verified"
    counts = " + ".join(f"{count:,} {split}" for split, count in manifest.counts.items())
    seconds = duration(time.monotonic() - started)
    display.stage("prepare", f"{experiment.dataset}: {counts} images, {how} ({seconds})")
    if manifest.counts["train"] < experiment.train.batch_size:
        raise PipelineError(
            f"train.batch_size={experiment.train.batch_size} is more than the "
            f"{manifest.counts['train']} training images of {experiment.dataset}"
        )
    return manifest


def _run_in(
    folder: RunFolder,
    experiment: Experiment,
    manifest: Manifest,
    store: Any,
    display: Display,
    started: float,
) -> Result:
    tracker = _start_tracking(store, folder, experiment, manifest)
    try:
        history, evaluation = _train(folder, experiment, manifest, tracker, display)
        model = build_model(experiment)
        _checkpoints(folder, experiment, manifest).load_model(experiment.train.epochs, model)
        model.eval()
        profile = models.profile(model, data_prep.get_dataset(experiment.dataset).image_size)
        result = Result(
            experiment,
            folder.path,
            history,
            evaluation,
            profile,
            seconds=time.monotonic() - started,
            hardware=launch.device_description(launch.worker_count(experiment)),
        )
        if tracker is not None:
            result = _publish(result, model, manifest, tracker, display, started)
    except BaseException as error:
        if tracker is not None:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    if tracker is not None:
        tracker.finish("FINISHED")
    folder.update(status="finished", result=report.record(result))
    return result


def _train(
    folder: RunFolder,
    experiment: Experiment,
    manifest: Manifest,
    tracker: Tracker | None,
    display: Display,
) -> tuple[list[dict[str, float]], Evaluation]:
    """Train to the last epoch; events feed the display and the tracker as they come."""
    shown = TrainingDisplay(display, experiment.train.epochs)
    history: list[dict[str, float]] = []
    evaluations: list[Evaluation] = []

    def tell(event: Event) -> None:
        shown(event)
        if event["kind"] == "resumed":
            history[:] = event["history"]
            for epoch, metrics in enumerate(history, start=1):
                _log_epoch(tracker, epoch, metrics)
        elif event["kind"] == "epoch":
            history[event["epoch"] - 1 :] = [event["metrics"]]
            _log_epoch(tracker, event["epoch"], event["metrics"])
        elif event["kind"] == "evaluation":
            confusion = torch.tensor(event["confusion"])
            evaluations.append(Evaluation(confusion, event["top5_hits"], event["loss"]))

    epochs = experiment.train.epochs
    where = launch.device_description(launch.worker_count(experiment))
    how = "Ray Train" if experiment.scaling.launcher == "ray" else "in this process"
    plural = "s" if epochs > 1 else ""
    display.stage("train", f"{epochs} epoch{plural} on {where}, {how}; run {folder.path}")
    started = time.monotonic()
    if experiment.scaling.launcher == "ray":
        launch.train_on_ray(experiment, manifest, folder.path, tell)
    else:
        launch.train_locally(experiment, manifest, folder.path, tell)
    display.stage(
        "train",
        f"done in {duration(time.monotonic() - started)}: "
        f"test top-1 {evaluations[-1].top1:.2f} % of {evaluations[-1].images:,} images",
    )
    return history, evaluations[-1]


def _log_epoch(tracker: Tracker | None, epoch: int, metrics: dict[str, float]) -> None:
    if tracker is not None:
        tracker.log_epoch(epoch, metrics)


def _checkpoints(folder: RunFolder, experiment: Experiment, manifest: Manifest) -> CheckpointStore:
    return CheckpointStore(folder.path / "checkpoints", experiment.identity(manifest.fingerprint))


def _open_tracking(experiment: Experiment) -> Any:
    if not experiment.tracking.enabled:
        return None
    from pipeline.tracking import open_tracking

    return open_tracking(experiment.tracking.uri, experiment.tracking.runs.absolute())


def _start_tracking(
    store: Any, folder: RunFolder, experiment: Experiment, manifest: Manifest
) -> Tracker | None:
    if store is None:
        return None
    from pipeline.tracking import Tracker

    if folder.record["mlflow_run"] is not None:
        return Tracker.resume(store, folder.record["mlflow_run"])
    params = flatten(experiment.model_dump(mode="json"))
    tags = {
        "identity": folder.record["identity"],
        "data.fingerprint": manifest.fingerprint,
        "run_folder": str(folder.path),
        "tuned": str(experiment.tuned).lower(),
    }
    tracker = Tracker.start(store, experiment.name, folder.name, params, tags)
    folder.update(mlflow_run=tracker.run_id)
    tracker.log_text("experiment.yaml", experiment.to_yaml())
    return tracker


def _publish(
    result: Result,
    model: nn.Module,
    manifest: Manifest,
    tracker: Tracker,
    display: Display,
    started: float,
) -> Result:
    """Log pictures and profile of the run and register its folded model."""
    experiment, evaluation = result.experiment, result.evaluation
    figures = {
        "curves": report.curves(result.history, experiment.name),
        "confusion_matrix": report.confusion_matrix(
            evaluation, manifest.class_names, f"{experiment.name}: top-1 {evaluation.top1:.2f} %"
        ),
        "weights": report.weight_histogram(model, experiment.name),
    }
    for name, figure in figures.items():
        tracker.log_figure(name, figure)
    tracker.log_dict("profile.json", result.profile.to_dict())
    tracker.log_dict(
        "evaluation.json",
        {
            **evaluation.metrics(),
            "per_class": dict(zip(manifest.class_names, evaluation.per_class, strict=True)),
            "confusion": evaluation.confusion.tolist(),
        },
    )
    registered = None
    if experiment.tracking.register_model:
        display.stage("register", f"exporting and verifying {experiment.name}")
        registered = _register(result, model, manifest, tracker)
    return replace(
        result,
        seconds=time.monotonic() - started,
        tracking_uri=tracker.store.uri,
        run_id=tracker.run_id,
        model=registered,
    )


def _register(
    result: Result, model: nn.Module, manifest: Manifest, tracker: Tracker
) -> RegisteredModel:
    from pipeline.registry import register

    dataset = data_prep.get_dataset(result.experiment.dataset)
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    return register(
        models.fold(model),
        result.experiment.name,
        store=tracker.store,
        run_id=tracker.run_id,
        example_shape=shape,
        reference=model,
        model_card=report.model_card(result),
        preprocessing=report.preprocessing(dataset),
        tags={
            "top1": f"{result.evaluation.top1:.3f}",
            "stored_bytes": str(result.profile.stored_bytes),
            "method": result.experiment.method,
            "data.fingerprint": manifest.fingerprint,
        },
    )
