"""Golden loss curves: a refactor must not move the training of any method.

Each method trains LeNet5 for twenty steps on made-up images. The curves were written by this very
test with ``TERNFORGE_WRITE_GOLDEN=1``; the tolerance covers other CPUs' rounding, which twenty
steps do not amplify beyond it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import data_prep
import models
from pipeline.config import Experiment, Recipe
from pipeline.loop import build_model, train_step
from pipeline.optim import build_optimizer, learning_rate

FOLDER = Path(__file__).parent
STEPS = 20
RECIPE = Recipe(epochs=2, batch_size=32, lr=0.05, warmup_epochs=0.5, shift=1)
VARIANTS = [*models.list_methods(), "ternary(expansion=2)", "ternary(expansion=4)"]


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    manifest = data_prep.prepare(
        "digits", prepared=tmp_path_factory.mktemp("golden"), backend="torch", synthetic=(320, 10)
    )
    return data_prep.make_loader(
        manifest,
        "train",
        batch_size=RECIPE.batch_size,
        training=True,
        augmentation=data_prep.Augmentation(shift=RECIPE.shift),
    )


def loss_curve(method: str, loader) -> list[float]:
    experiment = Experiment(
        name="golden", dataset="digits", backbone="lenet5", method=method, train=RECIPE
    )
    model = build_model(experiment)
    optimizer = build_optimizer(model, RECIPE)
    losses: list[float] = []
    for epoch in range(RECIPE.epochs):
        with loader.epoch(epoch) as batches:
            for images, labels in batches:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(RECIPE, len(losses), loader.steps_per_epoch)
                loss, _ = train_step(model, optimizer, images, labels, RECIPE)
                losses.append(round(loss.item(), 6))
    return losses


@pytest.mark.parametrize("method", VARIANTS)
def test_the_loss_curve_has_not_moved(method, loader):
    losses = loss_curve(method, loader)
    path = FOLDER / f"{method.replace('(', '-').replace(')', '').replace('=', '-')}.json"
    if os.environ.get("TERNFORGE_WRITE_GOLDEN"):
        path.write_text(json.dumps(losses) + "\n")
    assert path.exists(), f"no golden curve of {method}; TERNFORGE_WRITE_GOLDEN=1 writes it"
    golden = json.loads(path.read_text())
    assert len(losses) == STEPS
    assert torch.allclose(torch.tensor(losses), torch.tensor(golden), rtol=2e-3, atol=2e-3)


def test_the_curves_tell_the_methods_apart():
    curves = [path.read_text() for path in FOLDER.glob("*.json")]
    assert len(set(curves)) == len(curves) == len(VARIANTS)
