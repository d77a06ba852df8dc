"""What is said of a finished run, from figures that are known."""

from __future__ import annotations

import io
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import data_prep
import models
from pipeline import figures, report
from pipeline.config import Reference, Tracking
from pipeline.evaluate import Evaluation
from pipeline.experiments import load_experiment
from pipeline.loop import build_model
from pipeline.registry.card import model_card
from pipeline.stages import Result

#: Hits of 4 images of class 0 and 6 of class 1: 70 %.
LABELS = torch.tensor([0] * 4 + [1] * 6)
PREDICTED = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1, 1, 1])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return data_prep.prepare(
        "digits", prepared=tmp_path_factory.mktemp("prepared"), synthetic=(16, 8)
    )


def result(manifest, history: list[dict[str, float]], kept: int, words: list[str]) -> Result:
    experiment = load_experiment("digits_lenet5_ternary", words)
    reference = Reference(what="LeNet5", top1=75.0, best_on="test", source="somebody")
    experiment = experiment.model_copy(update={"reference": reference})
    rest = {"images_per_second": 1234.4, "train_loss": 0.5, "train_top1": 60.0, "lr": 0.1}
    rest["peak_memory_bytes"] = 2.5e9
    return Result(
        experiment=experiment,
        manifest=manifest,
        folder=Path("runs/one"),
        history=[{**rest, **epoch} for epoch in history],
        kept_epoch=kept,
        evaluation=Evaluation(PREDICTED, LABELS, 2, top5_hits=10, loss=0.25),
        profile=models.profile(build_model(experiment, manifest), 32),
        hardware="2 CPU workers, gloo",
        seconds=61.0,
    )


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


WATCHED = [{"test_top1": value, "test_loss": 1.0} for value in (60.0, 72.5, 70.0)]
HELD_OUT = [{"validation_top1": value, "validation_loss": 1.0} for value in (60.0, 88.5, 70.0)]


def test_the_best_epoch_on_the_test_images_stands_beside_the_last_as_papers_have_it(manifest):
    finished = result(manifest, WATCHED, kept=3, words=[])
    figures = report.record(finished)
    assert (figures["top1"], figures["kept_epoch"]) == (70.0, 3)
    assert (figures["best_top1"], figures["best_epoch"]) == (72.5, 2)
    text = shown(report.summary(finished))
    assert "70.00 % of 10 test images (95 % interval 39.68 to 89.22 %) (published 75.00 %" in text
    assert "72.50 % at epoch 2 on the test images, as the paper reports it" in text


def test_only_a_figure_of_the_best_test_epoch_makes_that_the_papers_habit(manifest):
    finished = result(manifest, WATCHED, kept=3, words=[])
    held_out = Reference(what="LeNet5", top1=75.0, best_on="validation", source="somebody")
    other = finished.experiment.model_copy(update={"reference": held_out})
    text = shown(report.summary(replace(finished, experiment=other)))
    assert "72.50 % at epoch 2 on the test images" in text
    assert "as the paper reports it" not in text
    assert "LeNet5; best epoch on held-out images; somebody" in text


def test_made_up_images_are_not_set_beside_a_published_figure(manifest):
    text = shown(report.summary(result(manifest, WATCHED, kept=3, words=[])))
    assert "published 75.00 %: LeNet5; best epoch on the test images; somebody" in text
    text = shown(report.summary(result(manifest, WATCHED, 3, ["data.synthetic=[16,8]"])))
    assert "published" not in text


def test_a_run_of_nobodys_experiment_does_not_quote_its_best_epoch(manifest):
    finished = result(manifest, WATCHED, kept=3, words=[])
    untuned = finished.experiment.model_copy(update={"reference": None})
    assert "72.50" not in shown(report.summary(replace(finished, experiment=untuned)))


def test_the_epoch_that_held_out_images_chose_is_said_in_summary_record_and_card(manifest):
    finished = result(manifest, HELD_OUT, kept=2, words=["train.epochs=3", "train.validation=4"])
    figures = report.record(finished)
    assert (figures["kept_epoch"], figures["validation_top1"]) == (2, 88.5)
    assert figures["best_top1"] is None, "nobody looked at the test images before the end"
    for text in (shown(report.summary(finished)), model_card(finished, "run", None)):
        assert "3, of which epoch 2 is kept: the best, with 88.50 %, on 4 held-out" in text


def test_a_record_says_what_a_table_of_results_needs(manifest):
    figures = report.record(result(manifest, WATCHED, kept=3, words=["seed=5"]))
    assert figures["seed"] == 5
    assert figures["precision"] == "float32"
    assert figures["peak_memory_bytes"] == 2.5e9
    assert figures["images_per_second"] == 1234
    assert figures["top5"] is None, "five of two classes is no feat"


def test_curves_show_the_images_that_were_watched():
    rest = {"train_loss": 1.0, "train_top1": 50.0, "lr": 0.1}
    for split, history in (("test", WATCHED), ("validation", HELD_OUT)):
        figure = figures.curves([{**rest, **epoch} for epoch in history], "title")
        labels = {line.get_label() for line in figure.axes[1].lines}
        assert labels == {"train", split}


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({}, []),
        ({"runs": Path("elsewhere")}, ["tracking.uri=sqlite:////a b/mlflow.db"]),
        ({"uri": "http://ada:secret@host:5000"}, ["tracking.uri=sqlite:////a b/mlflow.db"]),
    ],
)
def test_the_command_to_use_the_model_finds_the_registry_that_it_is_in(settings, where):
    commands = report.next_commands(
        Tracking(**settings), "sqlite:////a b/mlflow.db", "models:/net@candidate"
    )
    python, program, *words = shlex.split(dict(commands)["use it"])
    assert (python, program) == (sys.executable, sys.argv[0])
    assert words == ["--predict", "net@candidate", "IMAGE", *where]


def test_what_was_not_registered_or_tracked_has_no_command():
    ((label, command),) = report.next_commands(Tracking(), "http://host:5000", None)
    assert (label, command) == ("see it", "http://host:5000")
    assert report.next_commands(Tracking(enabled=False), None, None) == []
