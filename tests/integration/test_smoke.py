"""Whole runs in the smoke form, from preparation to the record: stopped, and continued.

The training of every other experiment of the catalog is in test_catalog.py.
"""

from __future__ import annotations

import pytest
import torch

from pipeline.cli import smoke
from pipeline.config import PipelineError
from pipeline.errors import Interrupted
from pipeline.experiments import load_experiment
from pipeline.settings import override
from pipeline.stages import run


@pytest.mark.parametrize("name", ["digits_lenet5_ternary-x2", "mnist_lenet5_binary"])
def test_a_run_that_is_stopped_and_continued_ends_as_one_left_in_peace(name, tmp_path, monkeypatch):
    experiment = override(
        smoke(load_experiment(name)),
        [
            "train.epochs=2",
            "data.backend=torch",
            f"data.prepared={tmp_path / 'prepared'}",
            "tracking.enabled=false",
            f"tracking.runs={tmp_path / 'runs'}",
        ],
    )
    whole = run(experiment)
    assert whole.evaluation.images == 16
    assert len(whole.history) == 2

    stopped = _run_stopped_after_one_epoch(experiment, monkeypatch)
    resumed = run(experiment, resume=stopped)
    assert [epoch["train_loss"] for epoch in resumed.history] == [
        epoch["train_loss"] for epoch in whole.history
    ]
    assert resumed.kept_epoch == whole.kept_epoch
    assert torch.equal(resumed.evaluation.confusion, whole.evaluation.confusion)
    with pytest.raises(PipelineError, match="is finished"):
        run(experiment, resume=stopped)


def _run_stopped_after_one_epoch(experiment, monkeypatch) -> str:
    """Press Ctrl-C when the first epoch is shown; returns the name of the run folder."""
    from pipeline.display import TrainingDisplay

    def interrupt(self, event):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDisplay, "_on_epoch", interrupt)
        with pytest.raises(Interrupted) as stopped:
            run(experiment)
    return stopped.value.run
