"""One optimizer step on a batch: precision, accumulation, mixing, losses, clipping."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import record_function

import models

if TYPE_CHECKING:
    from pipeline.config import Recipe
    from pipeline.context import TrainContext

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, recipe: Recipe) -> contextlib.AbstractContextManager[Any]:
    """Convolutions and matrix products in the recipe's precision."""
    if recipe.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[recipe.precision])


def low_precision(network: nn.Module, recipe: Recipe) -> None:
    """Give a network that learns nothing its weights in the recipe's precision, once for all.

    Autocast would convert them anew in every step.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and recipe.precision != "float32":
            module.to(_DTYPES[recipe.precision])


def square_hinge(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over images of the sum over classes of max(0, 1 - t y)^2, t = 1 for the class, else -1.

    Courbariaux et al. 2016 (arXiv 1602.02830), as Stadtmann et al. 2020 use it.

    Args:
        logits: float (N, classes).
        labels: int64 (N,).
    """
    targets = torch.full_like(logits, -1).scatter(1, labels[:, None], 1)
    return (1 - targets * logits).clamp_min(0).square().sum(dim=1).mean()


def distillation(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 times the divergence of the teacher's softened classes from the student's.

    Hinton et al. 2015 (arXiv 1503.02531), equation 4: T^2 keeps the size of the gradient.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


class TrainingStep:
    """The training step of a recipe on one rank's replica of a network.

    A rank's share of the batch is computed in ``accumulation`` parts. Each part counts by its
    images, so that the gradient is that of the mean over the global batch, however it is shared.

    Args:
        replica: the network as it is called in training, see ``TrainContext.wrap``.
        classes: that the network tells apart.
        teacher: images as the network sees them to logits; None: nothing to distill.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        replica: nn.Module,
        optimizer: torch.optim.Optimizer,
        context: TrainContext,
        *,
        classes: int,
        teacher: nn.Module | None = None,
    ) -> None:
        self._recipe = recipe
        self._model = model
        self._replica = replica
        self._forward: Callable[[torch.Tensor], torch.Tensor] = replica
        self._optimizer = optimizer
        self._context = context
        self._mix = _mixing(recipe, classes)
        self._teacher = teacher
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(
            context.device.type, enabled=recipe.precision == "float16"
        )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward and one optimizer step; nothing waits for the device.

        Args:
            images: float32 (N, C, H, W), this rank's share, normalized.
            labels: int64 (N,).
            rate: learning rate of this step.

        Returns:
            Mean loss and number of correct predictions of the share, as scalars on the device.
            Where images are mixed, the label with the larger part counts.
        """
        recipe = self._recipe
        self._optimizer.zero_grad(set_to_none=True)
        targets = labels
        if self._mix is not None:
            images, targets = self._mix(images, labels)
        loss, hits = self.backward(images, targets)
        with record_function("optimizer"):
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            if recipe.clip_norm is not None:
                self.scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._parameters, recipe.clip_norm)
            self.scaler.step(self._optimizer)
            self.scaler.update()
        return loss, hits

    def train(self) -> None:
        """Put the network in training mode."""
        self._replica.train()

    def backward(
        self, images: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradient of a share to that of the parameters.

        Args:
            targets: labels int64 (N,), or shares of the classes, float (N, classes).
        """
        recipe, parts = self._recipe, self._recipe.accumulation
        total = torch.zeros((), device=images.device)
        hits = torch.zeros((), dtype=torch.int64, device=images.device)
        pairs = list(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True))
        for part, (inputs, wanted) in enumerate(pairs, start=1):
            is_last = part == len(pairs)
            with contextlib.nullcontext() if is_last else self._context.no_sync(self._replica):
                with record_function("forward"):
                    loss, logits = self._loss(inputs, wanted)
                # Ranks are averaged, each with the weight 1 / world size.
                weighted = loss * (len(inputs) * self._context.world_size / recipe.batch_size)
                if is_last and recipe.latent_regularization:
                    penalty = models.latent_regularization(self._model)
                    weighted = weighted + recipe.latent_regularization * penalty
                with record_function("backward"):
                    self.scaler.scale(weighted).backward()
            total += loss.detach() * (len(inputs) / len(images))
            classes = wanted if wanted.ndim == 1 else wanted.argmax(dim=1)
            hits += (logits.detach().argmax(dim=1) == classes).sum()
        return total, hits

    def prepare(self, shapes: Sequence[tuple[int, int, int, int]]) -> None:
        """Compile what ``train.compile`` names, and settle in which order gradients are summed.

        Made-up batches are taken forward and backward, which leaves no trace in the network.

        Args:
            shapes: that the images of this rank's share will have, (N, C, H, W).
        """
        if self._recipe.compile != "none":
            self._compile(shapes)
        if self._context.world_size > 2:
            # After its first step DistributedDataParallel packs gradients anew, and a sum of three
            # depends on their place in the message: without this, the first step of a training
            # that is continued would round otherwise than the same step of one that was not.
            with self._leaving_no_trace():
                images = torch.zeros(shapes[0], device=self._context.device)
                self.backward(images, images.new_zeros(len(images), dtype=torch.int64))

    def _compile(self, shapes: Sequence[tuple[int, int, int, int]]) -> None:
        """Compile, or go on without, on all ranks, and say so."""
        # It warns that there is no CUDA where there is none.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        what, context = self._recipe.compile, self._context
        context.beat("compiling", 0)
        context.event("phase", text=f"compiling the {what} with torch.compile")
        if what == "model":
            self._forward = torch.compile(self._replica)
        else:
            models.compile_quantizers(self._model)
        problem = self._problem_of_compiling(shapes)
        works = torch.tensor([int(not problem)], device=context.device)
        if context.minima_over_ranks(works) == [0]:
            self._forward = self._replica
            for _, layer in models.quantized_layers(self._model):
                layer.compiled = False
            reason = problem or "it fails on another worker"
            text = f"train.compile={what} does not work here, training goes on without: {reason}"
            context.event("note", text=text)

    def _problem_of_compiling(self, shapes: Sequence[tuple[int, int, int, int]]) -> str:
        """Why one of the batches cannot be computed; empty where all can."""
        from torch._dynamo.exc import TorchDynamoException

        device = self._context.device
        try:
            for shape in shapes:
                self._context.beat("compiling", 0)
                labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
                images = torch.zeros(shape, device=device)
                if shape[1] > 1:
                    images = images.contiguous(memory_format=torch.channels_last)
                for part in images.tensor_split(self._recipe.accumulation):
                    # Without a word to the other ranks, of which one may fail alone.
                    with self._leaving_no_trace(), self._context.no_sync(self._replica):
                        self._loss(part, labels[: len(part)])[0].backward()
        except TorchDynamoException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"{type(error).__name__}: {' '.join(lines[:2])}"
        return ""

    @contextlib.contextmanager
    def _leaving_no_trace(self) -> Iterator[None]:
        """Within it, the network trains on made-up images, and afterwards is as before."""
        statistics = [buffer.clone() for buffer in self._model.buffers()]
        self._replica.train()
        try:
            yield
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            for buffer, value in zip(self._model.buffers(), statistics, strict=True):
                buffer.copy_(value)

    def _loss(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Mean loss of images, in float32, and their logits."""
        recipe = self._recipe
        with autocast(images.device, recipe):
            logits = self._forward(images)
        # In the type of the images: as exact as the caller's, whatever the network computed in.
        logits = logits.to(images.dtype)
        if recipe.loss == "square-hinge":
            return square_hinge(logits, targets), logits
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        if self._teacher is not None:
            with torch.no_grad(), autocast(images.device, recipe):
                told = self._teacher(images)
            taught = distillation(logits, told.to(images.dtype), recipe.temperature)
            loss = (1 - recipe.teacher_weight) * loss + recipe.teacher_weight * taught
        return loss, logits


def _mixing(recipe: Recipe, classes: int) -> Callable[..., Any] | None:
    """torchvision's mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899), or one of them."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    from torchvision.transforms import v2

    mixing: list[Callable[..., Any]] = []
    if recipe.mixup:
        mixing.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        mixing.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    return mixing[0] if len(mixing) == 1 else v2.RandomChoice(mixing)
