"""The README is run, not believed: its commands, its Python, and the files it tells one to add."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.write_results import LOADING, RECORDS, collect, table, with_tables
from pipeline.experiments import load_experiment
from pipeline.settings import override
from tests.pictures import picture, write_class_folders
from tests.readme import BLOCKS, README, commands_marked

REPOSITORY = Path(__file__).parents[2]
#: A command with one of these is quick as it stands; another one gets --smoke added.
QUICK = ("--list", "--describe", "--dry-run", "--smoke", "--prepare", "--inspect")


def run_command(command: str, root: Path, folder: Path, **variables: str) -> str:
    words = shlex.split(command)
    if words[1] == "run.py":
        words[1] = str(root / "run.py")
        if not any(option in words for option in QUICK):
            words.append("--smoke")
    assert words[0] == "python"
    words[0] = sys.executable
    environment = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    environment |= {"PYTHONPATH": str(root), **variables}
    answer = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.parametrize(
    "command", [line for line in commands_marked(None) if line.startswith("python")]
)
def test_every_command_works(command, tmp_path):
    assert run_command(command, REPOSITORY, tmp_path)


def test_the_commands_for_raw_images_work(tmp_path):
    write_class_folders(tmp_path / "pictures" / "birds", train=70)
    for number in range(1000):
        for split in ("train", "val"):
            folder = tmp_path / "images" / "imagenet" / split / f"n{number:08}"
            folder.mkdir(parents=True)
            picture(number, 16, 16).save(folder / "1.JPEG")
    commands = commands_marked("with raw images")
    assert len(commands) == 4
    variables = {"HOME": str(tmp_path), "TERNFORGE_DATA": str(tmp_path / "images")}
    outputs = [run_command(command, REPOSITORY, tmp_path, **variables) for command in commands]
    assert "folder: 140 train + 12 test images, written and verified" in outputs[0]
    assert "imagenet: 1,000 train + 1,000 test images" in outputs[2]


def test_every_make_target_exists():
    lines = commands_marked(None)
    targets = [line.removeprefix("make ") for line in lines if line.startswith("make")]
    assert {"demo", "test", "ui"} <= set(targets)
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout
    for target in targets:
        assert f"make {target} " in listed


def test_the_files_it_tells_to_add_are_all_that_a_method_and_a_backbone_need(tmp_path):
    house = tmp_path / "house"
    ignored = shutil.ignore_patterns(".*", "runs", "prepared", "data", "tests", "__pycache__")
    shutil.copytree(REPOSITORY, house, ignore=ignored)
    for block in BLOCKS:
        if block["mark"] and block["mark"].startswith("file: "):
            (house / block["mark"].removeprefix("file: ")).write_text(block["text"])
    commands = commands_marked("with the files above")
    assert len(commands) == 2
    outputs = [run_command(command, house, tmp_path) for command in commands]
    # The sign method stores a bit per weight: 16 x 9 + 32 x 16 x 9 + 10 x 32 weights, 3 layers.
    assert "sign" in outputs[0]
    assert "models:/digits_tiny_sign@synthetic" in outputs[1]


def test_its_python_runs(tmp_path):
    """One after the other: train, load what is registered, and use the networks alone."""
    use, train, networks = (
        block["text"] for block in BLOCKS if block["kind"] == "python" and block["mark"] is None
    )
    train = train.replace('"train.epochs=1"', '"train.epochs=1", "scaling.launcher=local"')
    answer = subprocess.run(
        [sys.executable, "-c", f"{train}{use}\nassert logits.shape == (7, 10)\n{networks}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_its_tables_are_made_of_the_records():
    assert with_tables(README) == README
    records = json.loads(RECORDS.read_text())
    assert {"digits_lenet5", "digits_lenet5_ternary", "mnist_lenet5_ternary"} <= set(records)
    assert any("stock FFCV" in speeds for speeds in json.loads(LOADING.read_text()).values())


def test_the_table_takes_the_newest_finished_run_as_cataloged(tmp_path):
    experiment = load_experiment("digits_lenet5")

    def write(stamp: str, top1: float, status="finished", sessions=1, overrides=()) -> None:
        record = {
            "status": status,
            "sessions": sessions,
            "experiment": override(experiment, overrides).model_dump(mode="json"),
            "result": {**json.loads(RECORDS.read_text())["digits_lenet5"], "top1": top1},
        }
        folder = tmp_path / "digits_lenet5" / stamp
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(record))

    write("20260101", 11.0)
    write("20260102", 22.0)
    write("20260103", 33.0, status="started")
    write("20260104", 44.0, sessions=2)
    write("20260105", 55.0, overrides=["data.synthetic=[64,16]"])
    write("20260106", 66.0, overrides=["train.epochs=1"])
    write("20260107", 77.0, overrides=["method=ternary"])
    assert collect(tmp_path)["digits_lenet5"]["top1"] == 22.0
    assert "| 22.00 |" in table(collect(tmp_path))


def test_every_file_of_the_house_is_in_its_tree():
    tree = README.split("## The house")[1].split("```")[1]
    for package in ("pipeline", "models", "data_prep"):
        for path in (REPOSITORY / package).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in tree, f"{package}/{path.name} is not in the README's tree"
