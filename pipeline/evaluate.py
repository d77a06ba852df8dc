"""Evaluation: every image once over all ranks, and the figures that follow from the answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data_prep.reading.samples import rank_share
from pipeline.significance import wilson_interval

if TYPE_CHECKING:
    from data_prep import Loader
    from pipeline.context import TrainContext

#: With fewer classes than this, a top-5 hit says nothing.
TOP5_CLASSES = 20

#: Of each class in an event.
_EVENT_TYPE = np.dtype("<u4")


@dataclass(frozen=True)
class Evaluation:
    """The answers to a split.

    Attributes:
        predicted: int64 (images,), the class with the largest logit, in the order of the split.
        labels: int64 (images,), the true class.
        classes: how many there are.
        top5_hits: images whose class is among the five largest logits.
        loss: mean cross-entropy per image, in nats.
    """

    predicted: torch.Tensor
    labels: torch.Tensor
    classes: int
    top5_hits: int
    loss: float

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> Evaluation:
        """What ``to_event`` has told of."""
        predicted, labels = (
            torch.from_numpy(np.frombuffer(event[key], _EVENT_TYPE).astype(np.int64))
            for key in ("predicted", "labels")
        )
        return cls(predicted, labels, event["classes"], event["top5_hits"], event["loss"])

    def to_event(self) -> dict[str, Any]:
        """As content of an event: a few bytes for each image."""
        return {
            "predicted": self.predicted.numpy().astype(_EVENT_TYPE).tobytes(),
            "labels": self.labels.numpy().astype(_EVENT_TYPE).tobytes(),
            "classes": self.classes,
            "top5_hits": self.top5_hits,
            "loss": self.loss,
        }

    @cached_property
    def confusion(self) -> torch.Tensor:
        """Images, int64 (classes, classes); row: true class, column: predicted class."""
        cells = self.labels * self.classes + self.predicted
        return cells.bincount(minlength=self.classes**2).view(self.classes, self.classes)

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def hits(self) -> int:
        """Images whose largest logit is that of their class."""
        return int((self.predicted == self.labels).sum())

    @property
    def top1(self) -> float:
        """Share of hits in percent."""
        return 100 * self.hits / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of ``top1`` in percent, see ``wilson_interval``."""
        return wilson_interval(self.hits, self.images)

    @property
    def top5(self) -> float | None:
        """As ``top1`` among the five largest; None where five of all classes is no feat."""
        if self.classes < TOP5_CLASSES:
            return None
        return 100 * self.top5_hits / self.images

    @property
    def per_class(self) -> list[float | None]:
        """Percent correct of each class; None for a class without images."""
        rows = self.confusion.sum(dim=1).tolist()
        hits = self.confusion.diagonal().tolist()
        return [100 * hit / row if row else None for hit, row in zip(hits, rows, strict=True)]

    def metrics(self, split: str = "test") -> dict[str, float]:
        """The scalars of this evaluation as they are tracked, named by the split."""
        scalars = {f"{split}_top1": self.top1, f"{split}_loss": self.loss}
        if self.top5 is not None:
            scalars[f"{split}_top5"] = self.top5
        return scalars


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, context: TrainContext, *, classes: int, images: int
) -> Evaluation:
    """Evaluate on this rank's share of a split and put the answers of all ranks together.

    Args:
        model: network, images (N, C, H, W) float32 to logits (N, classes).
        loader: evaluation loader of ``data_prep``; its ranks share the split without padding.
        context: this rank's context.
        classes: number of classes.
        images: of the whole split, which the ranks together have to count.

    Raises:
        RuntimeError: on all ranks, when they together did not count each image exactly once.
    """
    was_training = model.training
    model.eval()
    answers: list[torch.Tensor] = []
    sums = torch.zeros(3, dtype=torch.float64, device=context.device)
    largest = min(5, classes)
    with loader.epoch(0) as batches:
        for batch, labels in batches:
            context.beat("evaluating")
            logits = model(batch).float()
            ranked = logits.topk(largest, dim=1).indices
            answers.append(torch.stack([ranked[:, 0], labels]))
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (ranked == labels[:, None]).sum()
            sums[2] += len(labels)
    model.train(was_training)
    # A row for the classes predicted, one for the true ones, and one that counts each image.
    gathered = torch.zeros(3, images, dtype=torch.int64, device=context.device)
    share = rank_share(images, context.rank, context.world_size)
    room = share.stop - share.start
    if answers:
        own = torch.cat(answers, dim=1)[:, :room]
        gathered[:2, share.start : share.start + own.shape[1]] = own
        gathered[2, share.start : share.start + own.shape[1]] = 1
    context.sum_over_ranks(gathered)
    context.sum_over_ranks(sums)
    predicted, true, counts = gathered.cpu()
    loss, top5_hits, counted = sums.tolist()
    if counted != images or not bool((counts == 1).all()):
        raise RuntimeError(f"evaluation counted {counted:.0f} images of a split of {images}")
    return Evaluation(predicted, true, classes, int(top5_hits), loss / images)
