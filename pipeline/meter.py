"""What is counted in an epoch, on all ranks together, and when they look at it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.context import Wish

if TYPE_CHECKING:
    from pipeline.context import TrainContext

#: Steps between two looks at most, and about so many seconds where steps take longer.
CHECK_STEPS = 50
CHECK_SECONDS = 5.0

_NO_STEP = 2**62


def not_finite(step: int, epoch: int) -> FloatingPointError:
    """The error of a loss that is not finite at optimizer step ``step`` of epoch ``epoch``."""
    return FloatingPointError(
        f"the loss was not finite at step {step} (epoch {epoch + 1}); "
        "lower train.lr or raise train.warmup_epochs"
    )


class Meter:
    """Running sums of an epoch that stay on the device until somebody asks.

    Args:
        before: ``row()`` of what this rank has counted of the epoch already.
    """

    def __init__(self, context: TrainContext, before: torch.Tensor | None = None) -> None:
        self._context = context
        self._sums = torch.zeros(2, dtype=torch.float64, device=context.device)
        self._images = 0
        self._seconds = 0.0
        if before is not None:
            self._sums += before[:2].to(context.device)
            self._images = int(before[2])
            self._seconds = float(before[3])
        self._started = time.perf_counter()
        self.first_bad = torch.full((), _NO_STEP, dtype=torch.int64, device=context.device)

    def add(self, step: int, loss: torch.Tensor, hits: torch.Tensor, images: int) -> None:
        """Count a step: mean loss of this rank's images, and how many of them were hit."""
        self._images += images
        self._sums += torch.stack((loss.double() * images, hits.double()))
        bad = torch.where(torch.isfinite(loss), _NO_STEP, step)
        self.first_bad = torch.minimum(self.first_bad, bad)

    @property
    def seconds(self) -> float:
        """That the epoch has taken so far."""
        return self._seconds + time.perf_counter() - self._started

    def row(self) -> torch.Tensor:
        """What this rank has counted, float64 (4,), to go on with it later; rank 0 has the time."""
        seconds = self.seconds if self._context.rank == 0 else 0.0
        return torch.cat((self._sums, self._sums.new_tensor([self._images, seconds])))

    def sum_over_ranks(self) -> None:
        self._context.sum_over_ranks(self._sums)
        images = torch.tensor([self._images], device=self._context.device)
        self._context.sum_over_ranks(images)
        self._images = int(images)

    @property
    def images(self) -> int:
        return self._images

    def means(self) -> dict[str, float]:
        loss, hits = self._sums.tolist()
        return {"train_loss": loss / self._images, "train_top1": 100 * hits / self._images}


@dataclass(frozen=True)
class Verdict:
    """What all ranks know of the steps so far, and what they do now.

    Attributes:
        wish: the strongest of any rank.
        bad_step: the first whose loss was not finite on some rank; None without one.
    """

    wish: Wish
    bad_step: int | None


class Checks:
    """When all ranks stop and agree on how the training goes, which waits for the device.

    They agree on the next time too, so that they meet however their clocks differ: after 50
    steps, or about five seconds where steps are slow.
    """

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._left = 1
        self._steps = 0
        self._since = time.perf_counter()
        self.usual: float | None = None  #: seconds that a step takes, as far as it is known

    def begin_epoch(self) -> None:
        """Check after the first step: what came before it has taken a time of its own."""
        self._left, self._steps = 1, 0
        self._since = time.perf_counter()

    def is_due(self) -> bool:
        """Count a step, and say whether all ranks check after it."""
        self._steps += 1
        self._left -= 1
        return self._left <= 0

    def agree(self, wish: Wish, first_bad: torch.Tensor | None = None) -> Verdict:
        """What all ranks know together; each has to call this.

        Args:
            wish: of this rank.
            first_bad: ``Meter.first_bad`` of this rank.
        """
        if first_bad is None:
            first_bad = torch.tensor(_NO_STEP, device=self._context.device)
        mine = torch.stack((first_bad, *first_bad.new_tensor([-int(wish), self._pace()])))
        bad_step, strongest, self._left = self._context.minima_over_ranks(mine)
        self._steps, self._since = 0, time.perf_counter()
        return Verdict(Wish(-strongest), None if bad_step == _NO_STEP else bad_step)

    def _pace(self) -> int:
        """Steps until the next check, as this rank would have it."""
        if self._steps == 0:
            return max(self._left, 1)
        self.usual = (time.perf_counter() - self._since) / self._steps
        return max(1, min(CHECK_STEPS, int(CHECK_SECONDS / max(self.usual, 1e-9))))
