"""What a continued run is made of: the weights that it began with, whatever became of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

import models
from pipeline.config import Experiment, PipelineError
from pipeline.display import Display
from pipeline.experiments import load_experiment
from pipeline.materials import gather


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """An experiment that begins with the weights in a file."""
    settings = {
        "init_from": tmp_path / "start.safetensors",
        "data.synthetic": "[128,8]",
        "data.backend": "torch",
        "data.prepared": tmp_path / "prepared",
        "scaling.launcher": "local",
        "tracking.enabled": "false",
        "tracking.runs": tmp_path / "runs",
    }
    return load_experiment("digits_lenet5", [f"{key}={value}" for key, value in settings.items()])


def write_start(experiment: Experiment, seed: int) -> Path:
    network = models.create_model("lenet5", num_classes=10, in_channels=1, image_size=32, seed=seed)
    path = Path(str(experiment.init_from))
    save_file(network.state_dict(), path)
    return path


def test_a_run_goes_on_with_the_weights_that_it_began_with_or_not_at_all(
    experiment: Experiment,
) -> None:
    display = Display()
    start = write_start(experiment, seed=1)
    begun = gather(experiment, display)
    with begun.run_folder(experiment, False) as folder:
        name = folder.name
        assert folder.record["sources"]["init_from"]["source"] == str(start)
        assert json.loads((folder.path / "run.json").read_text())["data"] == begun.record()["data"]
    assert begun.sources.initial is not None

    for change in (start.unlink, lambda: write_start(experiment, seed=2)):
        change()
        continued = gather(experiment, display, resume=True)
        assert continued.sources == begun.sources
        with continued.run_folder(experiment, True) as folder:
            assert folder.name == name

    begun.sources.initial.file.unlink()
    with pytest.raises(PipelineError, match="is not any more what the run began with"):
        gather(experiment, display, resume=name)
    other = gather(experiment, display)
    with (
        pytest.raises(PipelineError, match=r"the tensors of init_from \(SHA-256 \w{8}, now"),
        other.run_folder(experiment, name),
    ):
        pass

    write_start(experiment, seed=1)  # what was lost is back
    assert gather(experiment, display, resume=name).sources == begun.sources
