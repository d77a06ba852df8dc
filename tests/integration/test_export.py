"""Exporting a trained model, and running the files where this project is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.numpy import save_file

import models
from pipeline import inputs
from pipeline.config import PipelineError
from pipeline.display import Display
from pipeline.experiments import load_experiment
from pipeline.preprocessing import Preprocessing
from pipeline.settings import override
from pipeline.use.exporting import ExportSettings, export_model
from pipeline.use.model import UsableModel, open_model

NAME = "digits_lenet5_ternary"


@pytest.fixture(scope="module")
def packed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained network as its registered version has it."""
    experiment = override(load_experiment(NAME), [f"data.prepared={prepared}"])
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    seen = Preprocessing.of(experiment, manifest)
    model = models.create_model(
        experiment.backbone, experiment.method, num_classes=10, in_channels=1, image_size=seen.size
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    loader = inputs.make_loader(experiment, manifest, "train", training=True)
    for epoch in range(1):
        with loader.epoch(epoch) as batches:
            for images, labels in batches:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
    path = tmp_path_factory.mktemp("packed") / "digits.safetensors"
    metadata = {"experiment": NAME, "experiment_yaml": experiment.to_yaml()}
    models.pack(model, path, metadata=metadata | {"preprocessing": seen.to_dict()})
    return path


@pytest.fixture(scope="module")
def model(packed: Path, prepared: Path) -> UsableModel:
    return open_model(str(packed), [f"data.prepared={prepared}"])


@pytest.fixture
def display() -> Display:
    return Display(Console(record=True, width=200))


def shown(display: Display) -> str:
    return display.console.export_text()


def test_images(model: UsableModel) -> tuple[np.ndarray, np.ndarray]:
    experiment = model.experiment
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    loader = inputs.make_loader(experiment, manifest, "test", training=False)
    with loader.epoch(0) as batches:
        pairs = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in batches]
    images, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return images, labels


test_images.__test__ = False  # type: ignore[attr-defined]


def test_eight_bits_keep_the_accuracy_that_is_told(
    model: UsableModel, display: Display, tmp_path: Path
) -> None:
    path = tmp_path / "digits.onnx"
    written = export_model(model, "onnx-int8", path, display)
    images, labels = test_images(model)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images})[0].argmax(axis=1)
    assert written.tested == len(labels)
    assert written.accuracy == pytest.approx(100 * (found == labels).mean())
    assert written.accuracy is not None
    assert written.network_accuracy is not None
    assert written.network_accuracy > 80
    assert written.accuracy > written.network_accuracy - 2
    said = dict(written.lines())
    assert said["file"] == f"{path} (onnx-int8, {path.stat().st_size:,} bytes)"
    assert f"of {len(labels)} test images" in said["accuracy"]
    assert [file.name for file in tmp_path.iterdir()] == ["digits.onnx"]


@pytest.mark.slow
def test_without_prepared_data_onnx_is_compared_on_random_images_and_int8_refused(
    packed: Path, display: Display, tmp_path: Path
) -> None:
    raw = tmp_path / "nothing"
    elsewhere = open_model(str(packed), [f"data.prepared={tmp_path / 'none'}"])
    path = tmp_path / "digits.onnx"
    written = export_model(elsewhere, "onnx", path, display)
    assert (written.real, written.accuracy) == (False, None)
    assert "random images" in dict(written.lines())["compared"]
    assert "digits is not prepared here" in shown(display)
    lost = elsewhere.experiment.model_copy(update={"dataset": "imagenet"})
    lost = override(lost, [f"data.raw={raw}"])
    model = UsableModel(
        elsewhere.origin, NAME, elsewhere.network, elsewhere.packed, elsewhere.preprocessing, lost
    )
    with pytest.raises(PipelineError, match=r"onnx-int8 is made with training images") as error:
        export_model(model, "onnx-int8", path, display)
    assert "\n" not in str(error.value)


def test_packed_file_is_written_in_the_format_that_is_asked_for(
    model: UsableModel, display: Display, tmp_path: Path
) -> None:
    path = tmp_path / "digits.safetensors"
    settings = ExportSettings.read(["weights=2-bit", "rest=float16"], "packed")
    written = export_model(model, "packed", path, display, settings)
    assert written.bytes == path.stat().st_size
    assert {layer.format for layer in models.read_packed(path).layers} == {"2-bit"}


@pytest.mark.parametrize(
    ("format", "words", "message"),
    [
        ("onnx", ["imges=5"], "--export has no setting imges; did you mean images or pixels?"),
        ("onnx", ["weights=2-bit"], "weights has no effect on onnx, only on packed"),
        ("onnx", ["images=0"], "images=0: Input should be greater than or equal to 1"),
        ("packed", ["rest=float8"], "rest=float8: Input should be 'float32' or 'float16'"),
    ],
)
def test_wrong_setting_is_one_line(format: str, words: list[str], message: str) -> None:
    with pytest.raises(PipelineError) as error:
        ExportSettings.read(words, format)
    assert str(error.value) == message


def test_wrong_place_is_one_line(model: UsableModel, display: Display, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    for name, message in {
        "notes.md": "notes.md has another suffix than onnx files: name it notes.onnx",
        "folder.onnx": "folder.onnx is a folder; name a file in it",
        "none/net.onnx": "there is no folder",
    }.items():
        with pytest.raises(PipelineError, match=message):
            export_model(model, "onnx", tmp_path / name, display)
    settings = ExportSettings.read(["weights=9-bit"], "packed")
    with pytest.raises(PipelineError, match="unknown format '9-bit'"):
        export_model(model, "packed", tmp_path / "net.safetensors", display, settings)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.onnx"]


PROGRAM = """
import sys
try:
    import models
except ImportError:
    pass
else:
    raise SystemExit("the project is in sight")
from safetensors.numpy import load_file
given = load_file("given.safetensors")
if sys.argv[1] == "torch":
    import torch
    program = torch.export.load("digits.pt2").module()
    for count in (1, 2, len(given["images"])):
        logits = program(torch.from_numpy(given["images"][:count])).detach().numpy()
        assert abs(logits - given["logits"][:count]).max() < 1e-5 * abs(given["logits"]).max()
else:
    import onnxruntime
    session = onnxruntime.InferenceSession("digits.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, len(given["images"])):
        (logits,) = session.run(["logits"], {"images": given["images"][:count]})
        assert abs(logits - given["logits"][:count]).max() < 1e-4 * abs(given["logits"]).max()
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("library", ["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])
def test_process_without_the_project_gets_the_logits(
    library: str, model: UsableModel, display: Display, tmp_path: Path
) -> None:
    format, name = ("pt2", "digits.pt2") if library == "torch" else ("onnx", "digits.onnx")
    export_model(model, format, tmp_path / name, display)  # type: ignore[arg-type]
    images, _ = test_images(model)
    with torch.inference_mode():
        logits = model.network(torch.from_numpy(images[:7])).numpy()
    save_file({"images": images[:7], "logits": logits}, tmp_path / "given.safetensors")
    run = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, library],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
