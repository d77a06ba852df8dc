"""One real run, from scikit-learn's digits to a registered model: Ray, FFCV, MLflow, 2 workers."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import models
from data_prep import get_dataset
from pipeline.experiments import load_experiment
from pipeline.loop import build_model
from tests.integration.conftest import EPOCHS, NAME


@pytest.fixture(scope="module")
def client(finished):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{finished.folder}/runs/mlflow.db")


@pytest.fixture(scope="module")
def mlflow_run(client):
    (experiment,) = [e for e in client.search_experiments() if e.name == NAME]
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def trained_model(finished):
    model = build_model(load_experiment(NAME), get_dataset("digits"))
    model.load_state_dict(finished.weights(NAME, EPOCHS))
    return model.eval()


def test_the_output_fits_on_a_screen_and_says_what_matters(finished):
    lines = finished.output.splitlines()
    assert len(lines) < 40, finished.output
    for text in ("1,437 train + 360 test", "2 CPU workers, gloo", "top-1", "parameters",
                 "against 4,954,488 of this network in float32",
                 "models:/digits_lenet5_ternary@candidate", "mlflow ui"):  # fmt: skip
        assert text in finished.output
    assert not re.search(r"Traceback|Warning|WARNING|DEBUG", finished.output)


def test_the_ternary_net_learns_the_digits(finished, mlflow_run):
    assert mlflow_run.data.metrics["test_top1"] >= 97


def test_every_epoch_is_tracked_once_with_every_metric(client, mlflow_run):
    for metric in ("train_loss", "train_top1", "test_top1", "test_loss", "lr"):
        steps = [entry.step for entry in client.get_metric_history(mlflow_run.info.run_id, metric)]
        assert steps == list(range(1, EPOCHS + 1)), metric
    assert mlflow_run.info.status == "FINISHED"


def test_the_run_records_settings_code_packages_and_data(mlflow_run):
    assert mlflow_run.data.params["train.epochs"] == str(EPOCHS)
    assert mlflow_run.data.params["method"] == "ternary"
    tags = mlflow_run.data.tags
    assert re.fullmatch(r"[0-9a-f]{64}", tags["data.fingerprint"])
    assert {"identity", "tuned"} <= set(tags)
    assert any("torch" in key for key in tags)


def test_the_run_keeps_pictures_profile_and_evaluation(client, mlflow_run, tmp_path):
    folder = client.download_artifacts(mlflow_run.info.run_id, "", str(tmp_path))
    for picture in ("curves", "confusion_matrix", "weights"):
        content = (tmp_path / "figures" / f"{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG"), folder
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    confusion = np.array(evaluation["confusion"])
    assert confusion.sum() == 360
    # The fixed split is stratified: 178 zeros of 1,797 give 36 in a fifth.
    assert confusion.sum(axis=1)[0] == 36
    assert evaluation["test_top1"] == pytest.approx(100 * confusion.trace() / 360)
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["parameters"] == 1_238_602


def test_the_tracked_accuracy_is_that_of_the_saved_weights(finished, mlflow_run):
    """Recounted here from the checkpoint over scikit-learn's images, without the loaders."""
    import data_prep
    from data_prep.sources import ArraySplit, open_raw

    dataset = data_prep.get_dataset("digits")
    raw = open_raw(dataset, finished.folder, finished.folder, tell=lambda *_: None)
    split = raw.splits["test"]
    assert isinstance(split, ArraySplit)
    images = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2) / 255
    assert dataset.normalization is not None
    mean, std = dataset.normalization
    images = (images - mean[0]) / std[0]
    with torch.no_grad():
        predicted = trained_model(finished)(images).argmax(1)
    accuracy = 100 * (predicted.numpy() == split.labels).mean()
    assert mlflow_run.data.metrics["test_top1"] == pytest.approx(accuracy, abs=0.28)


def test_the_registered_model_loads_in_a_fresh_process_without_this_project(finished, tmp_path):
    images = torch.randn(7, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = trained_model(finished)(images)
    torch.save((images, expected), tmp_path / "example.pt")
    program = f"""
import sys, torch, mlflow
mlflow.set_tracking_uri("sqlite:///{finished.folder}/runs/mlflow.db")
model = mlflow.pytorch.load_model("models:/{NAME}@candidate")
images, expected = torch.load("example.pt", weights_only=True)
for count in (1, 2, 7):
    print((model(images[:count]) - expected[:count]).abs().max().item())
answers = mlflow.pyfunc.load_model("models:/{NAME}@champion").predict(images.numpy())
print(abs(answers - expected.numpy()).max())
assert not {{"models", "pipeline", "data_prep"}} & set(sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    differences = [float(line) for line in answer.stdout.split()]
    assert len(differences) == 4
    assert max(differences) < 1e-5


def test_the_command_that_uses_the_model_works_as_printed(finished, tmp_path):
    (command,) = re.findall(r"^use it +(.*)$", finished.output, re.MULTILINE)
    zero = load_digits().images[0] * (255 / 16)
    Image.fromarray(zero.astype(np.uint8)).save(tmp_path / "zero.png")
    answer = subprocess.run(
        command.replace("IMAGE", str(tmp_path / "zero.png")),
        shell=True,
        cwd=finished.folder,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"zero\.png +0 ", answer.stdout), answer.stdout


def test_the_folded_model_has_ternary_weights_only(finished):
    model = trained_model(finished)
    for name, layer in models.fold(model).named_modules():
        if name in dict(models.quantized_layers(model)):
            assert len(torch.unique(layer.weight)) == 3, name


def test_a_finished_run_is_not_resumed_and_its_data_is_reused(finished):
    refused = finished.start("--experiment", NAME, f"train.epochs={EPOCHS}", "--resume")
    message, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "prepare" not in message, "it is known before"
    assert "no unfinished run" in message
    assert "ready in" in finished.run("--experiment", NAME, f"train.epochs={EPOCHS}", "--dry-run")
