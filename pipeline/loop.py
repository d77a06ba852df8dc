"""The training loop: the same for every experiment, on one device or on many."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.profiler import record_function

import data_prep
import models
from pipeline import inputs as data
from pipeline.averaging import MovingAverage, Statistics
from pipeline.checkpoints.saving import Saving
from pipeline.checkpoints.state import Progress, TrainingState
from pipeline.checkpoints.store import CheckpointStore, UnusableCheckpointError, kept_epoch
from pipeline.context import Wish
from pipeline.evaluate import Evaluation, evaluate
from pipeline.meter import Checks, Meter, not_finite
from pipeline.optim import build_optimizer, learning_rate, plateau_factor
from pipeline.training_step import TrainingStep, autocast, low_precision

if TYPE_CHECKING:
    from data_prep import Loader, Manifest
    from pipeline.config import Experiment
    from pipeline.context import TrainContext
    from pipeline.inputs import Inputs
    from pipeline.weights import Sources

#: Seconds between two progress events, each of which waits for the device once.
PROGRESS_INTERVAL = 0.5

#: Seconds for which storage behind a network may stall without anything being lost.
STALL = 90.0

#: Of smaller files nobody asks how they are cached.
_NOTED_BYTES = 1 << 30


class _Stopped(Exception):
    """On all ranks: the state is saved, and nothing more is to be done."""


def build_model(experiment: Experiment, inputs: Inputs) -> nn.Module:
    """The experiment's network with its method applied, on the CPU, weights from the seed.

    Args:
        inputs: the data set, or the manifest of its prepared files.
    """
    if inputs.classes is None:
        raise ValueError("the number of classes has to be known before a network is built")
    return models.create_model(
        experiment.backbone,
        experiment.method,
        num_classes=inputs.classes,
        in_channels=inputs.channels,
        image_size=data.image_size(experiment.train, inputs),
        seed=experiment.seed,
        blurpool=experiment.train.blurpool,
    )


def train(
    experiment: Experiment,
    manifest: Manifest,
    store: CheckpointStore,
    context: TrainContext,
    sources: Sources | None = None,
) -> None:
    """Train from the newest valid checkpoint, or from the beginning, to the last epoch.

    Progress and results leave as events of the context. The last one, ``evaluation``, names the
    epoch whose checkpoint has the trained weights; or it is ``stopped``, after the state was saved
    because the context wished to stop. Each rank calls this with the same arguments.

    Args:
        sources: weights to begin with, and a teacher's, where the experiment names any.

    Raises:
        FloatingPointError: at a loss that is not finite, naming the epoch and step.
        CheckpointError: when a checkpoint cannot be written.
    """
    training = _Training(experiment, manifest, store, context, sources)
    try:
        while training.progress.epoch < experiment.train.epochs:
            metrics = training.train_epoch()
            metrics |= training.evaluate_epoch()
            training.finish_epoch(metrics)
        training.evaluate_result()
    except _Stopped:
        progress = training.progress
        context.event("stopped", epoch=progress.epoch, done=progress.done)
    except Exception:  # an interrupt does not wait
        training.saving.close()
        raise


class _Training:
    """What the epochs of a training have in common: network, batches, progress."""

    def __init__(
        self,
        experiment: Experiment,
        manifest: Manifest,
        store: CheckpointStore,
        context: TrainContext,
        sources: Sources | None,
    ) -> None:
        recipe = experiment.train
        # Sizes hold still within an epoch, so that it pays to try which convolution is fastest.
        torch.backends.cudnn.benchmark = True
        self.experiment, self.recipe, self.manifest = experiment, recipe, manifest
        self.store, self.context = store, context
        context.beat("opening the data", 0)
        context.event("phase", text=f"opening the prepared data{_cache_note(experiment, manifest)}")
        self.loader = self._open("train", training=True)
        # What an epoch is judged by: held-out images, where the recipe holds any out.
        self.watched = "validation" if recipe.validation else "test"
        self.watched_loader = self._open(self.watched)

        model, teacher = build_model(experiment, manifest), None
        if sources is not None:
            teacher = self._begin_with(sources, model)
        model = channels_last(model.to(context.device))
        optimizer = build_optimizer(model, recipe)
        self.average = MovingAverage(model, recipe.ema_decay) if recipe.ema_decay else None
        replica = context.wrap(model, sync_batchnorm=recipe.sync_batchnorm)
        self.step = TrainingStep(
            recipe, model, replica, optimizer, context, classes=manifest.classes, teacher=teacher
        )
        self.state = TrainingState(
            model, optimizer, self.step.scaler, self.average.model if self.average else None
        )
        networks = [model] if self.average is None else [model, self.average.model]
        self.statistics = Statistics(networks)
        self.checks = Checks(context)
        self.saving = Saving(
            experiment, store, context, self.state, self.statistics, self.loader.steps_per_epoch
        )
        # Of an epoch that goes on, also what this rank has counted in it.
        self.progress, self.counted = self.saving.restore(Meter(context).row())
        if self.progress.epoch < recipe.epochs:
            images, channels = self.loader.images_per_step, manifest.channels
            sizes = data.training_sizes(recipe, manifest)
            self.step.prepare([(images, channels, size, size) for size in sizes])

    def _begin_with(self, sources: Sources, model: nn.Module) -> nn.Module | None:
        """Give the network the weights that it begins with; return its teacher, if it has one."""
        from pipeline.weights import build_teacher, load_into

        if sources.initial is not None:
            load_into(model, sources.initial)
        if sources.teacher is None:
            return None
        teacher = build_teacher(sources.teacher, self.experiment, self.manifest)
        low_precision(teacher, self.recipe)
        return channels_last(teacher.to(self.context.device))

    def _open(self, split: str, *, training: bool = False) -> Loader:
        """This rank's batches of a split."""
        return data.make_loader(
            self.experiment,
            self.manifest,
            split,
            training=training,
            rank=self.context.rank,
            world_size=self.context.world_size,
            device=self.context.device,
        )

    def train_epoch(self) -> dict[str, float]:
        """The pass over the training split, or what is left of it; metrics are over all ranks.

        Raises:
            _Stopped: on all ranks, when one was asked to stop; the state is saved.
        """
        recipe, context, progress, checks = self.recipe, self.context, self.progress, self.checks
        steps = self.loader.steps_per_epoch
        losses = [epoch["validation_loss"] for epoch in progress.history if recipe.validation]
        factor = plateau_factor(recipe, losses)
        self.step.train()
        meter, self.counted = Meter(context, self.counted), None
        checks.begin_epoch()
        told = time.perf_counter()
        first = progress.step - progress.done
        with self.loader.epoch(progress.epoch, progress.done) as batches:
            for done in range(progress.done + 1, steps + 1):
                step = first + done - 1
                context.beat("reading images", step, checks.usual, STALL)
                with record_function("data"):
                    images, labels = next(batches)
                context.beat("computing", step, checks.usual)
                # Dropout and the like draw the same numbers whether or not the run was interrupted.
                torch.manual_seed(hash((self.experiment.seed, step, context.rank)) % 2**63)
                rate = learning_rate(recipe, step, steps) * factor
                loss, hits = self.step(images, labels, rate)
                if self.average is not None:
                    self.average.update(step)
                with record_function("report"):
                    meter.add(step, loss, hits, len(labels))
                    now = time.perf_counter()
                    if context.rank == 0 and now - told > PROGRESS_INTERVAL:
                        told = now
                        self._tell_step(done, meter)
                    if checks.is_due() or done == steps or self.saving.is_due(step + 1, done):
                        self._check(meter, done)
        meter.sum_over_ranks()
        seconds = meter.seconds
        return {
            **meter.means(),
            "lr": learning_rate(recipe, first + steps - 1, steps) * factor,
            "images_per_second": meter.images / seconds,
            "train_seconds": seconds,
            "peak_memory_bytes": float(_peak_memory(context.device)),
        }

    def _check(self, meter: Meter, done: int) -> None:
        """Stop all ranks at a bad loss of any; save where it is time to, or somebody asks."""
        saving, progress = self.saving, self.progress
        step = progress.step - progress.done + done
        verdict = self.checks.agree(saving.wish(progress, done), meter.first_bad)
        if verdict.bad_step is not None:
            raise not_finite(verdict.bad_step, progress.epoch)
        saving.tell()
        if verdict.wish is Wish.NOTHING and not saving.is_due(step, done):
            return
        self.context.beat("saving", step)
        self.progress = Progress(progress.epoch, step, progress.history, done)
        saving.save(self.progress, meter.row())
        if verdict.wish is Wish.STOP:
            saving.finish()
            raise _Stopped

    def _tell_step(self, done: int, meter: Meter) -> None:
        self.context.event(
            "step",
            epoch=self.progress.epoch,
            done=done,
            steps=self.loader.steps_per_epoch,
            images_per_second=done * self.recipe.batch_size / meter.seconds,
            **meter.means(),
        )

    def evaluate_epoch(self) -> dict[str, float]:
        """Evaluate the weights that would be kept, on the images that epochs are judged by."""
        self.context.beat("evaluating")
        self.statistics.average(self.context)
        started = time.perf_counter()
        evaluation = self._evaluate(self.watched, self.watched_loader, fast=True)
        if not math.isfinite(evaluation.loss):
            last = self.progress.step - self.progress.done + self.loader.steps_per_epoch - 1
            raise not_finite(last, self.progress.epoch)
        seconds = time.perf_counter() - started
        return evaluation.metrics(self.watched) | {"evaluate_seconds": seconds}

    def _evaluate(self, split: str, loader: Loader, *, fast: bool) -> Evaluation:
        """Evaluate the kept weights, in the precision of the training or exactly."""
        model = self.state.average if self.state.average is not None else self.state.model
        # Folded, as it is registered: nothing is quantized anew for every batch.
        with autocast(self.context.device, self.recipe) if fast else contextlib.nullcontext():
            return evaluate(
                models.fold(model),
                loader,
                self.context,
                classes=self.manifest.classes,
                images=data.split_images(self.experiment, self.manifest, split),
            )

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Keep the state and the metrics, and stop here where that is asked for."""
        metrics |= {"checkpoint_seconds": self.saving.held_up(), "time": time.time()}
        before = self.progress
        step = before.step - before.done + self.loader.steps_per_epoch
        self.progress = Progress(before.epoch + 1, step, [*before.history, metrics])
        self.saving.save(self.progress)
        self.context.report(metrics)
        if self.checks.agree(self.context.wish()).wish is Wish.STOP:
            self.saving.finish()
            raise _Stopped
        self.saving.tell()

    def evaluate_result(self) -> None:
        """Evaluate the result on the test split, in float32, and tell all about it."""
        self.saving.finish()
        kept = self._load_kept()
        loader = self.watched_loader if self.watched == "test" else self._open("test")
        evaluation = self._evaluate("test", loader, fast=False)
        self.context.event("evaluation", epoch=kept, **evaluation.to_event())

    def _load_kept(self) -> int:
        """Take the weights that are the result, and return the epoch that they are of."""
        kept, last = kept_epoch(self.progress.history), self.progress.epoch
        if kept == last:
            return last
        result = self.state.average if self.state.average is not None else self.state.model
        try:
            self.store.load_model(kept, result)
        except UnusableCheckpointError as error:
            # Better than no result at all, after all these epochs.
            self.context.event("note", text=f"{error}; the result is that of epoch {last} instead")
            return last
        return kept


def channels_last(model: nn.Module) -> nn.Module:
    """Put the channels innermost, which convolutions prefer on the CPU as on tensor cores.

    A kernel for which both layouts are the same (one input channel, or 1x1) keeps the plain
    strides: its gradient has them, and DDP copies where the two differ.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.shape[2:].numel() > 1:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def _cache_note(experiment: Experiment, manifest: Manifest) -> str:
    """Where the training images will be kept, where there is something to decide."""
    file = manifest.files["train"]
    if experiment.data.cache == "auto" and file.bytes < _NOTED_BYTES:
        return ""
    cache = experiment.data.cache
    if cache == "auto":
        cache = data_prep.choose_cache(file.bytes)
    how = {
        "page": "in the page cache, shared by all workers",
        "process": "read anew for each batch, past the page cache",
    }
    return f": {file.bytes / 1e9:.1f} GB, {how[cache]}"


def _peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at a time: of the GPU, or of this process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
