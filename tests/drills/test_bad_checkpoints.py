"""Checkpoints that are damaged, or made to do harm: skipped by name, and nothing else happens."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.cli import main
from tests.command_line import assert_equal_bit_for_bit

NAME = "digits_lenet5_ternary"

#: 40 steps in an epoch, of which all checkpoints stay.
STEPS = 40
WORDS = [
    *("--experiment", NAME, "train.epochs=2", "train.batch_size=4", "data.synthetic=[160,32]"),
    *("checkpoint.steps=5", "checkpoint.keep=100", "data.backend=torch"),
    *("scaling.launcher=local", "tracking.enabled=false"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a project with one run that nobody disturbed."""
    project = tmp_path_factory.mktemp("whole") / "project"
    project.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main(WORDS) == 0
    return project


def checkpoints_of(project: Path) -> Path:
    (folder,) = project.glob(f"runs/{NAME}/*/checkpoints")
    return folder


@pytest.fixture
def checkpoints(whole, tmp_path, monkeypatch) -> Path:
    """Those of the same run as it would be had it been killed after step 15 of epoch 2."""
    project = tmp_path / "project"
    shutil.copytree(whole, project)
    monkeypatch.chdir(project)
    folder = checkpoints_of(project)
    for path in folder.iterdir():
        if path.name > "epoch-0001-step-000015":
            shutil.rmtree(path)
    record = folder.parent / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "started"}))
    return folder


@pytest.fixture
def resume(checkpoints, whole, capsys) -> Callable[[], str]:
    """Continue the run, which has to end as the whole one did; what it said, in one line."""

    def resumed() -> str:
        assert main([*WORDS, "--resume"]) == 0
        expected = load_file(checkpoints_of(whole) / "epoch-0002" / "model.safetensors")
        assert_equal_bit_for_bit(
            load_file(checkpoints / "epoch-0002" / "model.safetensors"), expected
        )
        return " ".join(capsys.readouterr().out.split())

    return resumed


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_are_named_and_the_run_goes_on_from_the_one_before(checkpoints, resume):
    os.truncate(checkpoints / "epoch-0001-step-000015" / "model.safetensors", 1000)
    flip_a_bit(checkpoints / "epoch-0001-step-000010" / "optimizer.safetensors")
    (checkpoints / "epoch-0001-step-000005" / "manifest.json").unlink()
    said = resume()
    for skipped in (
        "epoch-0001-step-000015 is skipped: model.safetensors holds 1000 bytes of ",
        "epoch-0001-step-000010 is skipped: optimizer.safetensors does not match its checksum",
        "epoch-0001-step-000005 is skipped: manifest.json is missing",
    ):
        assert skipped in said
    assert "continuing after epoch 1 of 2" in said


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self._folder),))


def seal(folder: Path, **also: Path) -> None:
    """Write the manifest that fits the files, and others by the names that it shall give them."""
    files = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"} | also
    listed = {}
    for name, path in files.items():
        content = b"" if path.is_fifo() else path.read_bytes()
        listed[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))


def state_with(folder: Path, **changes: object) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | changes))
    seal(folder)


def names_a_file_elsewhere(folder: Path, outside: Path) -> None:
    seal(folder, **{f"../../../../../{outside.name}/secret": outside / "secret"})


def names_an_absolute_path(folder: Path, outside: Path) -> None:
    seal(folder, **{str(outside / "secret"): outside / "secret"})


def has_a_link(folder: Path, outside: Path) -> None:
    (folder / "model.safetensors").rename(outside / "model.safetensors")
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
    seal(folder)


def has_a_pipe(folder: Path, outside: Path) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    seal(folder)


