from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data_prep.datasets import DataError
from pipeline import inputs
from pipeline.errors import PipelineError
from pipeline.experiments import load_experiment
from pipeline.preprocessing import Preprocessing
from tests.pictures import picture

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_photographs(folder: Path) -> Path:
    """Two classes of files of all kinds: large and small, gray, palette, CMYK, 16 bits, rotated."""
    rotated = Image.Exif()
    rotated[ORIENTATION] = 6
    deep = np.linspace(0, 65_535, 50 * 70).reshape(50, 70).astype(np.uint16)
    files = {
        "1-small.jpg": encoded(picture(1, 60, 47), "JPEG", quality=95),
        "2-large.jpg": encoded(picture(2, 200, 260), "JPEG", quality=95),
        "3-huge.png": encoded(picture(3, 400, 300)),
        "4-gray.jpg": encoded(picture(4, 70, 71).convert("L"), "JPEG"),
        "5-palette.png": encoded(picture(5, 50, 60).quantize(32)),
        "6-cmyk.jpg": encoded(picture(6, 90, 80).convert("CMYK"), "JPEG"),
        "7-deep.png": encoded(Image.fromarray(deep)),
        "8-rotated.jpg": encoded(picture(8, 40, 95), "JPEG", exif=rotated),
        "9-progressive.jpg": encoded(picture(9, 64, 64), "JPEG", progressive=True),
    }
    for split in ("train", "val"):
        for number, (name, data) in enumerate(files.items()):
            path = folder / split / ("cat" if number % 2 else "dog") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def evaluation_images(experiment, manifest) -> np.ndarray:
    with inputs.make_loader(experiment, manifest, "test", training=False).epoch(0) as batches:
        return torch.cat([images.clone() for images, _ in batches]).numpy()


def prepared_manifest(experiment):
    return inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *arguments: None)


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("torch", ["data.side=100"]),
        ("torch", ["data.side=100", "data.format=raw", "train.test_crop=0.875"]),
        ("torch", ["data.quality=60", "data.passthrough=false", "train.normalization=signed"]),
        ("ffcv", ["data.side=100", "train.test_crop=0.8"]),
    ],
)
def test_a_photograph_becomes_what_the_evaluation_sees_of_it(tmp_path, backend, settings):
    photographs = write_photographs(tmp_path / "photographs")
    places = [f"data.raw={photographs}", f"data.prepared={tmp_path}", f"data.backend={backend}"]
    sizes = ["train.image_size=48", "train.batch_size=4", "data.processes=1"]
    experiment = load_experiment("folder_resnet18", [*places, *sizes, *settings])
    manifest = prepared_manifest(experiment)
    preprocessing = Preprocessing.of(experiment, manifest)
    seen = evaluation_images(experiment, manifest)
    files = sorted((photographs / "val").rglob("*.*"))
    assert len(files) == len(seen) == 9
    level = 1 / 255 / min(preprocessing.std)
    for file, expected in zip(files, seen, strict=True):
        given = preprocessing.prepare(file.read_bytes())
        assert given.dtype == np.float32
        if backend == "torch":
            assert np.array_equal(given, expected), file
        else:
            assert np.abs(given - expected).max() <= 1.01 * level, file


def test_a_digit_saved_as_png_becomes_what_the_evaluation_sees_of_it(tmp_path):
    experiment = load_experiment(
        "digits_lenet5", [f"data.prepared={tmp_path}", "data.backend=torch"]
    )
    manifest = prepared_manifest(experiment)
    preprocessing = Preprocessing.of(experiment, manifest)
    assert preprocessing.input_shape == (1, 32, 32)
    (mean,), (std,) = preprocessing.mean, preprocessing.std
    for expected in evaluation_images(experiment, manifest)[:100]:
        pixels = np.rint((expected[0] * std + mean) * 255).astype(np.uint8)
        for image in (pixels, encoded(Image.fromarray(pixels))):
            assert np.array_equal(preprocessing.prepare(image), expected)
        in_color = encoded(Image.fromarray(pixels).convert("RGBA"))
        assert np.array_equal(preprocessing.prepare(in_color), expected)


def of_arrays(**changes: object) -> Preprocessing:
    """As of CIFAR-10."""
    values = {
        "size": 32,
        "channels": 3,
        "crop": None,
        "side": None,
        "format": None,
        "quality": None,
        "passthrough": None,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.3),
        "class_names": ("cat", "dog"),
    }
    return Preprocessing.model_validate(values | changes)


def test_an_image_of_the_right_size_is_what_torchvision_makes_of_it():
    preprocessing = of_arrays()
    image = picture(7, 32, 32)
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    torch.testing.assert_close(
        torch.from_numpy(preprocessing.prepare(encoded(image))), transform(image)
    )


def test_an_image_of_another_size_is_resized_as_a_whole_or_in_the_middle():
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = 255
    whole = of_arrays().pixels(image)
    assert whole.shape == (32, 32, 3)
    assert (whole[:, 8:24] == 255).all() and (whole[:, :8] == 0).all()
    assert (of_arrays(crop=1.0).pixels(image) == 255).all()


def test_gray_and_color_become_what_the_network_takes():
    gray = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32).astype(np.uint8)
    assert (of_arrays().pixels(gray) == gray[..., None]).all()
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    one = of_arrays(channels=1, mean=(0.0,), std=(1.0,))
    assert (one.pixels(red) == 76).all()  # 0.299 of 255, ITU-R BT.601
    assert np.array_equal(one.pixels(gray)[..., 0], gray)


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.zeros((3, 3, 2), np.uint8), b"no image"])
def test_what_is_no_image_is_refused_in_one_line(bad):
    with pytest.raises(DataError) as error:
        of_arrays().prepare(bad)
    assert "\n" not in str(error.value)


def test_it_survives_json():
    for preprocessing in (
        of_arrays(crop=0.875, mean=(0.1, 1 / 3, 0.7)),
        of_arrays(side=400, format="jpg", quality=90, passthrough=True),
        of_arrays(side=None, format="raw", quality=90, passthrough=False),
    ):
        text = json.dumps(preprocessing.to_dict())
        assert Preprocessing.from_dict(json.loads(text)) == preprocessing
    assert of_arrays(crop=0.5).to_dict()["resize"] == (
        "the central square of 0.5 of the shorter side, to 32x32, area filter"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": 10**9}, "size"),
        ({"size": "32"}, "size"),
        ({"channels": 2}, "channels"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0.5, 0.0, 0.5]}, "std"),
        ({"std": [0.5, float("nan"), 0.5]}, "std"),
        ({"crop": 1.5}, "crop"),
        ({"class_names": []}, "class_names"),
        ({"class_names": [1, 2]}, "class_names"),
        ({"format": "jpg"}, "format"),
        ({"side": 400}, "side"),
        ({"recipe": "mine"}, "recipe"),
    ],
)
def test_other_values_are_refused_by_name(changes, named):
    with pytest.raises(PipelineError, match=named) as error:
        Preprocessing.from_dict(of_arrays().to_dict() | changes)
    assert "\n" not in str(error.value)
