from __future__ import annotations

import fnmatch
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import models
from pipeline import runfolder
from pipeline.cli import main, smoke
from pipeline.config import Experiment
from pipeline.experiments import catalog, load_experiment
from pipeline.recipes import RECIPES
from pipeline.settings import override

RUN = Path(__file__).parents[3] / "run.py"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def error_of(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert list(Path.cwd().iterdir()) == [], "bad input left something behind"
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--experiment", "digits_lenet5_tenrary"], ["digits_lenet5_tenrary", "ternary"]),
        (["--experiment", "digits_lenet5", "train.epoch=3"], ["train.epochs"]),
        (["--experiment", "digits_lenet5", "train.epochs=0"], ["greater than 0"]),
        (["--experiment", "digits_lenet5", "method=ternary(expansoin=2)"], ["expansion"]),
        (["--experiment", "digits_lenet5", "method=ternary(expansion=3)"], ["expansion", "3"]),
        (["--experiment", "digits_lenet5", "dataset=mnits"], ["mnist"]),
        (["--experiment", "digits_lenet5", "backbone=lenet6"], ["lenet5"]),
        (["--experimnt", "digits_lenet5"], ["--experimnt", "--experiment"]),
        (["--experiment"], ["--experiment"]),
        (["train.epochs=3"], ["--experiment NAME"]),
        (["mnist_lenet5", "train.epochs=3"], ["--experiment mnist_lenet5"]),
        (
            ["--experiment", "imagenet_resnet50_16ep"],
            ["did you mean imagenet_resnet50_float_16ep?"],
        ),
        (
            ["--experiment", "digits_lenet5", "--dry-run", "init_from=away.pt"],
            ["no file", "away.pt"],
        ),
        (["--list", "kundu2021"], ["recipe matches 'kundu2021'", "kundu2020"]),
        (["--experiment", "digits_lenet5", "--describe", "digits_lenet5"], ["not both"]),
        (["--experiment", "digits_lenet5", "--yaml"], ["--describe"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--list", "nothing*"], ["nothing*"]),
        (["--prepare", "mnits"], ["mnits", "did you mean 'mnist'"]),
        (["--prepare", "digits_lenet6"], ["lenet5"]),
        (["--prepare", "digits", "train.epochs=2"], ["train.epochs", "data."]),
        (["--prepare", "digits", "--experiment", "digits_lenet5"], ["--prepare goes alone"]),
        (["--prepare", "digits", "--inspect", "digits"], ["--prepare goes alone"]),
        (["--inspect", "digits", "--smoke"], ["--inspect goes alone", "--smoke"]),
        (["--prepare", "folder"], ["folder does not exist", "train/<class>/", "data.raw"]),
        (["--prepare", "folder", "data.raw=nowhere"], ["data.raw: nowhere does not exist"]),
        (["--prepare", "imagenet"], ["ILSVRC2012_img_train.tar"]),
        (["--experiment", "folder_resnet20", "data.raw=nowhere"], ["data.raw: nowhere"]),
        (["--prepare", "digits", "data.quality=101"], ["data.quality", "100"]),
        (["--prepare", "digits", "data.format=gif"], ["data.format", "'jpg'"]),
        (["--experiment", "digits_lenet5", "train.normalization=imagnet"], ["imagenet"]),
        (["--experiment", "digits_lenet5", "train.normalization=imagenet"], ["3 channels"]),
        (["--experiment", "digits_lenet5", "train.crop_area=[0.5,1]"], ["gray", "crop_area"]),
        (["--experiment", "digits_lenet5", "train.test_crop=0.875"], ["gray", "test_crop"]),
        (
            [
                *("--experiment", "cifar10_lenet5", "--dry-run", "train.first_image_size=24"),
                "train.growth_epochs=[0,1]",
            ],
            ["lenet5 takes images of one size only"],
        ),
        (["--experiment", "cifar10_resnet20", "train.crop_area=[0.5,0.1]"], ["train.crop_area"]),
        (["--experiment", "cifar10_resnet20", "train.crop_ratio=[2,1]"], ["train.crop_ratio"]),
        (["--experiment", "cifar10_resnet20", "train.first_image_size=16"], ["growth_epochs"]),
        (
            [
                "--experiment",
                "cifar10_resnet20",
                "train.first_image_size=64",
                "train.growth_epochs=[1,2]",
                "--dry-run",
            ],
            ["first_image_size=64 is more than the 32 pixels"],
        ),
        (["--list", "train.epochs=3"], ["--list goes alone"]),
        (["--list", "--experiment", "x"], ["--list goes alone"]),
        (["--describe", "digits_lenet5", "--resume"], ["--resume"]),
        (["--experiment", "digits_lenet5", "--resume", "--dry-run"], ["--resume"]),
        (["--describe", "digits_lenet5", "--dry-run"], ["not both"]),
        (["--experiment", "digits_lenet5", "train.batch_size=2000"], ["1437 training images"]),
        (["--experiment", "digits_lenet5", "train.shift=32"], ["train.shift=32"]),
        (
            ["--experiment", "digits_lenet5", "scaling.workers=90", "--dry-run"],
            ["batch norm", "180"],
        ),
        (["--experiment", "digits_lenet5", "scaling.workers=4..2"], ["scaling.workers=4..2"]),
        (["--experiment", "digits_lenet5", "seeds=0"], ["seeds=0", "greater than 0"]),
        (["--experiment", "digits_lenet5", "seed=4294967295", "seeds=2"], ["seed=4294967296"]),
        (["--experiment", "digits_lenet5", "init_from=nowhere.pt"], ["nowhere.pt"]),
        (["--experiment", "digits_lenet5", "train.teacher=nobody"], ["nobody"]),
        (["--experiment", "digits_lenet5", "train.batch_size=2", "--dry-run"], ["batch norm", "4"]),
    ],
)
def test_bad_input_is_one_line_with_the_nearest_right_thing(capsys, arguments, parts):
    line = error_of(capsys, *arguments)
    for part in parts:
        assert part in line


def test_resume_without_a_run_to_resume_is_one_line(capsys):
    settings = ["data.synthetic=[64,8]", "data.backend=torch", "tracking.enabled=false"]
    assert main(["--experiment", "digits_lenet5", *settings, "--resume"]) == 2
    assert "no unfinished run of digits_lenet5" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_where_it_is_not_clear_what_to_resume_the_runs_that_there_are_are_shown(capsys):
    settings = ["data.synthetic=[64,8]", "data.backend=torch", "tracking.enabled=false"]
    experiment = load_experiment("digits_lenet5", settings)
    names = []
    for changes in ([], [], ["train.epochs=7"]):
        run = runfolder.create(override(experiment, changes), "0123456789ab")
        run.release()
        names.append(run.name)
    for word in ([], ["--resume=nowhere"]):
        arguments = ["--experiment", "digits_lenet5", *settings, "train.lr=0.3", *word]
        assert main(arguments if word else [*arguments, "--resume"]) == 2
        shown = capsys.readouterr()
        table = shown.out.splitlines()
        for name, differing in zip(names, ["train.lr", "train.lr", "train.epochs=7"], strict=True):
            (line,) = [line for line in table if f" {name} " in line]
            assert "stopped before its first checkpoint" in line
            assert differing in line
        assert len(shown.err.splitlines()) == 1
    assert not Path("prepared").exists(), "settings alone say it"


def test_list_shows_every_curated_experiment(capsys):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in catalog():
        assert name in shown
    assert "99.50" in shown


def test_list_shows_every_network_and_method_and_says_what_is_ours(capsys):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in (*models.list_backbones(), *models.list_methods()):
        assert f"  {name} " in shown
    assert main(["--list", "threshnet28"]) == 0
    assert "our reconstruction" in capsys.readouterr().out


def test_list_explains_a_network_or_method_and_its_options(capsys):
    assert main(["--list", "binary"]) == 0
    shown = capsys.readouterr().out
    for text in ("Stadtmann", "binary-bwn", "one of vanilla, bnn, bireal, swish"):
        assert text in shown
    assert main(["--list", "mobilenetv2"]) == 0
    shown = capsys.readouterr().out
    for text in ("Sandler", "one of imagenet, cifar", "width"):
        assert text in shown
    assert "num_classes" not in shown


def test_what_is_ours_is_said_wherever_the_network_is_named(capsys):
    for arguments in (
        ["--describe", "digits_threshnet28"],
        ["--experiment", "digits_threshnet28", "--dry-run"],
    ):
        assert main(arguments) == 0
        assert "threshnet28: our reconstruction" in capsys.readouterr().out


def test_a_dry_run_names_the_layers_that_a_method_changes_without_quantizing(capsys):
    assert main(["--experiment", "digits_resnet20_sparse+ternary", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "18 sparse+ternary: " in shown
    assert "2 ternary: conv1, fc" in shown


def test_list_takes_a_glob(capsys):
    assert main(["--list", "*ternary"]) == 0
    shown = capsys.readouterr().out
    assert "mnist_lenet5_ternary " in shown
    assert "ternary-x4" not in shown


def test_list_finds_recipes(capsys):
    for pattern in ("kundu2020", "stadtmann2020*", "16ep*"):
        assert main(["--list", pattern]) == 0
        shown = capsys.readouterr().out
        for name, named in RECIPES.items():
            assert (f"  {name} " in shown) == fnmatch.fnmatch(name, pattern)
            assert (named.what in shown) == fnmatch.fnmatch(name, pattern)


def test_an_untuned_name_says_which_recipe_it_has_wherever_it_is_looked_at(capsys):
    for name, said in (
        ("digits_resnet20_ternary", "no curated experiment; the default recipe"),
        ("digits_resnet20_ternary_he2018", "no curated experiment; recipe he2018 as named"),
    ):
        words = [] if "he2018" not in name else ["train.flip=false"]
        for arguments in (["--describe", name], ["--experiment", name, "--dry-run"]):
            assert main([*arguments, *words]) == 0
            assert f"{name} is untuned: {said}" in capsys.readouterr().out
    assert main(["--describe", "digits_resnet20_ternary", "--yaml"]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    assert main(["--config", "mine.yaml", "--dry-run"]) == 0
    assert "no curated experiment; recipe of mine.yaml" in capsys.readouterr().out


def test_describe_counts_at_the_size_of_evaluation_as_the_record_does(capsys):
    """ResNet-18 takes 1.814 G at 224 pixels (torchvision); it is trained at 192 here."""
    assert main(["--describe", "imagenet_resnet18_float_16ep", "train.blurpool=false"]) == 0
    assert "1,814,073,344 at 224x224" in capsys.readouterr().out


def test_describe_shows_published_counts(capsys):
    """LeNet5 at 28x28: 878,154 parameters and 6,571,520 MACs (Stadtmann et al. 2020)."""
    assert main(["--describe", "mnist_lenet5_ternary"]) == 0
    shown = capsys.readouterr().out
    for text in ("878,154", "6,571,520", "train.epochs", "conv2", "ternary", "876,320 at 1.6 bits"):
        assert text in shown


def test_describe_yaml_is_what_config_reads(capsys):
    assert main(["--describe", "mnist_lenet5", "train.epochs=7", "--yaml"]) == 0
    text = capsys.readouterr().out
    assert Experiment.model_validate(yaml.safe_load(text)) == load_experiment(
        "mnist_lenet5", ["train.epochs=7"]
    )
    Path("mine.yaml").write_text(text)
    assert main(["--config", "mine.yaml", "--describe", "mnist_lenet5"]) == 2
    assert main(["--config", "mine.yaml", "train.epochs=8", "--dry-run"]) == 0


def test_a_dry_run_says_what_would_happen_and_writes_nothing(capsys):
    assert main(["--experiment", "digits_lenet5_ternary", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    # 1,437 training images in batches of 64: 22 full steps an epoch.
    for text in ("22 steps", "440 in all", "4 ternary: conv1, conv2, fc1, fc2", "digits"):
        assert text in shown
    assert list(Path.cwd().iterdir()) == []


def test_a_dry_run_of_several_seeds_counts_the_steps_of_all(capsys):
    assert main(["--experiment", "digits_lenet5", "--dry-run", "seeds=5", "seed=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "seeds    5 runs, seeds 1 to 5" in lines
    # 20 epochs of 22 steps, five times.
    assert any("2,200 in all 5 runs" in line for line in lines)
    assert any(line.startswith("run      a folder for each") for line in lines)


def test_a_dry_run_says_where_weights_come_from_and_whether_they_are_there(capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(Path.cwd()))
    run = ["--experiment", "cifar10_vggnet7_binary", "--dry-run", "data.synthetic=[5100,16]"]
    assert main([*run, "init_from=models:/cifar10_vggnet7@candidate"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "weights" in line)
    assert "models:/cifar10_vggnet7@candidate, which is not there" in line
    assert line.endswith("train it first: --experiment cifar10_vggnet7")
    words = ["init_from=ResNet18_Weights.IMAGENET1K_V1", "train.teacher=there.pt"]
    Path("there.pt").touch()
    assert main([*run, *words]) == 0
    shown = capsys.readouterr().out
    assert "ResNet18_Weights.IMAGENET1K_V1, which would be downloaded to" in shown
    assert "of the teacher there.pt, which is there" in shown
    assert [path.name for path in Path.cwd().iterdir()] == ["there.pt"]


def test_weights_that_do_not_fit_are_refused_before_the_data_are_prepared(capsys):
    torch.save({"conv1.weight": torch.zeros(2, 1, 5, 5)}, "other.pt")
    words = ["init_from=other.pt", "data.synthetic=[64,8]", "tracking.enabled=false"]
    assert main(["--experiment", "digits_lenet5", "train.batch_size=8", *words]) == 2
    assert "the weights of other.pt do not fit" in capsys.readouterr().err
    assert not Path("prepared").exists()


def test_a_missing_start_says_which_experiment_makes_it(capsys, runs):
    words = ["data.synthetic=[5100,16]", "scaling.launcher=local", f"tracking.runs={runs}"]
    start = "init_from=models:/cifar10_vggnet7@candidate"
    assert main(["--experiment", "cifar10_vggnet7_binary", start, *words]) == 2
    line = capsys.readouterr().err.strip()
    assert line.endswith(
        "has no registered model cifar10_vggnet7; it has none; train it first: "
        "--experiment cifar10_vggnet7"
    )


def test_help_and_list_answer_in_about_a_second_and_need_no_torch():
    for argument in ("--help", "--list"):
        program = (
            "import sys; sys.modules.update(dict.fromkeys("
            "['torch', 'ray', 'mlflow', 'ffcv', 'numba', 'matplotlib']));"
            f"from pipeline.cli import main; sys.exit(main([{argument!r}]))"
        )
        started = time.monotonic()
        answer = subprocess.run(
            [sys.executable, "-c", program], cwd=RUN.parent, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        assert "experiment" in answer.stdout
        assert time.monotonic() - started < 5, "a loaded machine may take a few times as long"


def test_describe_and_dry_run_need_neither_ray_nor_ffcv_nor_mlflow():
    for arguments in (
        ["--describe", "digits_lenet5"],
        ["--experiment", "digits_lenet5", "--dry-run", "data.backend=torch"],
    ):
        program = (
            "import sys; sys.modules.update(dict.fromkeys(['ray', 'mlflow', 'ffcv', 'numba']));"
            f"from pipeline.cli import main; sys.exit(main({arguments!r}))"
        )
        answer = subprocess.run(
            [sys.executable, "-c", program], cwd=RUN.parent, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr


def test_run_py_returns_the_exit_code():
    answer = subprocess.run([sys.executable, RUN, "--experiment", "x"], capture_output=True)
    assert answer.returncode == 2
    assert b"Traceback" not in answer.stderr


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "--experiment" in capsys.readouterr().out


def test_a_dry_run_shows_no_password(capsys):
    uri = "tracking.uri=http://ann:secret@host:5000"
    assert main(["--experiment", "digits_lenet5", "--dry-run", uri]) == 0
    shown = capsys.readouterr().out
    assert "http://host:5000" in shown
    assert "secret" not in shown


def test_no_way_of_looking_at_an_experiment_shows_a_password(capsys):
    secrets = [
        "tracking.uri=http://ann:hunter2@host:5000",
        "checkpoint.folder=s3://b/x?key=hunter2",
    ]
    for arguments in (["--describe", "digits_lenet5"], ["--describe", "digits_lenet5", "--yaml"]):
        assert main([*arguments, *secrets]) == 0
        shown = capsys.readouterr().out
        assert "http://host:5000" in shown
        assert "hunter2" not in shown


def test_brackets_in_a_folder_are_no_markup(capsys):
    assert main(["--experiment", "digits_lenet5", "--dry-run", "data.prepared=a[/x]"]) == 0
    assert "a[/x]/digits" in capsys.readouterr().out


def test_the_smoke_form_keeps_network_method_and_optimizer():
    experiment = load_experiment("mnist_lenet5_ternary-x2")
    small = smoke(experiment)
    assert (small.backbone, small.method) == (experiment.backbone, experiment.method)
    assert small.train.optimizer == experiment.train.optimizer
    assert small.tracking.runs != experiment.tracking.runs


def test_every_curated_experiment_has_a_smoke_form_of_its_own_network_and_recipe():
    for name, experiment in catalog().items():
        small = smoke(experiment)
        assert small.tuned, name
        for key in ("optimizer", "lr", "schedule", "loss", "ema_decay", "precision", "blurpool"):
            assert getattr(small.train, key) == getattr(experiment.train, key), (name, key)
        assert small.data.synthetic is not None
        images = small.data.synthetic[0] - small.train.validation
        assert images == 2 * small.train.batch_size, f"{name} takes two steps"


def test_the_smoke_form_needs_no_other_weights_and_takes_one_seed_unless_told():
    settings = ["seeds=5", "init_from=somewhere.pt", "train.teacher=models:/big@candidate"]
    small = smoke(load_experiment("digits_lenet5", settings))
    assert (small.seeds, small.init_from, small.train.teacher) == (1, None, None)


def test_a_dry_run_says_what_the_linear_scaling_rule_makes_of_the_learning_rate(capsys):
    words = ["train.lr=0.1", "train.lr_batch_size=256", "train.batch_size=1024"]
    assert main(["--experiment", "digits_lenet5", "--dry-run", *words]) == 0
    assert "lr 0.1 for a batch of 256 becomes 0.4 for 1,024" in capsys.readouterr().out


def test_a_smoke_run_keeps_away_from_the_store_of_real_runs(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////real/mlflow.db")
    small = smoke(load_experiment("digits_lenet5"))
    assert small.tracking.uri == f"sqlite:///{Path.cwd()}/runs/smoke/mlflow.db"
