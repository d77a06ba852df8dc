from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models import ModelError, create_model, export, fold, open_exported

REPOSITORY = Path(__file__).parents[3]
SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class Scaling:
    mean: tuple[float, ...] = (0.3,)
    std: tuple[float, ...] = (0.2,)


def lively(method: str) -> nn.Module:
    """A small network whose batch norms do something."""
    torch.manual_seed(0)
    model = create_model("lenet5", method, num_classes=10, in_channels=1, image_size=28)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean = torch.empty(module.num_features).uniform_(-0.2, 0.2)
            module.running_var = torch.empty(module.num_features).uniform_(0.5, 2.0)
    return model


def some(images: int) -> Tensor:
    return torch.randn(images, *SHAPE, generator=torch.Generator().manual_seed(1))


def expected(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return fold(model).eval()(images)


def run_onnx(path: Path, **feed: np.ndarray) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], feed)[0])


@pytest.mark.parametrize(
    "method",
    [
        "binary",
        pytest.param("binary(ternary_activations=all)", marks=pytest.mark.slow),
        pytest.param("ternary-x2", marks=pytest.mark.slow),
        pytest.param("sparse+ternary", marks=pytest.mark.slow),
        pytest.param("step", marks=pytest.mark.slow),
    ],
)
def test_onnx_file_gives_the_folded_logits_in_onnxruntime(method: str, tmp_path: Path) -> None:
    model = lively(method)
    written = export(model, tmp_path / "net.onnx", "onnx", image_shape=SHAPE, images=some(3))
    assert written.agreement == 1
    for count in (1, 2, 7):
        logits = expected(model, some(count))
        found = run_onnx(written.path, images=some(count).numpy())
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert written.bytes == written.path.stat().st_size


def test_onnx_file_normalizes_pixels_and_says_what_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, path = lively("ternary"), tmp_path / "net.onnx"
    training, random = model.training, torch.get_rng_state()
    said = {"class_names": '["zero", "one"]', "license": '"CC0"'}
    export(model, path, "onnx", image_shape=SHAPE, preprocessing=Scaling(), metadata=said)
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), random)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    images = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.3) / 0.2
    logits = expected(model, torch.from_numpy(images.astype(np.float32)))
    torch.testing.assert_close(run_onnx(path, pixels=pixels), logits, rtol=1e-5, atol=1e-5)
    opened = open_exported(path, "onnx", Scaling())(torch.from_numpy(images.astype(np.float32)))
    torch.testing.assert_close(opened, logits, rtol=1e-5, atol=1e-5)
    file = onnx.load(path)
    assert {entry.key: entry.value for entry in file.metadata_props} == said
    assert [entry.version for entry in file.opset_import] == [23]
    # Its batch norms are part of its convolutions.
    assert "BatchNormalization" not in {node.op_type for node in file.graph.node}
    assert str(REPOSITORY).encode() not in path.read_bytes()
    assert b"site-packages" not in path.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_pt2_file_gives_the_very_logits_and_holds_no_code(tmp_path: Path) -> None:
    model, path = lively("ternary"), tmp_path / "net.pt2"
    written = export(model, path, "pt2", image_shape=SHAPE, metadata={"license": "CC0"})
    assert (written.difference, written.agreement) == (0, 1)
    extra = {"license": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for count in (1, 2, 7):
        assert torch.equal(program(some(count)), expected(model, some(count)))
    assert extra["license"] == "CC0"
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    described = next(content for name, content in contents.items() if name.endswith("model.json"))
    assert json.loads(described)["guards_code"] == []
    assert not any(str(REPOSITORY).encode() in content for content in contents.values())
    pickles = [content for content in contents.values() if content.startswith(b"PK")]
    for pickle in pickles:  # the example, which torch insists on
        with zipfile.ZipFile(io.BytesIO(pickle)) as inner:
            assert b"torch" not in inner.read(next(n for n in inner.namelist() if "data.pkl" in n))


class Counterfeit(nn.Module):
    """Computes something else where it is being exported."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits * 2 if torch.compiler.is_exporting() else logits


class Undecided(nn.Module):
    """Goes one way or the other by the values of its images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Counterfeit(), "gives other logits than the network for 7 of 7 images"),
        (Undecided(), "torch.export cannot trace the network: Could not guard on data-dependent"),
    ],
)
def test_network_that_cannot_be_exported_truly_leaves_the_old_file(
    network: nn.Module, reason: str, format: str, tmp_path: Path
) -> None:
    path = tmp_path / "net"
    path.write_text("what was there")
    with pytest.raises(ModelError, match=reason) as error:
        export(network, path, format, image_shape=(1, 2, 2))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_what_does_not_go_together_is_refused_in_one_line(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path / "net"
    shape = (1, 2, 2)
    with pytest.raises(ModelError, match="unknown format 'tflite'; known: pt2, onnx, onnx-int8"):
        export(model, path, "tflite", image_shape=shape)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="onnx-int8 needs calibration"):
        export(model, path, "onnx-int8", image_shape=shape)
    with pytest.raises(ModelError, match="onnx has no calibration"):
        export(model, path, "onnx", calibration=[], image_shape=shape)
    with pytest.raises(ModelError, match="pt2 takes normalized images"):
        export(model, path, "pt2", preprocessing=Scaling(), image_shape=shape)
    with pytest.raises(ModelError, match=r"cannot write .*no-folder/net: No such file"):
        export(model, tmp_path / "no-folder" / "net", "pt2", image_shape=shape)
    assert list(tmp_path.iterdir()) == []
