"""Teachers: what they are asked, what they answer, and which of them are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import data_prep
import models
from data_prep.datasets import NORMALIZATIONS
from pipeline.checkpoints.state import Progress, Snapshot, TrainingState
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointStore
from pipeline.config import Experiment, PipelineError, Recipe, Tracking
from pipeline.weight_sources import resolve
from pipeline.weights import Weights, build_teacher
from tests.unit.pipeline.stored import one_line


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> data_prep.Manifest:
    return data_prep.prepare(
        "cifar10", prepared=tmp_path_factory.mktemp("prepared"), synthetic=(8, 4)
    )


def student(folder: Path, **train: object) -> Experiment:
    return Experiment(
        name="cifar10_resnet20_ternary",
        dataset="cifar10",
        backbone="resnet20",
        method="ternary",
        train=Recipe(**train),
        tracking=Tracking(runs=folder),
    )


def trained_network(method: str) -> nn.Module:
    """A network whose batch-norm statistics are those of some batches."""
    model = models.create_model("resnet20", method, num_classes=10, image_size=32, seed=1)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


def run_folder(
    folder: Path,
    network: nn.Module,
    method: str = "float",
    dataset: str = "cifar10",
    **train: object,
) -> str:
    """A run folder with one checkpoint, of a resnet20."""
    trained = Experiment(
        name="teacher", dataset=dataset, backbone="resnet20", method=method, train=Recipe(**train)
    )
    folder.mkdir()
    record: dict[str, Any] = {"identity": "0123", "status": "finished", "mlflow_run": None}
    record["experiment"] = trained.model_dump(mode="json")
    (folder / "run.json").write_text(json.dumps(record))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    state = TrainingState(network, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    store = CheckpointStore(LocalStorage(folder / "checkpoints"), "0123")
    store.save(Snapshot.of(state, Progress(1, 1, [{}])))
    return str(folder)


@pytest.mark.parametrize("method", ["float", "ternary"])
def test_a_teacher_sees_pixels_normalized_as_in_its_own_training(
    method: str, manifest: data_prep.Manifest, tmp_path: Path
) -> None:
    network = trained_network(method)
    source = run_folder(tmp_path / "run", network, method, normalization="signed")
    experiment = student(tmp_path / "runs", normalization="cifar10-imagewise")
    random_state = torch.get_rng_state()
    teacher = build_teacher(resolve(source, experiment), experiment, manifest)
    assert torch.equal(torch.get_rng_state(), random_state)
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in NORMALIZATIONS["cifar10-imagewise"]
    )
    with torch.inference_mode():
        logits = teacher((pixels - mean) / std)
        expected = network((pixels - 0.5) / 0.5)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert logits.dtype == torch.float32
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert models.quantized_layers(teacher) == []


def test_with_the_students_own_normalization_the_logits_are_those_to_the_bit(
    manifest: data_prep.Manifest, tmp_path: Path
) -> None:
    network = trained_network("float")
    experiment = student(tmp_path / "runs")
    source = run_folder(tmp_path / "run", network)
    teacher = build_teacher(resolve(source, experiment), experiment, manifest)
    images = torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(teacher(images), network(images))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert teacher(images).dtype == torch.float32


def in_hub(
    name: str,
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    content: dict[str, torch.Tensor] | None = None,
) -> Weights:
    """Random weights of torchvision's network, or others, as if they had been downloaded."""
    home = experiment.tracking.runs / "torch"
    monkeypatch.setenv("TORCH_HOME", str(home))
    entry = torchvision.models.get_model_weights(name).DEFAULT
    file = home / "hub" / "checkpoints" / entry.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    if content is None:
        content = torchvision.models.get_model(name, weights=None).state_dict()
    torch.save(content, file)
    return resolve(str(entry), experiment)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> data_prep.Manifest:
    """Color images of as many classes as ImageNet has."""
    return data_prep.prepare(
        "imagenet", prepared=tmp_path_factory.mktemp("prepared"), synthetic=(8, 4)
    )


def test_a_teacher_of_torchvision_answers_as_it_does_there(
    thousand: data_prep.Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = student(tmp_path / "runs", normalization="unit", image_size=64)
    weights = in_hub("mobilenet_v3_small", experiment, monkeypatch)
    twin = torchvision.models.mobilenet_v3_small()
    twin.load_state_dict(weights.read())
    random_state = torch.get_rng_state()
    teacher = build_teacher(weights, experiment, thousand)
    assert torch.equal(torch.get_rng_state(), random_state)
    pixels = torch.rand(3, 3, 64, 64)
    normalize = torchvision.transforms.Normalize(*NORMALIZATIONS["imagenet"])
    with torch.inference_mode():
        expected = twin.eval()(normalize(pixels))
        torch.testing.assert_close(teacher(pixels), expected, rtol=0, atol=1e-5)


def test_a_teacher_that_tells_other_classes_apart_is_refused(
    manifest: data_prep.Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = student(tmp_path / "runs")
    weights = in_hub("squeezenet1_1", experiment, monkeypatch)
    with pytest.raises(PipelineError, match=r"1,000 classes .* here are 10") as error:
        build_teacher(weights, experiment, manifest)
    one_line(error)
    source = run_folder(tmp_path / "run", trained_network("float"), dataset="svhn")
    with pytest.raises(
        PipelineError, match=r"was trained on svhn, .* not those of cifar10"
    ) as error:
        build_teacher(resolve(source, experiment), experiment, manifest)
    one_line(error)


def test_a_teacher_whose_head_has_other_classes_is_refused(
    manifest: data_prep.Manifest, tmp_path: Path
) -> None:
    network = models.create_model("resnet20", num_classes=7, image_size=32)
    experiment = student(tmp_path / "runs")
    weights = resolve(run_folder(tmp_path / "run", network), experiment)
    with pytest.raises(PipelineError, match=r"fc\.weight is 7x64 there and 10x64 here") as error:
        build_teacher(weights, experiment, manifest)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("densenet121", "do not fit"),
        ("googlenet", "cannot be a teacher"),
        pytest.param("vit_b_32", "images of 64 pixels", marks=pytest.mark.slow),
    ],
)
def test_a_network_of_torchvision_that_cannot_teach_is_refused_in_one_line(
    name: str,
    message: str,
    thousand: data_prep.Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = student(tmp_path / "runs", image_size=64)
    content = None
    if name != "vit_b_32":  # as the file of densenet121 calls its layers, which others do not
        content = {"features.denseblock1.denselayer1.conv.1.weight": torch.ones(1)}
    weights = in_hub(name, experiment, monkeypatch, content)
    with pytest.raises(PipelineError, match=message) as error:
        build_teacher(weights, experiment, thousand)
    one_line(error)


def test_a_teacher_takes_the_small_images_of_the_first_epochs_too_or_is_refused(
    thousand: data_prep.Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = student(
        tmp_path / "runs", image_size=96, first_image_size=16, growth_epochs=(0, 4)
    )
    weights = in_hub("squeezenet1_1", experiment, monkeypatch)
    with pytest.raises(PipelineError, match="does not take the images of 16 pixels") as error:
        build_teacher(weights, experiment, thousand)
    one_line(error)


def test_a_file_that_does_not_say_of_which_network_it_is_cannot_teach(
    manifest: data_prep.Manifest, tmp_path: Path
) -> None:
    experiment = student(tmp_path / "runs")
    save_file(trained_network("float").state_dict(), tmp_path / "weights.safetensors")
    weights = resolve(str(tmp_path / "weights.safetensors"), experiment)
    with pytest.raises(PipelineError, match="does not say which network") as error:
        build_teacher(weights, experiment, manifest)
    one_line(error)
