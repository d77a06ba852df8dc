"""The training loop: the same for every experiment, on one device or on many."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

import data_prep
import models
from pipeline.checkpoint import CheckpointStore, Progress
from pipeline.evaluate import evaluate
from pipeline.inputs import image_size, make_loader
from pipeline.optim import build_optimizer, learning_rate

if TYPE_CHECKING:
    from data_prep import Loader, Manifest
    from pipeline.config import Experiment, Recipe
    from pipeline.context import TrainContext
    from pipeline.inputs import Inputs

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
        image_size=image_size(experiment.train, inputs),
        seed=experiment.seed,
    )


def train(
    experiment: Experiment, manifest: Manifest, store: CheckpointStore, context: TrainContext
) -> None:
    """Train from the newest valid checkpoint, or from scratch, to the last epoch.

    Progress and results leave as events of the context; the trained weights are the last
    checkpoint. Each rank calls this with the same arguments.

    Raises:
        FloatingPointError: at a loss that is not finite, naming the epoch and step.
    """
    recipe = experiment.train
    context.event("phase", text=f"opening the prepared data{_cache_note(experiment, manifest)}")
    train_loader, test_loader = _loaders(experiment, manifest, context)
    model = channels_last(build_model(experiment, manifest).to(context.device))
    optimizer = build_optimizer(model, recipe)
    newest = store.newest(lambda line: context.event("note", text=line))
    epoch = context.agree(-1 if newest is None else newest)
    progress = store.load(epoch, model, optimizer) if epoch > 0 else Progress(0, 0, [])
    if epoch > 0:
        context.event("resumed", epoch=epoch, history=progress.history)

    replica = context.wrap(model)
    split = {"classes": manifest.classes, "images": manifest.counts["test"]}
    evaluation = None
    while progress.epoch < recipe.epochs:
        metrics = _train_epoch(experiment, replica, optimizer, train_loader, progress, context)
        _average_buffers(model, context)
        started = time.perf_counter()
        # Folded, as it is registered: nothing is quantized anew for every batch.
        evaluation = evaluate(models.fold(model), test_loader, context, **split)
        if not math.isfinite(evaluation.loss):
            raise _not_finite(progress.step + train_loader.steps_per_epoch - 1, progress.epoch)
        metrics |= evaluation.metrics() | {"evaluate_seconds": time.perf_counter() - started}
        progress = Progress(
            progress.epoch + 1,
            progress.step + train_loader.steps_per_epoch,
            [*progress.history, metrics],
        )
        if context.rank == 0:
            started = time.perf_counter()
            store.save(model, optimizer, progress)
            metrics["checkpoint_seconds"] = time.perf_counter() - started
        context.event(
            "epoch",
            epoch=progress.epoch,
            step=progress.step,
            steps=recipe.epochs * train_loader.steps_per_epoch,
            metrics=metrics,
        )
        context.report(metrics)
    if evaluation is None:
        evaluation = evaluate(models.fold(model), test_loader, context, **split)
    context.event(
        "evaluation",
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


def _loaders(
    experiment: Experiment, manifest: Manifest, context: TrainContext
) -> tuple[Loader, Loader]:
    """This rank's training and test batches."""
    place: dict[str, Any] = {
        "rank": context.rank,
        "world_size": context.world_size,
        "device": context.device,
    }
    return (
        make_loader(experiment, manifest, "train", training=True, **place),
        make_loader(experiment, manifest, "test", training=False, **place),
    )


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


def _train_epoch(
    experiment: Experiment,
    replica: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    progress: Progress,
    context: TrainContext,
) -> dict[str, float]:
    """One pass over the training split; metrics are means over all ranks."""
    recipe = experiment.train
    steps = loader.steps_per_epoch
    replica.train()
    meter = _Meter(context)
    started = told = time.perf_counter()
    with loader.epoch(progress.epoch) as batches:
        for done, (images, labels) in enumerate(batches, start=1):
            step = progress.step + done - 1
            # Dropout and the like draw the same numbers whether or not the run was interrupted.
            torch.manual_seed(hash((experiment.seed, step, context.rank)) % 2**63)
            rate = learning_rate(recipe, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, hits = train_step(replica, optimizer, images, labels, recipe)
            meter.add(step, loss, hits, len(labels))
            if done % CHECK_STEPS == 0:
                meter.check(progress.epoch)
            now = time.perf_counter()
            if context.rank == 0 and now - told > PROGRESS_INTERVAL:
                told = now
                context.event(
                    "step",
                    epoch=progress.epoch,
                    done=done,
                    steps=steps,
                    images_per_second=done * recipe.batch_size / (now - started),
                    **meter.means(),
                )
    seconds = time.perf_counter() - started
    meter.check(progress.epoch)
    meter.sum_over_ranks()
    return {
        **meter.means(),
        "lr": rate,
        "images_per_second": steps * recipe.batch_size / seconds,
        "train_seconds": seconds,
    }


def train_step(
    replica: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward and one optimizer step.

    Args:
        images: float32 (N, C, H, W), normalized.
        labels: int64 (N,).

    Returns:
        Mean loss and number of correct predictions, as scalars on the device.
    """
    with torch.autocast(
        images.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"
    ):
        logits = replica(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()


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
        self._context.sum_over_ranks(self._sums)
        self._images *= self._context.world_size  # shares of a training batch are equal

    def means(self) -> dict[str, float]:
        loss, hits = self._sums.tolist()
        return {"train_loss": loss / self._images, "train_top1": 100 * hits / self._images}


def _average_buffers(model: nn.Module, context: TrainContext) -> None:
    """Make the batch norm statistics, gathered by each rank on its share, the same everywhere."""
    constants = models.constant_buffers(model)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name not in constants:
            context.sum_over_ranks(buffer)
            buffer /= context.world_size
