"""Evaluation: each image once over all ranks, in order, and what follows from the answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data_prep
import models
from pipeline.context import TrainContext
from pipeline.evaluate import Evaluation, evaluate

REPOSITORY = Path(__file__).parents[3]
IMAGES = 31

#: Four ranks of one process group, of which the last has an image less; forked from one process.
PROGRAM = f"""
import multiprocessing, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
import numpy as np
import torch
import torch.distributed as dist
import data_prep
from pipeline.context import ProcessGroupContext
from pipeline.evaluate import evaluate
from tests.unit.pipeline.test_evaluate import network

folder, manifest = Path(sys.argv[1]), data_prep.Manifest.read(Path(sys.argv[2]))
torch.set_num_threads(1)

def run(rank):
    meeting = f"file://{{folder}}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=4)
    context = ProcessGroupContext(lambda event: None, torch.device("cpu"))
    loader = data_prep.make_loader(
        manifest, "test", batch_size=12, training=False, rank=rank, world_size=4,
        reading=data_prep.Reading(backend="torch"),
    )
    found = evaluate(network(), loader, context, classes=10, images={IMAGES})
    np.save(folder / f"predicted{{rank}}.npy", found.predicted.numpy())
    dist.destroy_process_group()

fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=run, args=(rank,)) for rank in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(any(process.exitcode for process in processes))
"""


def network() -> torch.nn.Module:
    return models.create_model("lenet5", num_classes=10, in_channels=1, image_size=32).eval()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return data_prep.prepare(
        "digits", prepared=tmp_path_factory.mktemp("prepared"), synthetic=(20, IMAGES)
    )


def here(manifest, batch_size: int = 7) -> Evaluation:
    """The test split evaluated in this process."""
    loader = data_prep.make_loader(manifest, "test", batch_size=batch_size, training=False)
    return evaluate(network(), loader, local_context(), classes=10, images=IMAGES)


def local_context() -> TrainContext:
    context = TrainContext(lambda event: None)
    context.device = torch.device("cpu")
    return context


def test_the_answers_equal_a_count_by_hand_in_the_order_of_the_split(manifest):
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    losses, answers, model = [], [], network()
    for rank in range(3):
        share = data_prep.make_loader(
            manifest, "test", batch_size=6, training=False, rank=rank, world_size=3
        )
        with share.epoch(0) as batches, torch.no_grad():
            for images, labels in batches:
                logits = model(images)
                losses += F.cross_entropy(logits, labels, reduction="none").tolist()
                for label, predicted in zip(labels, logits.argmax(1), strict=True):
                    confusion[label, predicted] += 1
                    answers.append((int(label), int(predicted)))
    result = here(manifest)
    assert list(zip(result.labels.tolist(), result.predicted.tolist(), strict=True)) == answers
    assert result.images == IMAGES == len(losses)
    assert torch.equal(result.confusion, confusion)
    assert result.loss == pytest.approx(sum(losses) / IMAGES, rel=1e-6)
    assert result.top1 == pytest.approx(100 * int(confusion.trace()) / IMAGES)
    assert result.top5 is None, "five of ten classes is no feat"


class Ledger(TrainContext):
    """Ranks one after another: each adds its share, so that the last one has the sums."""

    def __init__(self, sums: list[torch.Tensor], rank: int, world_size: int) -> None:
        super().__init__(lambda event: None, torch.device("cpu"))
        self.rank, self.world_size = rank, world_size
        self._sums, self._calls = sums, 0

    def sum_over_ranks(self, tensor: torch.Tensor) -> None:
        if self._calls == len(self._sums):
            self._sums.append(torch.zeros_like(tensor))
        self._sums[self._calls] += tensor
        tensor.copy_(self._sums[self._calls])
        self._calls += 1


@pytest.mark.parametrize("world_size", [2, 4, IMAGES])
def test_the_shares_of_the_ranks_fall_into_place(manifest, world_size):
    sums: list[torch.Tensor] = []
    for rank in range(world_size):
        share = data_prep.make_loader(
            manifest, "test", batch_size=max(12, world_size), training=False, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        context = Ledger(sums, rank, world_size)
        if rank < world_size - 1:
            with pytest.raises(RuntimeError, match=f"of a split of {IMAGES}"):
                evaluate(network(), share, context, classes=10, images=IMAGES)
    whole = evaluate(network(), share, context, classes=10, images=IMAGES)
    alone = here(manifest)
    assert torch.equal(whole.predicted, alone.predicted)
    assert torch.equal(whole.labels, alone.labels)
    assert whole.loss == pytest.approx(alone.loss)


@pytest.mark.slow
def test_four_ranks_with_unequal_shares_give_every_rank_the_answers_of_one(manifest, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(manifest.folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = here(manifest).predicted.numpy()
    for rank in range(4):
        np.testing.assert_array_equal(np.load(tmp_path / f"predicted{rank}.npy"), alone)


def test_an_evaluation_travels_in_an_event_of_a_few_bytes_an_image(manifest):
    result = here(manifest)
    event = result.to_event()
    assert len(event["predicted"]) + len(event["labels"]) == 8 * IMAGES
    back = Evaluation.from_event(event)
    assert torch.equal(back.predicted, result.predicted)
    assert torch.equal(back.confusion, result.confusion)
    assert (back.loss, back.top5_hits, back.classes) == (result.loss, result.top5_hits, 10)


def answers(confusion: list[list[int]]) -> Evaluation:
    """An evaluation with that confusion matrix."""
    pairs = [
        (label, predicted)
        for label, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        for _ in range(count)
    ]
    labels, predicted = torch.tensor(pairs).T
    return Evaluation(predicted, labels, len(confusion), top5_hits=len(pairs), loss=0.5)


def test_per_class_accuracy_follows_from_the_answers():
    result = answers([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert result.per_class == [75.0, 100.0, None]
    assert result.top1 == pytest.approx(100 * 5 / 6)
    assert result.metrics() == {"test_top1": result.top1, "test_loss": 0.5}


def test_the_interval_is_around_the_accuracy():
    low, high = answers([[3, 1], [0, 2]]).interval
    assert (low, high) == pytest.approx((43.6495, 96.9946), abs=1e-3)  # of R's binom.wilson(5, 6)


def test_top5_appears_with_enough_classes():
    identity = torch.eye(20, dtype=torch.int64).tolist()
    assert answers(identity).metrics()["test_top5"] == 100.0


def test_an_evaluation_that_lost_images_is_refused(manifest):
    """A rank whose counts never arrive makes the total short."""
    share = data_prep.make_loader(
        manifest, "test", batch_size=6, training=False, rank=0, world_size=2
    )
    with pytest.raises(RuntimeError, match=f"counted 16 images of a split of {IMAGES}"):
        evaluate(network(), share, local_context(), classes=10, images=IMAGES)