def has_a_pipe_for_a_manifest(folder: Path, outside: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def is_a_link(folder: Path, outside: Path) -> None:
    shutil.move(folder, outside / "checkpoint")
    folder.symlink_to(outside / "checkpoint")


def has_deep_json(folder: Path, outside: Path) -> None:
    (folder / "state.json").write_text('{"history":' + "[" * 1_000_000)
    seal(folder)


def has_a_deep_manifest(folder: Path, outside: Path) -> None:
    (folder / "manifest.json").write_text('{"files":' * 1_000_000)


def has_a_huge_manifest(folder: Path, outside: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] |= dict.fromkeys(range(500_000), manifest["files"]["state.json"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def says_another_position(folder: Path, outside: Path) -> None:
    state_with(folder, epoch=0)


def has_text_for_a_metric(folder: Path, outside: Path) -> None:
    state_with(folder, history=[{"train_loss": "0.1"}])


def has_no_end_of_steps(folder: Path, outside: Path) -> None:
    state_with(folder, step=10**400)


#: Of the files, and what the user reads of each.
HOSTILE = {
    names_a_file_elsewhere: "which is none of its files",
    names_an_absolute_path: "which is none of its files",
    has_a_link: "model.safetensors is no plain file",
    has_a_pipe: "state.json is no plain file",
    has_a_pipe_for_a_manifest: "manifest.json is no plain file",
    is_a_link: "it is no folder",
    has_deep_json: "state.json is damaged",
    has_a_deep_manifest: "its manifest is damaged",
    has_a_huge_manifest: "its manifest is damaged",
    says_another_position: "damaged",
    has_text_for_a_metric: "state.json is damaged",
    has_no_end_of_steps: "state.json is damaged",
}


def forge(checkpoints: Path, name: str) -> Path:
    """A copy of the newest checkpoint under another name, with the state that fits the name."""
    folder = checkpoints / name
    shutil.copytree(checkpoints / "epoch-0001-step-000015", folder)
    done = int(name[-6:])
    state_with(folder, done=done, step=STEPS + done)
    return folder


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(60)
def test_checkpoints_made_to_do_harm_are_named_and_do_nothing(checkpoints, resume, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("of somebody else")
    for number, make in enumerate(HOSTILE, start=16):
        make(forge(checkpoints, f"epoch-0001-step-{number:06d}"), outside)
    before = everything_in(outside)
    assert len(before) > 2
    said = resume()
    for number, reason in enumerate(HOSTILE.values(), start=16):
        start = f"checkpoint epoch-0001-step-{number:06d} is skipped: "
        assert start in said, start
        assert reason in said.partition(start)[2].partition("checkpoint epoch")[0], reason
    assert "continuing after step 15 of epoch 2 of 2" in said
    assert everything_in(outside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "project"]


def has_a_pickle(folder: Path, outside: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(outside / "made")))


def has_a_torch_file(folder: Path, outside: Path) -> None:
    torch.save({"conv1.weight": Payload(outside / "made")}, folder / "optimizer.safetensors")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def has_weights_that_are_no_numbers(folder: Path, outside: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["conv1.weight"].fill_(torch.nan))


def has_another_network(folder: Path, outside: Path) -> None:
    change_tensors(
        folder, lambda tensors: tensors.update({"conv1.weight": torch.zeros(1 << 20, 1)})
    )


def lacks_a_tensor(folder: Path, outside: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("conv1.weight"))


def claims_more_than_there_is(folder: Path, outside: Path) -> None:
    header = {"conv1.weight": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


#: Of the tensors: they are looked at when they are loaded.
UNFIT = {
    has_a_pickle: "model.safetensors",
    has_a_torch_file: "optimizer.safetensors",
    has_weights_that_are_no_numbers: "not finite",
    has_another_network: "conv1.weight",
    lacks_a_tensor: "conv1.weight",
    claims_more_than_there_is: "model.safetensors",
}


@pytest.mark.parametrize("make", UNFIT)
def test_tensors_that_do_not_fit_are_not_loaded(checkpoints, resume, tmp_path, make):
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = forge(checkpoints, "epoch-0001-step-000016")
    make(folder, outside)
    seal(folder)
    said = resume()
    start = "checkpoint epoch-0001-step-000016 is skipped: "
    assert UNFIT[make] in said.partition(start)[2].partition(" note ")[0]
    assert "continuing after step 15 of epoch 2 of 2" in said
    assert not list(outside.iterdir()), "nothing was run"
