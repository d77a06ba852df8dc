"""Several seeds in one command: stopped in the second, hindered, and continued to the end."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from pipeline import runfolder
from pipeline.cli import main, smoke
from pipeline.config import PipelineError
from pipeline.display import TrainingDisplay
from pipeline.errors import Interrupted
from pipeline.experiments import load_experiment
from pipeline.runfolder import RunFolder
from pipeline.seeds import run_seeds
from pipeline.settings import override
from pipeline.stages import run

NAME = "digits_lenet5"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return override(
        smoke(load_experiment(NAME)),
        [
            "seed=7",
            "seeds=2",
            "train.epochs=2",
            "data.backend=torch",
            f"data.prepared={folder / 'prepared'}",
            f"tracking.runs={folder / 'runs'}",
            f"tracking.uri=sqlite:///{folder / 'runs' / 'mlflow.db'}",
        ],
    )


@pytest.fixture(scope="module")
def stopped(experiment) -> str:
    """Name of the folder of all seeds after Ctrl-C at the end of the second one's first epoch."""
    starts = []
    show = TrainingDisplay._on_epoch

    def interrupt(self, event):
        if event["epoch"] == 1:
            starts.append(event)
        if len(starts) == 2:
            raise KeyboardInterrupt
        show(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingDisplay, "_on_epoch", interrupt)
        with pytest.raises(Interrupted) as interrupted:
            run_seeds(experiment)
    return interrupted.value.run


@pytest.fixture(scope="module")
def hindered(experiment, stopped) -> PipelineError:
    """What is said when another process holds the folder of the second seed."""
    begun = runfolder.read(experiment, stopped).record["runs"]
    holder = RunFolder(runfolder.read(experiment, begun["8"]).path, {})
    holder.hold()
    with pytest.raises(PipelineError) as caught:
        run_seeds(experiment, resume=stopped)
    holder.release()
    return caught.value


@pytest.fixture(scope="module")
def finished(experiment, hindered):
    return run_seeds(experiment, resume=True)


def test_a_seed_that_fails_is_named_with_the_command_that_goes_on(stopped, hindered):
    assert re.match(r"seed 8, 2 of 2: run \S+ is being trained by process", str(hindered))
    assert hindered.run == stopped
    assert stopped.endswith("-seeds2")


def test_what_had_finished_is_not_trained_again_and_what_was_stopped_goes_on(
    experiment, stopped, finished
):
    assert finished.folder.name == stopped
    records = [runfolder.read(experiment, run["folder"]).record for run in finished.runs]
    assert [record["sessions"] for record in records] == [1, 2]
    assert [record["experiment"]["seed"] for record in records] == [7, 8]
    assert {record["experiment"]["seeds"] for record in records} == {1}
    assert {record["part_of"] for record in records} == {stopped}
    with pytest.raises(PipelineError, match="is finished"):
        run_seeds(experiment, resume=stopped)


def test_each_seed_gives_what_it_gives_alone(experiment, finished):
    for record in finished.runs:
        alone = run(
            override(experiment, [f"seed={record['seed']}", "seeds=1", "tracking.enabled=false"])
        )
        assert record["loss"] == pytest.approx(alone.evaluation.loss, abs=1e-6)
        assert record["top1"] == pytest.approx(alone.evaluation.top1, abs=1e-3)


def test_the_run_above_them_holds_mean_and_deviation(experiment, finished):
    from mlflow import MlflowClient

    client = MlflowClient(experiment.tracking.uri)
    whole = client.get_run(finished.run_id)
    assert whole.info.status == "FINISHED"
    parts = [client.get_run(record["mlflow_run"]) for record in finished.runs]
    assert {part.data.tags["mlflow.parentRunId"] for part in parts} == {finished.run_id}
    losses = [record["loss"] for record in finished.runs]
    assert whole.data.metrics["loss_mean"] == pytest.approx(np.mean(losses))
    assert whole.data.metrics["loss_deviation"] == pytest.approx(np.std(losses, ddof=1))
    kept = json.loads((finished.folder / "run.json").read_text())["result"]
    assert kept["seeds"] == [7, 8]
    assert kept["loss"] == pytest.approx(np.mean(losses), abs=1e-6)


def test_each_seed_is_registered_and_the_first_stands_for_all(experiment, finished):
    from mlflow import MlflowClient

    aliases = MlflowClient(experiment.tracking.uri).get_registered_model(NAME).aliases
    assert aliases == {"synthetic-seed7": 1, "synthetic-seed8": 2, "synthetic": 1}
    assert finished.model == f"models:/{NAME}@synthetic"
    assert finished.champion == "", "a model of made-up images is no champion"


def test_the_card_of_that_version_has_mean_and_deviation(experiment, finished):
    from mlflow import MlflowClient

    client = MlflowClient(experiment.tracking.uri)
    first, second = (client.get_model_version(NAME, number) for number in ("1", "2"))
    spread = finished.spreads["top1"]
    assert first.description is not None and second.description is not None
    assert f"over 2 seeds: {spread.mean:.2f} ± {spread.deviation:.2f} %" in first.description
    assert float(first.tags["top1_mean"]) == pytest.approx(spread.mean, rel=1e-5)
    assert "Other seeds" not in second.description


@pytest.mark.slow
def test_of_several_seeds_only_the_version_that_stands_for_all_may_become_champion(
    experiment, tmp_path
):
    from mlflow import MlflowClient

    settings = ["data.synthetic=none", "train.epochs=1", "train.batch_size=64"]
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    real = override(experiment, [*settings, f"tracking.runs={tmp_path / 'runs'}",
                                 f"tracking.uri={uri}"])  # fmt: skip
    result = run_seeds(real)
    assert result.champion == "champion is version 1, the first one"
    aliases = MlflowClient(uri).get_registered_model(NAME).aliases
    assert (aliases["champion"], aliases["candidate"]) == (1, 1)


def test_the_command_line_shows_mean_and_deviation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["seeds=2", "tracking.enabled=false", "data.backend=torch"]
    assert main(["--experiment", NAME, "--smoke", *settings]) == 0
    shown = capsys.readouterr().out
    assert "seed 1, 2 of 2" in shown
    assert re.search(r"top-1 +\d+\.\d\d ± \d+\.\d\d % over 2 seeds", shown)
