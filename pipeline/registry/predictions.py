"""What a version answered to each test image, so that two versions can be compared image by image.

A small file of whole numbers, in which nothing can run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.config import PipelineError
from pipeline.significance import mcnemar

if TYPE_CHECKING:
    from pipeline.evaluate import Evaluation

_TENSORS = {"predicted", "labels"}


class NotComparableError(PipelineError):
    """Two versions cannot be compared image by image."""


@dataclass(frozen=True)
class Predictions:
    """The answers of a version to its test images.

    Attributes:
        data: SHA-256 of the prepared test split, 64 hex digits: the same for the same images in
            the same order, whatever is made of their pixels later.
        predicted: whole numbers (images,), the class predicted.
        labels: whole numbers (images,), the true class.
    """

    data: str
    predicted: npt.NDArray[np.integer]
    labels: npt.NDArray[np.integer]

    @classmethod
    def of(cls, evaluation: Evaluation, data: str) -> Predictions:
        """The answers of an evaluation on the test split with this digest."""
        kind = np.min_scalar_type(evaluation.classes - 1)
        answers = (evaluation.predicted, evaluation.labels)
        predicted, labels = (tensor.numpy().astype(kind) for tensor in answers)
        return cls(data, predicted, labels)

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def top1(self) -> float:
        """Share of images that were classified right, in percent."""
        return 100 * int(self._right.sum()) / self.images

    @property
    def _right(self) -> npt.NDArray[np.bool_]:
        return self.predicted == self.labels

    def save(self, path: Path) -> None:
        """Write them as safetensors, one or two bytes for each number."""
        from safetensors.numpy import save

        tensors = {"predicted": self.predicted, "labels": self.labels}
        path.write_bytes(save(tensors, metadata={"data": self.data}))

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what ``save`` wrote.

        Raises:
            NotComparableError: when the file is something else, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                data = (file.metadata() or {}).get("data", "")
                if set(file.keys()) != _TENSORS:
                    raise NotComparableError(f"{path.name} holds no predictions")
                predicted, labels = file.get_tensor("predicted"), file.get_tensor("labels")
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:100]
            raise NotComparableError(f"{path.name} is damaged: {reason}") from None
        whole = all(np.issubdtype(array.dtype, np.integer) for array in (predicted, labels))
        if not whole or predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
            raise NotComparableError(f"{path.name} holds no predictions")
        return cls(data, predicted, labels)


@dataclass(frozen=True)
class Comparison:
    """Two versions on the same test images.

    Attributes:
        first, second: top-1 accuracies in percent.
        only_first: images that only the first version gets right.
        only_second: images that only the second one gets right.
    """

    first: float
    second: float
    only_first: int
    only_second: int

    @property
    def p_first(self) -> float:
        """Probability of such a lead of the first version, or a larger one, if it is no better."""
        return mcnemar(self.only_first, self.only_second)

    @property
    def p_second(self) -> float:
        """As ``p_first``, of the second version."""
        return mcnemar(self.only_second, self.only_first)


def compare(first: Predictions, second: Predictions) -> Comparison:
    """Compare two versions image by image.

    Raises:
        NotComparableError: when they answered to other images.
    """
    if first.data != second.data or not np.array_equal(first.labels, second.labels):
        raise NotComparableError("they were evaluated on other test images")
    mine, theirs = first._right, second._right
    return Comparison(
        first.top1, second.top1, int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
    )
