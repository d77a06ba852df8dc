"""What the model card says, and that it fits where MLflow keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data_prep
import models
from pipeline.evaluate import Evaluation
from pipeline.experiments import load_experiment
from pipeline.loop import build_model
from pipeline.registry.card import LONGEST_DESCRIPTION, description, model_card, with_seeds
from pipeline.seeds import Spread
from pipeline.stages import Result
from pipeline.weights import NO_SOURCES, Sources, Weights

HISTORY = [{"train_loss": 1.0, "validation_top1": 80.0, "images_per_second": 9.0}]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return data_prep.prepare(
        "digits", prepared=tmp_path_factory.mktemp("prepared"), synthetic=(16, 8)
    )


def result(manifest, name: str, *words: str, sources: Sources = NO_SOURCES) -> Result:
    experiment = load_experiment(name, [*words])
    return Result(
        experiment=experiment,
        manifest=manifest,
        folder=Path("runs/one"),
        history=HISTORY * experiment.train.epochs,
        kept_epoch=1,
        evaluation=Evaluation(torch.zeros(40).long(), torch.zeros(40).long(), 10, 40, 0.25),
        profile=models.profile(build_model(experiment, manifest), 32),
        hardware="1 CPU worker, gloo",
        seconds=61.0,
        sources=sources,
    )


def test_it_says_what_how_good_how_large_how_to_use_it_and_where_it_ends(manifest):
    finished = result(manifest, "digits_lenet5_ternary", "train.shift=3", "seed=5")
    card = model_card(finished, "0123", "fedcba9876543210")
    profile = finished.profile
    for text in (
        "# digits_lenet5_ternary",
        "method `ternary`",
        "Top-1 **100.00 %** of 40 test images (95 % interval 91.24 to 100.00 %)",
        f"{profile.macs:,} multiply-accumulates",
        "run.py --predict models:/digits_lenet5_ternary/VERSION",
        'mlflow.pytorch.load_model("models:/digits_lenet5_ternary/VERSION")',
        "minus mean [0.3058], divided by standard\ndeviation [0.3237]",
        f"**{profile.stored_bytes:,}**",
        "License: CC BY 4.0",
        "shifts of up to 3 pixels",
        "seed 5",
        "MLflow run 0123, code fedcba987654.",
        "Few bits make the file smaller",
        "Not for decisions",
    ):
        assert text in card
    assert "published" not in card
    assert "held-out" not in card


def test_the_bytes_of_all_schemes_add_up(manifest):
    finished = result(manifest, "digits_lenet5_ternary")
    rows = [line.split("|") for line in model_card(finished, "0", None).splitlines()]
    sizes = [row[-2].strip().strip("*").replace(",", "") for row in rows if len(row) == 7]
    *parts, whole, _ = [int(size.split(" ")[0]) for size in sizes if size[:1].isdigit()]
    assert sum(parts) == whole == finished.profile.stored_bytes


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["data.synthetic=[16,8]"], "**Trained on made-up images: of no use on real ones.**"),
        (["data.max_per_class=5"], "at most 5 images per class"),
        (["train.validation=4"], "chosen on held-out training images"),
        (["train.ema_decay=0.99"], "averaged weights (decay 0.99)"),
    ],
)
def test_what_sets_this_training_apart_is_said(manifest, words, text):
    assert text in model_card(result(manifest, "digits_lenet5", *words), "0", None)


def test_made_up_images_are_not_said_to_be_the_data_set_or_under_its_license(manifest):
    card = model_card(result(manifest, "digits_lenet5", "data.synthetic=[16,8]"), "0", None)
    title = data_prep.get_dataset("digits").title
    assert card.count(title) == card.count(f"**made-up images** in the form of {title}") == 2
    assert "License" not in card
    assert "Source" not in card


def test_weights_from_elsewhere_are_named_by_the_version_that_an_alias_was_then(manifest):
    begun, teacher = (
        Weights(f"models:/{name}@champion", f"models:/{name}@champion (version 3)", Path(), "")
        for name in ("start", "teacher")
    )
    card = model_card(result(manifest, "digits_lenet5", sources=Sources(begun, teacher)), "0", None)
    assert "Begun with models:/start@champion (version 3)." in card
    assert "Teacher: models:/teacher@champion (version 3)." in card


def test_code_that_differs_from_its_commit_is_said_to(manifest):
    commit = "fedcba9876543210fedcba9876543210fedcba98-dirty"
    card = model_card(result(manifest, "digits_lenet5"), "0123", commit)
    assert "MLflow run 0123, code fedcba987654-dirty." in card


def test_the_description_of_a_version_names_that_version_whatever_alias_it_has_later(manifest):
    text = description(model_card(result(manifest, "digits_lenet5"), "0", None), "7")
    assert text.count("models:/digits_lenet5/7") == 2
    assert "VERSION" not in text


def test_a_default_recipe_and_a_published_figure_are_said(manifest):
    assert "nobody has tuned" in model_card(result(manifest, "digits_vggnet7_binary"), "0", None)
    curated = result(manifest, "mnist_lenet5_ternary")
    assert "nobody has tuned" not in model_card(curated, "0", None)


def test_a_thousand_classes_fit_into_the_description_of_a_version(manifest):
    many = replace(
        manifest, class_names=tuple(f"a rather long name of class {n}" for n in range(1000))
    )
    finished = result(manifest, "digits_lenet5_sparse+ternary", "train.flip=true")
    card = model_card(replace(finished, manifest=many), "0" * 32, "f" * 40)
    assert "and 988 more" in card
    assert len(with_seeds(card, Spread(97.5, 0.25), 5)) < LONGEST_DESCRIPTION


def test_a_card_that_is_too_long_for_mlflow_loses_its_end_but_not_the_seeds():
    text = with_seeds(description("long " * 2000, "1"), Spread(97.5, 0.25), 5)
    assert len(text) == LONGEST_DESCRIPTION
    assert text.endswith("97.50 ± 0.25 % (mean and sample standard deviation).\n")


def test_the_spread_over_seeds_is_said_once():
    card = "# Net\n\nText.\n"
    once = with_seeds(card, Spread(97.504, 0.251), 5)
    assert once == (
        "# Net\n\nText.\n\n## Other seeds\n\nTop-1 over 5 seeds: 97.50 ± 0.25 % (mean and sample "
        "standard deviation).\n"
    )
    assert with_seeds(once, Spread(97.504, 0.251), 5) == once
