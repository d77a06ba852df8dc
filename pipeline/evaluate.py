"""Evaluation: every image once over all ranks, and the figures that follow from the counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from data_prep import Loader
    from pipeline.context import TrainContext

#: With fewer classes than this, a top-5 hit says nothing.
TOP5_CLASSES = 20


@dataclass(frozen=True)
class Evaluation:
    """Counts over a split.

    Attributes:
        confusion: int64 (classes, classes); row: true class, column: predicted class.
        top5_hits: images whose class is among the five largest logits.
        loss: mean cross-entropy per image, in nats.
    """

    confusion: torch.Tensor
    top5_hits: int
    loss: float

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of images in percent whose largest logit is that of their class."""
        return 100 * int(self.confusion.diagonal().sum()) / self.images

    @property
    def top5(self) -> float | None:
        """As ``top1`` among the five largest; None where five of all classes is no feat."""
        if len(self.confusion) < TOP5_CLASSES:
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
    """Evaluate on this rank's share of a split and sum the counts over all ranks.

    Args:
        model: network, images (N, C, H, W) float32 to logits (N, classes).
        loader: evaluation loader of ``data_prep``; its ranks share the split without padding.
        context: this rank's context.
        classes: number of classes.
        images: of the whole split, which the ranks together have to count.

    Raises:
        RuntimeError: when the ranks together did not count each image exactly once.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=context.device)
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    largest = min(5, classes)
    with loader.epoch(0) as batches:
        for batch, labels in batches:
            context.beat("evaluating")
            logits = model(batch).float()
            ranked = logits.topk(largest, dim=1).indices
            # Unlike a count of bins, whose number a GPU would have to be asked for.
            cells = labels * classes + ranked[:, 0]
            confusion.index_add_(0, cells, torch.ones_like(cells))
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (ranked == labels[:, None]).sum()
    model.train(was_training)
    context.sum_over_ranks(confusion)
    context.sum_over_ranks(sums)
    confusion = confusion.view(classes, classes).cpu()
    counted = int(confusion.sum())
    if counted != images:
        raise RuntimeError(f"evaluation counted {counted} images of a split of {images}")
    return Evaluation(confusion, int(sums[1]), float(sums[0]) / images)
