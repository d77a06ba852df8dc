"""Trained networks in use: opened, evaluated, asked about images."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from pipeline import inputs
from pipeline.cli import main
from pipeline.config import PipelineError
from pipeline.display import Display
from pipeline.experiments import load_experiment
from pipeline.loop import build_model
from pipeline.preprocessing import Preprocessing
from pipeline.use.evaluation import evaluate_model
from pipeline.use.model import open_model
from pipeline.use.prediction import Prediction, Refused, find_images, predict
from tests.pictures import picture, write_class_folders

DIGITS = ["data.synthetic=[64,50]", "data.backend=torch", "train.batch_size=8"]


class Digits:
    """An untrained network in a packed file, and the made-up images that it was tested on."""

    def __init__(self, folder: Path) -> None:
        self.experiment = load_experiment(
            "digits_lenet5_ternary", [*DIGITS, f"data.prepared={folder / 'prepared'}"]
        )
        dataset = inputs.dataset_of(self.experiment)
        self.manifest = inputs.prepare(self.experiment, dataset, lambda *arguments: None)
        self.network = build_model(self.experiment, self.manifest).eval()
        with inputs.make_loader(self.experiment, self.manifest, "test", training=False).epoch(
            0
        ) as batches:
            pairs = [(images.clone(), labels) for images, labels in batches]
        self.images = torch.cat([images for images, _ in pairs])
        self.labels = torch.cat([labels for _, labels in pairs])
        with torch.no_grad():
            self.logits = models.fold(self.network)(self.images)
        self.packed = folder / "packed.safetensors"
        self.pack(self.packed)

    def pack(self, path: Path, **changes: object) -> Path:
        """Write the packed file as the registry does, with other metadata where there are any."""
        right = (self.logits.argmax(dim=1) == self.labels).sum().item()
        metadata = {
            "experiment": self.experiment.name,
            "experiment_yaml": self.experiment.to_yaml(),
            "preprocessing": Preprocessing.of(self.experiment, self.manifest).to_dict(),
            "data": {"dataset": "digits", "fingerprint": self.manifest.fingerprint},
            "evaluation": {"split": "test", "images": 50, "top1": 100 * right / 50},
        }
        models.pack(self.network, path, metadata=metadata | changes)
        return path

    def write_images(self, folder: Path, count: int) -> list[Path]:
        """The first test images as PNG."""
        (mean,), (std,) = self.manifest.mean, self.manifest.std
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for number, image in enumerate(self.images[:count, 0].numpy()):
            pixels = np.rint((image * std + mean) * 255).astype(np.uint8)
            files.append(folder / f"{number:02}.png")
            Image.fromarray(pixels).save(files[-1])
        return files


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def error_of(capsys, *arguments: str) -> str:
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in captured.err
    return line


def test_an_opened_network_is_the_folded_one_to_the_bit(digits):
    model = open_model(str(digits.packed))
    with torch.no_grad():
        assert torch.equal(model.network(digits.images), digits.logits)
    assert (model.name, model.version) == ("digits_lenet5_ternary", None)
    assert model.preprocessing == Preprocessing.of(digits.experiment, digits.manifest)


def test_a_file_does_not_choose_where_things_are_written(digits, tmp_path):
    model = open_model(str(digits.packed), ["data.threads=2"])
    assert model.experiment.data.prepared == Path("prepared")
    assert model.experiment.data.synthetic == (64, 50)
    assert model.experiment.data.threads == 2


def test_an_evaluation_counts_each_image_once_and_equals_the_recorded_one(digits, tmp_path):
    model = open_model(str(digits.packed), ["data.prepared=prepared", "data.backend=torch"])
    with Display() as display:
        found = evaluate_model(model, display, batch_size=7)
    expected = np.zeros((10, 10), np.int64)
    for label, best in zip(digits.labels, digits.logits.argmax(dim=1), strict=True):
        expected[label, best] += 1
    assert np.array_equal(found.evaluation.confusion.numpy(), expected)
    loss = torch.nn.functional.cross_entropy(digits.logits, digits.labels).item()
    assert found.evaluation.loss == pytest.approx(loss, rel=1e-6)
    assert found.equals_recorded is True
    assert found.picture is not None and found.picture.read_bytes().startswith(b"\x89PNG")


def test_another_recorded_accuracy_or_other_images_are_noticed(digits, tmp_path, capsys):
    wrong = digits.pack(tmp_path / "wrong.safetensors", evaluation={"top1": 99.0, "images": 50})
    assert main(["--evaluate", str(wrong), "--json", "data.backend=torch"]) == 0
    assert json.loads(capsys.readouterr().out)["equals_recorded"] is False
    settings = ["data.backend=torch", "data.synthetic=[64,30]"]
    assert main(["--evaluate", str(digits.packed), *settings]) == 0
    output = capsys.readouterr().out
    assert "30 of the test split" in output
    assert "which were others" in output


def test_another_data_set_is_matched_by_the_names_of_its_classes(digits, tmp_path):
    """The classes of a folder come in the order of their names, whatever that of the network."""
    names = ("dog", "cat")
    experiment = load_experiment("cifar10_lenet5", [f"data.prepared={tmp_path}"])
    network = models.create_model("lenet5", num_classes=2, in_channels=3, image_size=32)
    preprocessing = Preprocessing(
        size=32, channels=3, crop=1.0, side=None, format=None, quality=None, passthrough=None,
        mean=(0.5,) * 3, std=(0.25,) * 3, class_names=names,
    )  # fmt: skip
    models.pack(
        network,
        tmp_path / "pets.safetensors",
        metadata={
            "experiment_yaml": experiment.to_yaml(),
            "preprocessing": preprocessing.to_dict(),
        },
    )
    pets = write_class_folders(tmp_path / "pets", train=2, val=12)
    settings = [f"data.raw={pets}", "data.backend=torch", "data.format=raw", "data.processes=1"]
    model = open_model(str(tmp_path / "pets.safetensors"), settings)
    with Display() as display:
        found = evaluate_model(model, display, "folder")
    assert found.class_names == ("cat", "dog")
    predicted = []
    for file in sorted((pets / "val").rglob("*.jpg")):
        logits = model.network(torch.from_numpy(preprocessing.prepare(file.read_bytes()))[None])
        predicted.append(names[int(logits.argmax())])
    assert [found.class_names[label] for label in found.evaluation.predicted] == predicted
    write_class_folders(tmp_path / "fruit", train=2, val=2, classes=("cat", "fig"))
    other = open_model(str(tmp_path / "pets.safetensors"), [f"data.raw={tmp_path / 'fruit'}"])
    with Display() as display, pytest.raises(PipelineError, match="does not know 'fig'"):
        evaluate_model(other, display, "folder")


@pytest.mark.parametrize(
    ("dataset", "named"),
    [("mnist", "32 pixels"), ("cifar10", "are color"), ("imagenat", "imagenet")],
)
def test_a_data_set_that_does_not_fit_is_refused_before_it_is_prepared(
    digits, capsys, dataset, named
):
    error = error_of(capsys, "--evaluate", digits.packed, "--dataset", dataset)
    assert named in error
    assert list(Path.cwd().iterdir()) == []


def test_predictions_are_those_of_the_network_whatever_the_batch(digits, tmp_path):
    files = digits.write_images(tmp_path / "images", 23)
    model = open_model(str(digits.packed))
    shares = digits.logits.softmax(dim=1)
    for batch_size in (1, 5, 64):
        answers = list(predict(model, files, top=3, batch_size=batch_size))
        assert [answer.file for answer in answers] == files
        for answer, expected in zip(answers, shares, strict=False):
            assert isinstance(answer, Prediction)
            values, classes = expected.topk(3)
            assert [name for name, _ in answer.ranked] == [str(label) for label in classes.tolist()]
            assert [share for _, share in answer.ranked] == pytest.approx(values.tolist(), rel=1e-4)


def test_bad_files_are_named_and_skipped_wherever_they_stand(digits, tmp_path):
    files = digits.write_images(tmp_path / "images", 3)
    bad = tmp_path / "images" / "bad.png"
    bad.write_bytes(files[0].read_bytes()[:60])
    places = [bad, files[0], tmp_path / "nowhere", bad, files[1], files[2], Path("/dev/null")]
    answers = list(predict(open_model(str(digits.packed)), places, top=1, batch_size=2))
    assert [answer.file for answer in answers] == places
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    assert [one.file for one in refused] == [bad, places[2], bad, places[-1]]
    assert all("\n" not in str(one) for one in refused)


def test_folders_are_walked_in_order_and_images_known_by_their_content(digits, tmp_path):
    first, second = digits.write_images(tmp_path / "images" / "b", 2)
    (tmp_path / "images" / "a").mkdir()
    hidden = first.rename(tmp_path / "images" / "a" / "no-suffix")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".thumbnail.png").write_bytes(second.read_bytes())
    (tmp_path / "images" / "empty.jpg").touch()
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "images" / "pipe")  # which must not be waited for
    found = find_images([str(tmp_path / "images"), str(second)])
    broken = [tmp_path / "images" / name for name in ("empty.jpg", "gone.png")]
    assert found.files == [hidden, second, *broken, second]
    assert found.others == 2


def test_the_command_line_prints_lines_or_json_and_counts_what_it_skips(digits, tmp_path, capsys):
    digits.write_images(tmp_path / "images", 2)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n")
    command = ["--predict", str(digits.packed), "images", "--top", "2"]
    assert main(command) == 0
    captured = capsys.readouterr()
    titles, *lines = captured.out.splitlines()
    assert titles.split() == ["image", "class", "probability", "others"]
    assert [line.split()[0] for line in lines] == ["images/00.png", "images/01.png"]
    assert "skipped images/broken.png" in captured.err
    assert main([*command, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["class"] for answer in answers] == [line.split()[1] for line in lines]
    for answer in answers:
        assert len(answer["top"]) == 2
        assert answer["top"][0] == {"class": answer["class"], "probability": answer["probability"]}


@pytest.mark.parametrize("places", [["nowhere"], ["empty"], ["~nobody-here/x.png"], [300 * "x"]])
def test_without_any_image_predicting_fails(digits, tmp_path, capsys, places):
    (tmp_path / "empty").mkdir()
    assert "no" in error_of(capsys, "--predict", digits.packed, *places)


def test_a_large_photograph_and_its_gray_form_are_predicted(digits, tmp_path):
    picture(1, 900, 700).save(tmp_path / "photograph.jpg")
    picture(1, 900, 700).convert("L").save(tmp_path / "gray.jpg")
    files = [tmp_path / "photograph.jpg", tmp_path / "gray.jpg"]
    one, other = predict(open_model(str(digits.packed)), files, top=1, batch_size=2)
    assert isinstance(one, Prediction) and isinstance(other, Prediction)
    assert one.ranked[0][0] == other.ranked[0][0]


def test_an_answer_that_is_no_number_is_none(digits, tmp_path, capsys):
    (file,) = digits.write_images(tmp_path / "images", 1)
    large = tmp_path / "large.safetensors"
    network = copy.deepcopy(digits.network)
    for parameter in network.parameters():
        parameter.data *= 1e30
    models.pack(network, large, metadata=models.read_packed(digits.packed).metadata)
    assert "none of the 1 files" in error_of(capsys, "--predict", large, file)
    assert main(["--evaluate", str(large), "--json", "data.backend=torch"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] is None


def test_a_file_without_what_use_takes_is_refused(digits, tmp_path, capsys):
    alone = tmp_path / "alone.safetensors"
    models.pack(digits.network, alone)
    assert "models.unpack reads it" in error_of(capsys, "--predict", alone, "x.png")
    names = {"preprocessing": open_model(str(digits.packed)).preprocessing.to_dict()}
    names["preprocessing"]["class_names"] = ["one", "two"]
    other = digits.pack(tmp_path / "other.safetensors", **names)
    assert "2 classes are named" in error_of(capsys, "--predict", other, "x.png")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(digits.packed.read_bytes()[:-1])
    assert "cut.safetensors" in error_of(capsys, "--evaluate", cut)


def test_letters_that_take_two_columns_do_not_move_the_others(digits, tmp_path, capsys):
    digits.write_images(tmp_path, 1)[0].rename(tmp_path / "\u56fe\u7247.png")
    assert main(["--predict", str(digits.packed), "\u56fe\u7247.png"]) == 0
    titles, _ = capsys.readouterr().out.splitlines()
    assert titles.index("class") == len("\u56fe\u7247.png  ") + 2


def test_class_names_of_a_file_cannot_write_on_the_screen(digits, tmp_path, capsys):
    values = open_model(str(digits.packed)).preprocessing.to_dict()
    values["class_names"] = [f"{number}\x1b[2J" for number in range(10)]
    hostile = str(digits.pack(tmp_path / "hostile.safetensors", preprocessing=values))
    digits.write_images(tmp_path / "images", 1)
    assert main(["--predict", hostile, "images"]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\\x1b[2J" in output


def test_an_evaluation_is_not_lost_with_its_picture(digits, tmp_path, capsys):
    (tmp_path / "file").touch()
    settings = ["data.backend=torch", "tracking.runs=file"]
    assert main(["--evaluate", str(digits.packed), "--json", *settings]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["picture"] is None
    assert "cannot write the picture" in captured.err


def test_a_full_disk_behind_the_results_is_said_in_one_line(digits, capsys, monkeypatch):
    digits.write_images(Path("images"), 2)
    with (
        pytest.raises(OSError),  # when it is closed
        Path("/dev/full").open("w") as full,
        monkeypatch.context() as patch,
    ):
        patch.setattr("sys.stdout", full)
        error = error_of(capsys, "--predict", digits.packed, "images")
    assert error == "error: cannot use the results: No space left on device"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--predict", "digits_lenet5"], "needs images"),
        (["--predict", 300 * "x", "x.png"], "File name too long"),
        (["--predict", "digits_lenet5", "x.png", "data.raw=3"], "takes tracking.*, train.batch"),
        (["--predict", "digits_lenet5", "x.png", "--top", "0"], "--top 0"),
        (["--predict", "digits_lenet5", "x.png", "--dataset", "mnist"], "--evaluate"),
        (["--predict", "digits_lenet5", "x.png", "train.lr=3"], "train.lr has no effect"),
        (["--predict", "digits_lenet5", "x.png", "train.batchsize=3"], "train.batch_size"),
        (["--evaluate", "digits_lenet5", "x.png"], "x.png"),
        (["--evaluate", "digits_lenet5", "--experiment", "digits_lenet5"], "--experiment"),
        (["--evaluate", "digits_lenet5", "--models"], "--models"),
        (["--evaluate", "away.safetensors"], "no packed file away.safetensors"),
        (["--evaluate", "digits_lenet5@1@2"], "names no version"),
        (["--export", "digits_lenet5", "x.onnx"], "--to FORMAT"),
        (["--export", "digits_lenet5", "--to", "onxx", "x.onnx"], "onnx-int8"),
        (["--export", "digits_lenet5", "--to", "onnx", "x.onnx", "pixel=1"], "pixels"),
        (["--json"], "--evaluate"),
        (["--force", "--experiment", "digits_lenet5"], "--promote"),
        (["--compare", "digits_lenet5"], "--compare"),
        (["--models", "data.raw=x"], "data.raw has no effect"),
        (["--evaluate", "digits_lenet5"], "--experiment digits_lenet5 trains it"),
        (["--models"], "no registry"),
    ],
)
def test_what_does_not_go_is_said_in_one_line(arguments, named, capsys):
    assert named in error_of(capsys, *arguments)
    assert list(Path.cwd().iterdir()) == [], "bad input left something behind"
