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
from pipeline.averaging import MovingAverage, average_statistics
from pipeline.checkpoint import CheckpointStore, Progress, TrainingState, kept_epoch
from pipeline.evaluate import Evaluation, evaluate
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

#: Steps between two checks of the loss on all ranks together.
CHECK_STEPS = 50

_NO_STEP = 2**62

#: Of smaller files nobody asks how they are cached.
_NOTED_BYTES = 1 << 30


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
    epoch whose checkpoint has the trained weights. Each rank calls this with the same arguments.

    Args:
        sources: weights to begin with, and a teacher's, where the experiment names any.

    Raises:
        FloatingPointError: at a loss that is not finite, naming the epoch and step.
    """
    training = _Training(experiment, manifest, store, context, sources)
    while training.progress.epoch < experiment.train.epochs:
        metrics = training.train_epoch()
        metrics |= training.evaluate_epoch()
        training.finish_epoch(metrics)
    training.evaluate_result()


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
        self.progress = self._restore()
        if recipe.compile != "none" and self.progress.epoch < recipe.epochs:
            images, channels = self.loader.images_per_step, manifest.channels
            sizes = data.training_sizes(recipe, manifest)
            self.step.compile([(images, channels, size, size) for size in sizes])

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

    def _restore(self) -> Progress:
        """Go on from the newest valid checkpoint, on which all ranks agree."""
        context = self.context
        newest = self.store.newest(lambda line: context.event("note", text=line))
        epoch = context.agree(-1 if newest is None else newest)
        if epoch < 1:
            return Progress(0, 0, [])
        progress = self.store.load(epoch, self.state)
        context.event("resumed", epoch=epoch, history=progress.history)
        return progress

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training split; metrics are means over all ranks."""
        recipe, context, progress = self.recipe, self.context, self.progress
        steps = self.loader.steps_per_epoch
        losses = [epoch["validation_loss"] for epoch in progress.history if recipe.validation]
        factor = plateau_factor(recipe, losses)
        self.step.train()
        meter = _Meter(context)
        started = told = time.perf_counter()
        rate = 0.0
        with self.loader.epoch(progress.epoch) as batches:
            for done in range(1, steps + 1):
                with record_function("data"):
                    images, labels = next(batches)
                step = progress.step + done - 1
                # Dropout and the like draw the same numbers whether or not the run was interrupted.
                torch.manual_seed(hash((self.experiment.seed, step, context.rank)) % 2**63)
                rate = learning_rate(recipe, step, steps) * factor
                loss, hits = self.step(images, labels, rate)
                if self.average is not None:
                    self.average.update(step)
                with record_function("report"):
                    meter.add(step, loss, hits, len(labels))
                    if done % CHECK_STEPS == 0:
                        meter.check(progress.epoch)
                    now = time.perf_counter()
                    if context.rank == 0 and now - told > PROGRESS_INTERVAL:
                        told = now
                        figures = {"images_per_second": done * recipe.batch_size / (now - started)}
                        self._tell_step(done, steps, figures | meter.means())
        meter.check(progress.epoch)
        seconds = time.perf_counter() - started
        meter.sum_over_ranks()
        return {
            **meter.means(),
            "lr": rate,
            "images_per_second": steps * recipe.batch_size / seconds,
            "train_seconds": seconds,
            "peak_memory_bytes": float(_peak_memory(context.device)),
        }

    def _tell_step(self, done: int, steps: int, figures: dict[str, float]) -> None:
        self.context.event("step", epoch=self.progress.epoch, done=done, steps=steps, **figures)

    def evaluate_epoch(self) -> dict[str, float]:
        """Evaluate the weights that would be kept, on the images that epochs are judged by."""
        for model in (self.state.model, self.state.average):
            if model is not None:
                average_statistics(model, self.context)
        started = time.perf_counter()
        evaluation = self._evaluate(self.watched, self.watched_loader, fast=True)
        if not math.isfinite(evaluation.loss):
            last = self.progress.step + self.loader.steps_per_epoch - 1
            raise _not_finite(last, self.progress.epoch)
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
        """Keep the state, tell the metrics, and let every rank report them."""
        context, steps = self.context, self.loader.steps_per_epoch
        self.progress = Progress(
            self.progress.epoch + 1, self.progress.step + steps, [*self.progress.history, metrics]
        )
        if context.rank == 0:
            started = time.perf_counter()
            self.store.save(self.state, self.progress)
            metrics = metrics | {"checkpoint_seconds": time.perf_counter() - started}
        context.event(
            "epoch",
            epoch=self.progress.epoch,
            step=self.progress.step,
            steps=self.recipe.epochs * steps,
            metrics=metrics,
        )
        context.report(metrics)

    def evaluate_result(self) -> None:
        """Evaluate the result on the test split, in float32, and tell all about it."""
        kept = kept_epoch(self.progress.history)
        if kept != self.progress.epoch:
            result = self.state.average if self.state.average is not None else self.state.model
            self.store.load_model(kept, result)
        loader = self.watched_loader if self.watched == "test" else self._open("test")
        evaluation = self._evaluate("test", loader, fast=False)
        self.context.event(
            "evaluation",
            epoch=kept,
            confusion=evaluation.confusion.tolist(),
            top5_hits=evaluation.top5_hits,
            loss=evaluation.loss,
        )


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


def _not_finite(step: int, epoch: int) -> FloatingPointError:
    return FloatingPointError(
        f"the loss was not finite at step {step} (epoch {epoch + 1}); "
        "lower train.lr or raise train.warmup_epochs"
    )


class _Meter:
    """Running sums of an epoch that stay on the device until somebody asks."""

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._sums = torch.zeros(2, dtype=torch.float64, device=context.device)
        self._images = 0
        self._first_bad = torch.full((), _NO_STEP, dtype=torch.int64, device=context.device)

    def add(self, step: int, loss: torch.Tensor, hits: torch.Tensor, images: int) -> None:
        self._images += images
        self._sums += torch.stack((loss.double() * images, hits.double()))
        bad = torch.where(torch.isfinite(loss), _NO_STEP, step)
        self._first_bad = torch.minimum(self._first_bad, bad)

    def check(self, epoch: int) -> None:
        """Stop on every rank when the loss of any rank was not finite."""
        first = self._context.minimum_over_ranks(self._first_bad)
        if first != _NO_STEP:
            raise _not_finite(first, epoch)

    def sum_over_ranks(self) -> None:
        images = torch.tensor([self._images], device=self._context.device)
        self._context.sum_over_ranks(self._sums)
        self._context.sum_over_ranks(images)
        self._images = int(images)

    def means(self) -> dict[str, float]:
        loss, hits = self._sums.tolist()
        return {"train_loss": loss / self._images, "train_top1": 100 * hits / self._images}
