"""The smoke form of every experiment in the catalog: two steps, save, resume, in this process."""

from __future__ import annotations

import pytest
import torch

from pipeline.cli import smoke
from pipeline.config import PipelineError
from pipeline.experiments import catalog
from pipeline.settings import override
from pipeline.stages import run


@pytest.mark.parametrize("name", catalog())
def test_every_experiment_trains_saves_and_resumes(name, tmp_path, monkeypatch):
    experiment = override(
        smoke(catalog()[name]),
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
    assert torch.equal(resumed.evaluation.confusion, whole.evaluation.confusion)
    with pytest.raises(PipelineError, match="is finished"):
        run(experiment, resume=stopped)


def _run_stopped_after_one_epoch(experiment, monkeypatch) -> str:
    """Press Ctrl-C when the first epoch is shown; returns the name of the run folder."""
    from pipeline.display import TrainingDisplay
    from pipeline.stages import Interrupted

    def interrupt(self, event):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDisplay, "_on_epoch", interrupt)
        with pytest.raises(Interrupted) as stopped:
            run(experiment)
    return stopped.value.run
