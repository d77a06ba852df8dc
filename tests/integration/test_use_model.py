"""A registered model in use: the README's section on it, line by line, and MLflow's own ways."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import inputs
from pipeline.cli import main
from pipeline.display import Display
from pipeline.experiments import load_experiment
from pipeline.registry.versions import read_predictions
from pipeline.use.evaluation import evaluate_model
from pipeline.use.model import UsableModel, open_model
from pipeline.use.prediction import Prediction, predict
from tests.integration.conftest import NAME
from tests.readme import BLOCKS, commands_marked

COMMANDS = commands_marked("with a trained model")
#: Of this one the figures take a minute.
BENCHMARK = "--benchmark"
#: Translating takes seconds, and is tested with other networks too.
TRANSLATED = "--to onnx"


@pytest.fixture(scope="module")
def project(finished):
    """The folder of a finished run, where `digit.png` is the first image of the test split."""
    experiment = load_experiment(
        NAME, [f"data.prepared={finished.folder / 'prepared'}", "data.backend=torch"]
    )
    dataset = inputs.dataset_of(experiment)
    manifest = inputs.prepare(experiment, dataset, lambda *arguments: None)
    (mean,), (std,) = manifest.mean, manifest.std
    (finished.folder / "images").mkdir()
    number = 0
    with inputs.make_loader(experiment, manifest, "test", training=False).epoch(0) as batches:
        for images, _ in batches:
            for image in images[:, 0].numpy():
                pixels = np.rint((image * std + mean) * 255).astype(np.uint8)
                Image.fromarray(pixels).save(finished.folder / "images" / f"{number:03}.png")
                number += 1
    shutil.copy(finished.folder / "images" / "000.png", finished.folder / "digit.png")
    return finished.folder


@pytest.fixture(autouse=True)
def _in_the_project(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def classes(model: UsableModel, files: list[Path]) -> list[str]:
    """What the network takes images for."""
    answers = list(predict(model, files, top=1, batch_size=50))
    return [answer.ranked[0][0] for answer in answers if isinstance(answer, Prediction)]


def test_an_evaluation_and_predictions_give_the_answers_of_the_training(project):
    """Two Ray workers evaluated the trained network; here it is unpacked, in this process."""
    model = open_model(NAME)
    assert model.version is not None and model.store is not None
    registered = read_predictions(model.version, model.store).predicted
    with Display() as display:
        found = evaluate_model(model, display)
    assert found.equals_recorded is True
    assert np.array_equal(found.evaluation.predicted.numpy(), registered)
    files = sorted((project / "images").iterdir())
    assert classes(model, files) == [str(label) for label in registered]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(line, marks=[pytest.mark.slow] if TRANSLATED in line else [])
        for line in COMMANDS
        if BENCHMARK not in line
    ],
)
def test_every_command_of_the_readme_works(command, capsys):
    python, program, *arguments = shlex.split(command)
    assert (python, program) == ("python", "run.py")
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out
    assert "Warning" not in captured.err


@pytest.mark.slow
def test_the_benchmark_of_the_readme_works(capsys):
    (command,) = [line for line in COMMANDS if BENCHMARK in line]
    assert main([*shlex.split(command)[2:], "seconds=0.05"]) == 0
    assert "float twin" in capsys.readouterr().out


def test_a_version_without_its_answers_is_evaluated_all_the_same(project, capsys):
    (answers,) = project.glob("runs/artifacts/models/*/artifacts/evaluation.safetensors")
    aside = answers.rename(answers.with_name("aside"))
    assert main(["--evaluate", NAME, "--json"]) == 0
    aside.rename(answers)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["equals_recorded"] is True
    assert "figures alone" in captured.err


def export_as_the_readme_says(file: str) -> str:
    """Write a file by its command; gives the README's program that reads it."""
    (command,) = [line for line in COMMANDS if file in shlex.split(line)]
    assert main(shlex.split(command)[2:]) == 0
    (program,) = [block["text"] for block in BLOCKS if block["mark"] == f"with {file}"]
    return program


@pytest.mark.slow
def test_the_exported_network_runs_without_this_project_as_the_readme_says(project):
    program = export_as_the_readme_says("digits.onnx")
    answer = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=project, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (expected,) = classes(open_model(NAME), [project / "digit.png"])
    assert answer.stdout.strip() == f"[{expected}]"


def test_the_packed_file_shows_its_ternary_weights_as_the_readme_says(capsys):
    program = export_as_the_readme_says("digits.safetensors")
    capsys.readouterr()
    exec(program, {})
    *layers, levels = capsys.readouterr().out.splitlines()
    assert "conv1 ternary 5-trit" in layers[0]
    assert levels.startswith("tensor([-")
    assert levels.count(",") == 2


@pytest.mark.slow
def test_mlflow_serves_the_champion(project):
    """The README's commands, on a free port, and a request of two real images."""
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    served = "\n".join(commands_marked("as a service")).replace("5001", port)
    # The commands that a shell finds once the environment is activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    with Path("service.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", served.replace("mlflow models", "exec mlflow models")],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server)
        model = open_model(NAME)
        pixels = [np.asarray(Image.open(f"images/00{number}.png")) for number in range(2)]
        images = np.stack([model.preprocessing.prepare(array) for array in pixels])
        content = json.dumps({"inputs": images.tolist()}).encode()
        request = Request(
            f"http://127.0.0.1:{port}/invocations", content, {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=60) as response:
            logits = torch.tensor(json.load(response)["predictions"])
        with torch.inference_mode():
            torch.testing.assert_close(logits, model.network(torch.from_numpy(images)))
        if shutil.which("curl"):
            asked = "\n".join(commands_marked("asking the service")).replace("5001", port)
            answer = subprocess.run(
                ["bash", "-c", asked], env=environment, capture_output=True, text=True, timeout=60
            )
            assert len(json.loads(answer.stdout)["predictions"][0]) == 10, answer.stderr
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Until an address answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urlopen(address, timeout=5):
                return
        except URLError:
            assert server.poll() is None, Path("service.log").read_text()
            time.sleep(0.2)
    raise TimeoutError(Path("service.log").read_text())
